// All-reduce + bias + residual + RMSNorm in one kernel, and the entry point of all of them.
//
// One-shot: every rank normalises all rows (decode). Two-shot: a rank reduces and normalises its rows, and the ranks
// exchange the results (prefill): the norm is then done once, not once a rank.
#include "kernels/peer_norm.cuh"

namespace tpk {
namespace peer {
namespace {

// ---- kernels -------------------------------------------------------------------------------------------------------

// Rows are to this kernel what packs are to pull_kernel (peer_all_reduce.cu), which explains the steps.
template <class T, int kWorld, int kPacks, bool kVectors>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    norm_pull_kernel(const __grid_constant__ Group g, const __grid_constant__ NormCall a, bool two_shot) {
  __shared__ float shared[kNormShared<kPacks>];
  RowThreads<kPacks> t(a.row_threads, shared);
  const std::size_t first = t.first_row(), step = t.row_step();
  const int parts = two_shot ? g.world : 1;
  const int part = two_shot ? g.rank : 0;
  const Slice mine = slice_of(a.rows, parts, part);
  const Past past = recall(g);
  const std::uint64_t call = past.state.calls;
  const std::size_t half = half_of(call) * g.half_bytes;
  char* own_half = g.data[g.rank] + half;
  const auto at = [&](std::size_t row, std::size_t pack) { return (row * a.row_packs + pack) * kPackBytes; };
  if (!a.in.registered) {
    move_units<8 / kPacks, kPacks>(
        a.rows, parts, part, false, first, step,
        [&](int, std::size_t row, uint4(&v)[kPacks]) { load_row<T, kPacks, kVectors>(a, t, a.x, row, v); },
        [&](std::size_t row, uint4(&v)[kPacks]) {
#pragma unroll
          for (int k = 0; k < kPacks; ++k)
            if (t.pack(k) < a.row_packs && !past.failed) store_pack(own_half + at(row, t.pack(k)), v[k]);
        });
  }
  // What the first row needs of this rank's own memory comes while the others are waited for.
  const RowConstants<T, kPacks, kVectors> constants(a, t);
  uint4 residual[kPacks];
  std::size_t row = mine.begin + first;
  constexpr bool kAhead = kPacks == 1;  // beyond, its registers are needed for the peers' packs
  if (kAhead && row < mine.end) load_row<T, kPacks, kVectors>(a, t, a.residual, row, residual);
  if (!exchange(g, call, 0, past.failed)) return;

  const Sources<T, kWorld> sources(g, a.in.registered ? a.in.offset : half);
#pragma unroll 1
  for (; row < mine.end; row += step) {
    float v[kPacks][kElements<T>];
    const std::size_t begin = row * a.row_packs;
    sources.template sums<kPacks, t.kStride>(begin + t.pack(0), begin + a.row_packs, v);
    if (!kAhead) load_row<T, kPacks, kVectors>(a, t, a.residual, row, residual);
    // A result goes to its place here and, in two-shot, to all ranks or to where they fetch it.
    const auto keep = [&](void* tensor, const Place& to, std::size_t area, bool gathered, std::size_t pack, uint4 x) {
      store_local<T, kVectors>(a, tensor, row, pack, x);
      if (!two_shot || !gathered) return;
      const std::size_t offset = at(row, pack);
      if (!a.push) return store_pack(own_half + area + offset, x);
      for_each_peer(g, [&](int peer) { store_pack(g.data[peer] + to.offset + offset, x); });
    };
    norm_row<T, kPacks, kVectors>(
        a, t, v, residual, constants,
        [&](std::size_t pack, uint4 x) { keep(a.sum, a.sum_to, a.sum_area, a.gather_sum, pack, x); },
        [&](std::size_t pack, uint4 x) { keep(a.normed, a.normed_to, 0, true, pack, x); });
    if (kAhead && row + step < mine.end) load_row<T, kPacks, kVectors>(a, t, a.residual, row + step, residual);
  }
  if ((two_shot || a.in.registered) && !exchange(g, call, 1, false)) return;
  if (two_shot && !a.push) {
#pragma unroll 1
    for (int result = 0; result <= a.gather_sum; ++result) {
      const std::size_t area = half + (result == 0 ? 0 : a.sum_area);
      void* tensor = result == 0 ? a.normed : a.sum;
      move_units<4 / kPacks, kPacks>(
          a.rows, parts, part, true, first, step,
          [&](int peer, std::size_t r, uint4(&v)[kPacks]) {
#pragma unroll
            for (int k = 0; k < kPacks; ++k)
              if (t.pack(k) < a.row_packs) v[k] = load_shared(g.data[peer] + area + at(r, t.pack(k)));
          },
          [&](std::size_t r, uint4(&v)[kPacks]) {
#pragma unroll
            for (int k = 0; k < kPacks; ++k)
              if (t.pack(k) < a.row_packs) store_local<T, kVectors>(a, tensor, r, t.pack(k), v[k]);
          });
    }
  }
  BlockState next = past.state;
  next.calls = call + 1;
  remember(g, next);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

Status check_arguments(const char* what, Algorithm algorithm, const NormArguments& a, DType dtype) {
  if (algorithm != Algorithm::kOneShot && algorithm != Algorithm::kTwoShot && algorithm != Algorithm::kLamport)
    return invalid(what, "expected algorithm 0 (one-shot), 1 (two-shot) or 3 (Lamport), got " +
                             std::to_string(static_cast<int>(algorithm)));
  Status status = check_dtype(what, dtype);
  if (!status.ok()) return status;
  if (a.rows == 0) return status;
  if (a.width == 0) return invalid(what, "rows have no elements");
  const std::size_t size = size_of(dtype);
  for (const void* tensor :
       {a.x, a.residual, a.weight, static_cast<const void*>(a.out_normed), static_cast<const void*>(a.out_sum)}) {
    if (tensor == nullptr) return invalid(what, "an address of a tensor is null");
    if (reinterpret_cast<std::uintptr_t>(tensor) % size != 0)
      return invalid(what, "a tensor is not aligned to its elements");
  }
  if (reinterpret_cast<std::uintptr_t>(a.bias) % size != 0) return invalid(what, "the bias is not aligned");
  if (a.out_normed == a.out_sum) return invalid(what, "the two outputs are the same tensor");
  const std::size_t limit = algorithm == Algorithm::kLamport ? kMaxLamportRowPacks : kMaxRowPacks;
  if (a.width > limit * kPackBytes / size)
    return invalid(what, "rows of " + std::to_string(a.width) + " elements are too wide; the limit is " +
                             std::to_string(limit * kPackBytes / size));
  if (a.rows > (std::size_t{1} << 35) / size / a.width) return invalid(what, "more than 32 GiB in one call");
  return status;
}

}  // namespace

void launch_norm_pull(const NormLaunch& n) {
  dispatch_norm(n, [&](auto type, auto world, auto packs, auto vectors, const NormCall& call, dim3 threads) {
    // Eight ranks have no pull kernel of their own: all their packs at once would not fit the registers.
    constexpr int kWorld = decltype(world)::value == 8 ? 0 : decltype(world)::value;
    norm_pull_kernel<typename decltype(type)::type, kWorld, decltype(packs)::value, decltype(vectors)::value != 0>
        <<<n.shape.blocks, threads, 0, n.stream>>>(n.group, call, n.algorithm == Algorithm::kTwoShot);
  });
}

Status all_reduce_norm(Algorithm algorithm, const PeerGroup& g, const NormArguments& a, DType dtype) {
  const char* what = "peer all_reduce_norm";
  Status status = check_group(what, g);
  if (!status.ok()) return status;
  status = check_arguments(what, algorithm, a, dtype);
  if (!status.ok() || a.rows == 0) return status;
  const bool two_shot = algorithm == Algorithm::kTwoShot;
  const std::size_t row_bytes = a.width * size_of(dtype);

  NormCall c{};
  c.x = a.x;
  c.bias = a.bias;
  c.residual = a.residual;
  c.weight = a.weight;
  c.normed = a.out_normed;
  c.sum = a.out_sum;
  c.rows = a.rows;
  c.width = a.width;
  c.row_packs = ceil_div(row_bytes, kPackBytes);
  c.eps = a.eps;
  c.round_first = a.round_before_norm;
  c.gather_sum = a.gather_sum;
  bool vectors = row_bytes % kPackBytes == 0;
  for (const void* tensor :
       {a.x, a.bias, a.residual, a.weight, static_cast<const void*>(a.out_normed), static_cast<const void*>(a.out_sum)})
    vectors = vectors && is_aligned(tensor);
  status = place_of(what, g, a.x, a.rows * row_bytes, &c.in);
  if (status.ok()) status = place_of(what, g, a.out_normed, a.rows * row_bytes, &c.normed_to);
  if (status.ok()) status = place_of(what, g, a.out_sum, a.rows * row_bytes, &c.sum_to);
  if (!status.ok()) return status;
  // Peers read rows of x as whole packs; and in one-shot they read all rows, so x may not become an output meanwhile.
  const bool becomes_output = a.x == a.out_normed || a.x == a.out_sum;
  if (row_bytes % kPackBytes != 0 || (!two_shot && becomes_output)) c.in.registered = false;
  c.push = two_shot && row_bytes % kPackBytes == 0 && c.normed_to.registered && (!a.gather_sum || c.sum_to.registered);

  const NormShape shape = norm_shape(algorithm, a.rows, c.row_packs, g.world, g.max_blocks);
  c.row_threads = shape.row_threads;
  const std::size_t bytes = a.rows * c.row_packs * kPackBytes;
  c.sum_area = bytes;
  if (algorithm == Algorithm::kLamport) {
    if (bytes > kLamportBytes) return invalid(what, std::to_string(bytes) + " bytes do not fit the Lamport buffers");
  } else {
    std::size_t staged = c.in.registered ? 0 : bytes;
    if (two_shot && !c.push) staged = a.gather_sum ? 2 * bytes : bytes;
    if (staged > g.half_bytes)
      return invalid(what, std::to_string(staged) + " bytes do not fit the staging half of " +
                               std::to_string(g.half_bytes) + " bytes");
  }
  const NormLaunch launch{algorithm, group_of(g), c, shape, dtype, vectors, static_cast<cudaStream_t>(g.stream)};
  if (algorithm == Algorithm::kLamport)
    launch_norm_lamport(launch);
  else
    launch_norm_pull(launch);
  return launched(what);
}

}  // namespace peer
}  // namespace tpk
