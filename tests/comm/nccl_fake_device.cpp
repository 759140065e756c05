// The checks of csrc/comm/nccl_communicator.cpp that run on a CUDA runtime and an NCCL of make-believe. Built and run
// by test_nccl_communicator.py.
#include "nccl_fake.h"

namespace {

int failures = 0;
#define EXPECT(condition)                                                             \
  if (!(condition)) {                                                                 \
    ++failures;                                                                       \
    std::printf("line %d: %s; journal: %s\n", __LINE__, #condition, journal.c_str()); \
  }

const Library kLibrary = fake_library();
int device_memory[4];

struct World {
  explicit World(bool blocking = false, const Library& library = kLibrary) : communicator(library, 1, 3, 0, "g") {
    seen();
    lifecycle.clear();
    fail_alloc = fail_register = fail_window = no_peer_access = stuck_in_window = false;
    hang = stuck_in_launch = aborted = false;
    async_error = 0;
    in_progress = 2;
    UniqueId id{};
    bool ready = false;
    EXPECT(communicator.start(id, 0, blocking).ok());
    for (int asked = 0; !ready && asked < 10; ++asked) EXPECT(communicator.poll(&ready).ok());
    EXPECT(ready);
    const std::lock_guard guard(lock);
    names = {{&one, "one"}, {&two, "two"}, {communicator.stream(), "own"}};
  }
  Status run(Operation operation, FakeStream& stream, bool asynchronous = false, double timeout = 60,
             std::vector<std::size_t> counts = {5}, Handle* handle = nullptr) {
    Handle other;
    Call call{operation,
              device_memory,
              device_memory + 1,
              counts,
              kFloat32,
              kSum,
              0,
              reinterpret_cast<cudaStream_t>(&stream),
              asynchronous,
              timeout};
    return communicator.run(call, handle != nullptr ? handle : &other);
  }
  std::string seen() {
    const std::lock_guard guard(lock);
    return std::exchange(journal, "");
  }
  // The first error that check() gives within `seconds`.
  Status failure(double seconds) {
    Status status;
    for (int i = 0; i < seconds * 1000 && status.ok(); ++i) {
      usleep(1000);
      status = communicator.check();
    }
    return status;
  }
  FakeStream one, two;
  Communicator communicator;
};

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void order_of_streams() {
  World w;
  EXPECT(w.run(Operation::kAllReduce, w.one).ok());
  EXPECT(w.seen() == "all_reduce5@one ");
  EXPECT(w.run(Operation::kAllReduce, w.two).ok());
  EXPECT(w.seen() == "two<one:1 all_reduce5@two ");
  Handle handle;
  EXPECT(w.run(Operation::kAllReduce, w.one, true, 60, {5}, &handle).ok());
  EXPECT(w.seen() == "own<one:1 own<two:1 all_reduce5@own ");
  EXPECT(w.run(Operation::kAllReduce, w.one, true).ok());
  EXPECT(w.seen() == "own<one:1 all_reduce5@own ");
  EXPECT(w.run(Operation::kBroadcast, w.one).ok());
  EXPECT(w.seen() == "one<own:2 broadcast5@one ");
  EXPECT(w.run(Operation::kAllReduce, w.one, true).ok());
  EXPECT(w.seen() == "own<one:2 all_reduce5@own ");
  EXPECT(w.communicator.wait(handle, reinterpret_cast<cudaStream_t>(&w.two)).ok());
  EXPECT(w.seen() == "two<own:1 ");
}

void uneven_parts() {
  World w;
  EXPECT(w.run(Operation::kReduceScatter, w.one, false, 60, {4, 4, 4}).ok());
  EXPECT(w.seen() == "reduce_scatter4@one ");
  EXPECT(w.run(Operation::kReduceScatter, w.one, false, 60, {4, 0, 3}).ok());
  EXPECT(w.seen() == "( reduce4@one reduce3@one ) ");
  EXPECT(w.run(Operation::kAllGather, w.one, false, 60, {1, 2, 3}).ok());
  EXPECT(w.seen() == "( broadcast1@one broadcast2@one broadcast3@one ) ");
  EXPECT(w.run(Operation::kAllReduce, w.one, false, 60, {0}).ok());
  EXPECT(w.seen().empty());
  EXPECT(w.run(Operation::kAllGather, w.one, false, 60, {1}).code == Code::kInvalidArgument);
}

void captures() {
  for (const int calls : {1, 2, 3}) {
    World w;
    EXPECT(w.run(Operation::kAllReduce, w.two).ok());
    w.seen();
    for (unsigned long long capture = 7; capture < 10; ++capture) {
      w.one.capture = capture;
      stream_of(w.communicator.stream())->capture = 0;  // CUDA takes the forked stream out of the last capture
      Handle handle;
      for (int i = 0; i < calls; ++i) EXPECT(w.run(Operation::kAllReduce, w.one, true, 60, {5}, &handle).ok());
      EXPECT(w.communicator.wait(handle, reinterpret_cast<cudaStream_t>(&w.one)).ok());
      EXPECT(!contains(w.seen(), "<two"));
      w.one.capture = stream_of(w.communicator.stream())->capture = 0;
      EXPECT(w.communicator.wait(handle, reinterpret_cast<cudaStream_t>(&w.one)).code == Code::kInvalidArgument);
      bool done = false;
      EXPECT(w.communicator.done(handle, &done).code == Code::kInvalidArgument);
      for (int i = 0; i < calls; ++i) EXPECT(w.run(Operation::kAllReduce, w.one, i % 2 == 0).ok());
      w.seen();
    }
    usleep(120000);
    EXPECT(w.communicator.check().ok());
    EXPECT(w.communicator.guard_replay(reinterpret_cast<cudaStream_t>(&w.one), 0.1).ok());
    usleep(200000);
    EXPECT(w.communicator.check().ok());
    EXPECT(queries_of_captured == 0);
    w.one.submitted = w.one.stuck_at = 100;
    EXPECT(w.communicator.guard_replay(reinterpret_cast<cudaStream_t>(&w.one), 0.1).ok());
    EXPECT(contains(w.failure(2).message, "graph replay (number 2) has not ended"));
  }
}

void deadline_passes() {
  for (const bool blocking : {false, true}) {
    World w(blocking);
    EXPECT(w.run(Operation::kBroadcast, w.one).ok());
    hang = true;
    const int before = aborts;
    Handle handle;
    EXPECT(w.run(Operation::kAllReduce, w.one, true, 0.2, {5}, &handle).ok());
    EXPECT(w.run(Operation::kAllReduce, w.two).ok());
    const Status status = w.failure(3);
    EXPECT(status.code == Code::kTimeout &&
           contains(status.message, "group g: all_reduce on rank 1 of 3: all_reduce (call 2) has not ended"));
    const Status first = w.communicator.wait(handle, reinterpret_cast<cudaStream_t>(&w.one));
    EXPECT(first.code == Code::kAborted && w.failure(1).code == Code::kTimeout);
    EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kAborted);
    w.communicator.close(1);
    EXPECT(aborts == before + 1);
  }
}

void library_reports() {
  World w;
  hang = true;
  EXPECT(w.run(Operation::kAllGather, w.one, false, 60, {5, 5, 5}).ok());
  async_error = kRemoteError;
  while (!aborted) usleep(1000);
  EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kSystem);
  EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kAborted);
  const Status status = w.failure(3);
  EXPECT(status.code == Code::kSystem && contains(status.message, "all_gather on rank 1") &&
         contains(status.message, "an error of NCCL (its details)"));
}

void enqueuing_hangs() {
  {
    World w;
    in_progress = 1 << 30;  // a lazy connection to a rank that is gone
    const Status status = w.run(Operation::kAllReduce, w.one, false, 0.2);
    EXPECT(status.code == Code::kTimeout && contains(status.message, "could not be enqueued"));
    in_progress = 0;
  }
  World w(true);
  stuck_in_launch = true;  // the device's queue is full
  const Status status = w.run(Operation::kAllReduce, w.one, false, 0.2);
  EXPECT(contains(w.communicator.check().message, "could not be enqueued"));
  EXPECT(aborted);
}

void nothing_grows() {
  const int events = events_alive, streams = streams_alive, before = destroys;
  for (int i = 0; i < 100; ++i) {
    World w;
    for (int call = 0; call < 3; ++call) EXPECT(w.run(Operation::kAllReduce, w.one, call == 1).ok());
    if (i % 2 == 0) w.communicator.close(1);
    if (i % 4 == 0) w.communicator.close(1);
  }
  EXPECT(events_alive == events && streams_alive == streams && destroys == before + 100);
  World w;
  for (int call = 0; call < 5000; ++call) EXPECT(w.run(Operation::kAllReduce, w.one, call % 3 == 0).ok());
  EXPECT(w.communicator.events_created() < 200);
  w.communicator.close(1);
  EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kAborted);
  Handle late;
  {
    World short_lived;
    EXPECT(short_lived.run(Operation::kAllReduce, short_lived.one, true, 60, {5}, &late).ok());
  }
  EXPECT(late.event != nullptr);  // the pool outlives its owner
}

std::string lived() {
  const std::lock_guard guard(lock);
  return lifecycle;
}

bool nothing_left() {
  const std::lock_guard guard(lock);
  return memory_alive == 0 && locals.empty() && windows.empty();
}

void buffers_by_version() {
  static const Library k18 = fake_library(21800), k19 = fake_library(21903), k27 = fake_library(22703);
  static const Library k30 = fake_library(23007);
  const struct {
    const Library& library;
    bool peers;
    Registered kind;
    const char* story;
  } cases[] = {
      {k19, true, Registered::kLocal, "register deregister finalize destroy free "},
      {k27, true, Registered::kLocal, "register deregister finalize destroy free "},
      {kLibrary, true, Registered::kWindow, "window unwindow finalize destroy free "},
      {k30, true, Registered::kWindow, "window unwindow finalize destroy free "},
      {k30, false, Registered::kLocal, "nothing register deregister finalize destroy free "},
  };
  for (const auto& one : cases) {
    World w(false, one.library);
    no_peer_access = !one.peers;
    in_progress = 3;  // of a non-blocking communicator
    std::shared_ptr<Memory> memory;
    EXPECT(w.communicator.allocate(4096, &memory).ok() && memory->bytes() == 4096);
    Registered kind = Registered::kNone;
    EXPECT(w.communicator.register_buffer(memory->address(), 4096, true, memory, 5, &kind).ok());
    EXPECT(kind == one.kind && w.communicator.registrations() == 1 && w.communicator.in_flight() == 0);
    EXPECT(w.communicator.register_buffer(memory->address(), 4096, true, memory, 5, &kind).code ==
           Code::kInvalidArgument);
    memory.reset();
    EXPECT(memory_alive == 1);  // the communicator's
    w.communicator.close(1);
    EXPECT(lived() == one.story && nothing_left() && w.communicator.registrations() == 0);
  }
  World w(false, k18);
  std::shared_ptr<Memory> memory;
  Registered kind = Registered::kWindow;
  EXPECT(contains(w.communicator.allocate(4096, &memory).message, "2.18.0 has no ncclMemAlloc"));
  EXPECT(contains(w.communicator.register_buffer(device_memory, 16, true, nullptr, 5, &kind).message,
                  "2.18.0 has no ncclCommRegister"));
  EXPECT(kind == Registered::kNone && w.run(Operation::kAllReduce, w.one).ok());
}

void buffers_end_one_by_one() {
  World w;
  std::shared_ptr<Memory> memory;
  Registered kind = Registered::kNone;
  EXPECT(w.communicator.allocate(64, &memory).ok());
  EXPECT(w.communicator.register_buffer(memory->address(), 64, false, memory, 5, &kind).ok());
  EXPECT(kind == Registered::kLocal && lived() == "register ");
  EXPECT(w.communicator.register_buffer(device_memory, 16, false, nullptr, 5, &kind).ok());
  EXPECT(w.communicator.registrations() == 2);
  EXPECT(w.communicator.deregister_buffer(memory->address(), 1).ok());
  EXPECT(w.communicator.deregister_buffer(memory->address(), 1).code == Code::kInvalidArgument);
  EXPECT(w.communicator.registrations() == 1 && memory_alive == 1);
  memory.reset();
  EXPECT(memory_alive == 0);
  hang = true;
  EXPECT(w.run(Operation::kAllReduce, w.one).ok());
  EXPECT(w.communicator.deregister_buffer(device_memory, 0.05).code == Code::kTimeout);
  EXPECT(w.communicator.registrations() == 1);
  w.communicator.close(0.05);
  EXPECT(w.communicator.registrations() == 0 && contains(lived(), "abort ") && nothing_left());
}

void buffers_that_fail() {
  {
    World w;
    std::shared_ptr<Memory> memory;
    Registered kind = Registered::kNone;
    fail_alloc = true;
    EXPECT(contains(w.communicator.allocate(64, &memory).message, "ncclMemAlloc of 64 bytes: an error of NCCL"));
    EXPECT(memory == nullptr);
    fail_register = true;  // a local call: the communicator goes on
    EXPECT(contains(w.communicator.register_buffer(device_memory, 16, false, nullptr, 5, &kind).message,
                    "ncclCommRegister: an error of NCCL"));
    EXPECT(kind == Registered::kNone && w.communicator.registrations() == 0);
    EXPECT(w.communicator.register_buffer(nullptr, 16, false, nullptr, 5, &kind).code == Code::kInvalidArgument);
    EXPECT(w.run(Operation::kAllReduce, w.one).ok());
  }
  for (const bool stuck : {false, true}) {  // a collective: the communicator is broken, at the latest at the deadline
    for (const bool blocking : {false, true}) {
      World w(blocking);
      (stuck ? stuck_in_window : fail_window) = true;
      const int before = aborts;
      std::shared_ptr<Memory> memory;
      Registered kind = Registered::kNone;
      EXPECT(w.communicator.allocate(64, &memory).ok());
      const Status status = w.communicator.register_buffer(memory->address(), 64, true, memory, 0.2, &kind);
      EXPECT(!status.ok() && contains(status.message, "register") && kind == Registered::kNone);
      EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kAborted);
      memory.reset();
      w.communicator.close(1);
      EXPECT(aborts == before + 1 && nothing_left() && w.communicator.registrations() == 0);
      EXPECT(lived() == "abort free ");
    }
  }
}

void buffers_in_use() {
  const auto at = [](FakeStream& stream) { return reinterpret_cast<cudaStream_t>(&stream); };
  for (const bool guarded : {true, false}) {  // a graph is still being replayed when the communicator is closed
    World w;
    std::shared_ptr<Memory> memory;
    Registered kind = Registered::kNone;
    EXPECT(w.communicator.allocate(64, &memory).ok());
    EXPECT(w.communicator.register_buffer(memory->address(), 64, true, memory, 5, &kind).ok());
    memory->used_on(at(w.one));
    EXPECT(memory->quiet(0.05));
    w.two.submitted = 3;
    w.two.stuck_at = 2;
    if (guarded) EXPECT(w.communicator.guard_replay(at(w.two), 60).ok());
    if (!guarded) memory->used_on(at(w.two));
    EXPECT(!memory->quiet(0.05));
    memory.reset();
    w.communicator.close(0.2);
    EXPECT(lived() == (guarded ? "window abort free " : "window finalize destroy "));
    EXPECT(memory_alive == (guarded ? 0 : 1) && w.communicator.registrations() == 0);
    memory_alive = 0;
  }
  World w;  // a tensor outlives the communicator, and a capture is under way when it goes
  std::shared_ptr<Memory> memory;
  EXPECT(w.communicator.allocate(64, &memory).ok());
  memory->used_on(at(w.one));
  w.communicator.close(1);
  EXPECT(memory_alive == 1);
  w.one.capture = 5;
  memory.reset();
  EXPECT(memory_alive == 1 && !contains(lived(), "free"));
  w.one.capture = 0;
  memory_alive = 0;
}

void buffers_do_not_pile_up() {
  for (int i = 0; i < 100; ++i) {
    World w;
    Registered kind = Registered::kNone;
    for (const bool window : {true, false}) {
      std::shared_ptr<Memory> memory;
      EXPECT(w.communicator.allocate(64, &memory).ok());
      EXPECT(w.communicator.register_buffer(memory->address(), 64, window, memory, 5, &kind).ok());
    }
    if (i % 4 == 1) w.communicator.abort("a peer died");
    if (i % 4 == 2) EXPECT(w.run(Operation::kAllReduce, w.one).ok());
    if (i % 2 == 0) w.communicator.close(1);
  }
  for (int i = 0; i < 2000 && !nothing_left(); ++i) usleep(1000);  // the last ones are aborted by their own threads
  EXPECT(nothing_left());
}

void several_threads() {
  World w;
  std::vector<std::thread> threads;
  FakeStream streams[4];
  for (FakeStream& stream : streams)
    threads.emplace_back([&w, &stream] {
      for (int call = 0; call < 2000; ++call) EXPECT(w.run(Operation::kAllReduce, stream, call % 2 == 0).ok());
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(w.communicator.sequence() == 8000 && w.communicator.check().ok());
  w.communicator.close(1);
}

}  // namespace

int main() {
  for (auto check : {order_of_streams, uneven_parts, captures, deadline_passes, library_reports, enqueuing_hangs,
                     nothing_grows, buffers_by_version, buffers_end_one_by_one, buffers_that_fail, buffers_in_use,
                     buffers_do_not_pile_up, several_threads})
    check();
  std::printf("%d failures\n", failures);
  std::fflush(stdout);
  std::_Exit(failures != 0);
}
