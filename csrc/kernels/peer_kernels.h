// All-reduce over peer memory, alone and fused with bias, residual and RMSNorm: what the host calls.
//
// Order of calls. All ranks of a group make the same calls with the same arguments (addresses apart) in the same order,
// and a rank's calls are ordered by its stream (or by events): two of them never run at once, and none is launched with
// programmatic dependent launch. Graph replays count as calls. Calls of no elements launch nothing.
//
// Numerics. "Ordered" class: fp32 sum that starts at +0 and takes the ranks in order 0..N-1, rounded once; the same
// bits on all ranks, for all sizes and for one-shot, two-shot and Lamport alike. The multimem kernels are a class of
// their own: fp32 accumulation in the switch, the same bits on all ranks.
//
// In place. `out` may equal `x`; otherwise they must not overlap. An x inside the registered area is read there by all
// ranks (no copy-in) and may be overwritten by what follows on the stream; an out inside it is written by all ranks. A
// last partial pack of 16 bytes may be read beyond its end, never written.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"
#include "kernels/peer_layout.h"

namespace tpk {
namespace peer {

// What every launcher takes. Addresses are those of this process.
struct PeerGroup {
  const std::uintptr_t* data;   // [world]: half 0 of every rank
  const std::uintptr_t* flags;  // [world]: Flags of every rank, behind its data
  int rank;
  int world;  // 2..kMaxWorld
  std::size_t half_bytes;
  int max_blocks;            // agreed by all ranks; every rank must be able to run this many blocks at once
  std::uint64_t timeout_ns;  // of one wait
  void* error;               // ErrorRecord, zero; host memory that the device can write
  void* stream;              // cudaStream_t
};

// The first use of a workspace: zeroes the own Flags and empties the own Lamport buffers. All ranks must have done it
// (stream synchronised, then a barrier) before the first call of any of them.
Status prepare(void* flags, int world, void* stream);

// out = sum over ranks of x: n elements of fp32, bf16 or fp16, all ranks in the same `algorithm`.
// `multicast` is the multicast address of half 0, or null. Refused: messages larger than half_bytes (unless x and out
// are registered) or, for kLamport, than kLamportBytes; multimem without a multicast address or on a GPU below sm_90.
Status all_reduce(Algorithm algorithm, const PeerGroup& group, void* multicast, const void* x, void* out, std::size_t n,
                  DType dtype);

// out_sum = allreduce(x) (+ bias) + residual; out_normed = rms_norm(out_sum, eps) * weight; tensors [rows, width]
// contiguous, bias and weight [width], one dtype.
struct NormArguments {
  const void* x;
  const void* bias;  // or null
  const void* residual;
  const void* weight;
  float eps;
  void* out_normed;
  void* out_sum;  // may equal residual
  std::size_t rows, width;
  // true: rounds to the dtype where all_reduce, + bias, ops.add_rms_norm would; false: fp32 from the sum to each
  // output.
  bool round_before_norm;
  // Two-shot only. false: a rank writes out_sum in the rows it reduces (slice_of(rows, world, rank)) and nowhere else,
  // which is all that the next such call reads of its residual.
  bool gather_sum;
};
// kOneShot, kTwoShot or kLamport; the same bits from each, whatever the number of rows. Refused: rows of more than
// kMaxRowPacks packs; more rows than half_bytes holds (with each row padded to whole packs, twice that if a two-shot
// call gathers the sum and an output is not registered).
Status all_reduce_norm(Algorithm algorithm, const PeerGroup& group, const NormArguments& arguments, DType dtype);

// Functional check of all ordered pairs: every rank stores a pattern to every peer, loads one from every peer, and adds
// to counters of every peer. report[3][world] (device memory) gets the number of wrong words or adds seen by this rank:
// row 0 stores of peer r found here, row 1 loads from peer r, row 2 atomics of peer r found here. `bytes` a pair.
Status check(const PeerGroup& group, std::size_t bytes, std::uint32_t seed, std::uint32_t* report);
constexpr std::size_t check_half_bytes(int world, std::size_t bytes) {
  return (static_cast<std::size_t>(world) + 1) * round_up(bytes, kPackBytes) +
         kMaxBlocks * kMaxWorld * sizeof(std::uint32_t);
}

}  // namespace peer
}  // namespace tpk
