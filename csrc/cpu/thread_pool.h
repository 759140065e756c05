// A small pool of persistent threads for calls of a few microseconds to a few milliseconds.
//
// Why not OpenMP: torch and NumPy may each bring another OpenMP runtime, none is fork-safe, and its static schedules
// make a call as slow as its slowest thread. Here work is handed out in chunks, and a thread that is late to a call is
// not waited for: the caller does the chunks itself and closes the call.
#pragma once

#include <cstddef>

namespace tpk {
namespace cpu {

using ChunkFn = void (*)(void* context, std::ptrdiff_t chunk);

// Runs fn(context, i) for every i in [0, chunks) on the calling thread and up to threads - 1 others; returns when all
// are done. Inline when threads <= 1 or chunks <= 1, when called from inside fn, or when another thread is using the
// pool. Idle threads spin for about 50 us, yield for about as long, then sleep. Survives fork: the child starts its
// own.
void parallel_for(int threads, std::ptrdiff_t chunks, ChunkFn fn, void* context);

template <class F>
void parallel_for(int threads, std::ptrdiff_t chunks, F&& body) {
  parallel_for(threads, chunks, [](void* context, std::ptrdiff_t chunk) { (*static_cast<F*>(context))(chunk); }, &body);
}

// Threads started in this process so far (not counting callers); 0 while everything ran inline.
int pool_size();

}  // namespace cpu
}  // namespace tpk
