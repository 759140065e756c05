// One-shot and two-shot all-reduce by reading the peers' memory, and the entry point of all all-reduces.
#include "kernels/peer_launch.cuh"
#include "kernels/peer_pack.cuh"

namespace tpk {
namespace peer {
namespace {

// ---- kernels -------------------------------------------------------------------------------------------------------

constexpr int kThreads = 512;

// One-shot is the case of one slice that every rank reduces for itself; in two-shot, rank r reduces slice r. Positions
// within a slice are dealt to threads, and a block takes its positions in all slices: so it depends on the blocks of
// the same index only. A reduced slice goes to the registered outputs of all ranks, or it replaces the own copy in the
// own half (which nobody else reads there) and is fetched by the peers.
template <class T, int kWorld>
__global__ void __launch_bounds__(kThreads, 1)
    pull_kernel(const __grid_constant__ Group g, const __grid_constant__ Message m, bool two_shot) {
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  const int parts = two_shot ? g.world : 1;
  const int part = two_shot ? g.rank : 0;
  const T* x = static_cast<const T*>(m.x);
  T* out = static_cast<T*>(m.out);
  const Past past = recall(g);
  const std::uint64_t call = past.state.calls;
  const std::size_t half = half_of(call) * g.half_bytes;
  char* own_half = g.data[g.rank] + half;
  if (!m.in.registered) {
    // Only the stores depend on the record of past calls, so that its load and those of x are on their way together.
    move_units<8, 1>(
        m.packs, parts, part, false, first, step,
        [&](int, std::size_t i, uint4(&v)[1]) { v[0] = load_elements(x, i * kElements<T>, m.n, m.x_vectors); },
        [&](std::size_t i, uint4(&v)[1]) {
          if (!past.failed) store_pack(own_half + i * kPackBytes, v[0]);
        });
  }
  if (!exchange(g, call, 0, past.failed)) return;

  const Sources<T, kWorld> sources(g, m.in.registered ? m.in.offset : half);
  const Slice mine = slice_of(m.packs, parts, part);
  sources.for_each(mine.begin + first, step, mine.end, [&](std::size_t i, const float (&sum)[kElements<T>]) {
    const uint4 pack = packed<T>(sum);
    store_elements(out, i * kElements<T>, m.n, m.out_vectors, pack);
    if (!two_shot) return;
    if (!m.to.registered) return store_pack(own_half + i * kPackBytes, pack);
    for_each_peer(g, [&](int peer) {
      T* theirs = reinterpret_cast<T*>(g.data[peer] + m.to.offset);
      store_elements(theirs, i * kElements<T>, m.n, true, pack);
    });
  });
  // For two-shot: the slices are there. For one-shot of a registered x: what follows on this stream may overwrite x.
  if ((two_shot || m.in.registered) && !exchange(g, call, 1, false)) return;
  if (two_shot && !m.to.registered) {
    move_units<8, 1>(
        m.packs, parts, part, true, first, step,
        [&](int peer, std::size_t i, uint4(&v)[1]) { v[0] = load_shared(g.data[peer] + half + i * kPackBytes); },
        [&](std::size_t i, uint4(&v)[1]) { store_elements(out, i * kElements<T>, m.n, m.out_vectors, v[0]); });
  }
  BlockState next = past.state;
  next.calls = call + 1;
  remember(g, next);
}

__global__ void prepare_kernel(std::uint32_t* flags, std::size_t flag_words, std::size_t words) {
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += step)
    flags[i] = i < flag_words ? 0u : kEmptyWord;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

void launch_pull(Algorithm algorithm, const Group& group, const Message& message, DType dtype, Shape shape,
                 cudaStream_t stream) {
  dispatch(dtype, group.world, [&](auto type, auto world) {
    using T = typename decltype(type)::type;
    constexpr int kWorld = decltype(world)::value;
    const bool two_shot = algorithm == Algorithm::kTwoShot;
    pull_kernel<T, kWorld><<<shape.blocks, shape.threads, 0, stream>>>(group, message, two_shot);
  });
}

Status prepare(void* flags, int world, void* stream) {
  if (flags == nullptr) return invalid("peer prepare", "the flags' address is null");
  if (world < 2 || world > kMaxWorld) return invalid("peer prepare", "unsupported number of ranks");
  const std::size_t bytes = kFlagBytes + kLamportBuffers * static_cast<std::size_t>(world) * kLamportBytes;
  prepare_kernel<<<64, 512, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<std::uint32_t*>(flags), kFlagBytes / sizeof(std::uint32_t), bytes / sizeof(std::uint32_t));
  return launched("peer prepare");
}

Status all_reduce(Algorithm algorithm, const PeerGroup& g, void* multicast, const void* x, void* out, std::size_t n,
                  DType dtype) {
  const char* what = "peer all_reduce";
  const int code = static_cast<int>(algorithm);
  if (code < 0 || code >= kNumAlgorithms) return invalid(what, "unknown algorithm " + std::to_string(code));
  Status status = check_group(what, g);
  if (!status.ok()) return status;
  status = check_dtype(what, dtype);
  if (!status.ok()) return status;
  if (n == 0) return Status::Ok();
  if (x == nullptr || out == nullptr) return invalid(what, "an address of a tensor is null");
  const std::size_t size = size_of(dtype);
  if (reinterpret_cast<std::uintptr_t>(x) % size != 0 || reinterpret_cast<std::uintptr_t>(out) % size != 0)
    return invalid(what, "a tensor is not aligned to its elements");
  if (n > (std::size_t{1} << 35) / size) return invalid(what, "more than 32 GiB in one call");
  const std::size_t bytes = n * size;

  Message m{};
  m.x = x;
  m.out = out;
  m.n = n;
  m.packs = ceil_div(bytes, kPackBytes);
  m.x_vectors = is_aligned(x);
  m.out_vectors = is_aligned(out);
  status = place_of(what, g, x, bytes, &m.in);
  if (!status.ok()) return status;
  status = place_of(what, g, out, bytes, &m.to);
  if (!status.ok()) return status;
  if (out != x && reinterpret_cast<std::uintptr_t>(x) < reinterpret_cast<std::uintptr_t>(out) + bytes &&
      reinterpret_cast<std::uintptr_t>(out) < reinterpret_cast<std::uintptr_t>(x) + bytes)
    return invalid(what, "out overlaps x; it may only equal it");
  // Written while peers still read x: not with every rank reading all of it.
  if (!splits_slices(algorithm) && out == x) m.in.registered = false;
  // The switch writes whole packs; a message that ends inside one goes through the half.
  if (algorithm == Algorithm::kMultimem && bytes % kPackBytes != 0) m.to.registered = false;
  if (algorithm == Algorithm::kMultimem && out == x && !m.to.registered) m.in.registered = false;

  const Shape shape = all_reduce_shape(algorithm, bytes, g.world, g.max_blocks);
  const auto stream = static_cast<cudaStream_t>(g.stream);
  if (algorithm == Algorithm::kLamport) {
    if (bytes > kLamportBytes)
      return invalid(what, std::to_string(bytes) + " bytes do not fit the Lamport buffers of " +
                               std::to_string(kLamportBytes) + " bytes");
    launch_lamport(group_of(g), m, dtype, shape, stream);
    return launched(what);
  }
  const bool stages = !m.in.registered || (splits_slices(algorithm) && !m.to.registered);
  if (stages && bytes > g.half_bytes)
    return invalid(what, std::to_string(bytes) + " bytes do not fit the staging half of " +
                             std::to_string(g.half_bytes) + " bytes");
  if (!uses_multicast(algorithm)) {
    launch_pull(algorithm, group_of(g), m, dtype, shape, stream);
    return launched(what);
  }
  if (multicast == nullptr || !is_aligned(multicast))
    return invalid(what, "the multimem algorithms need a multicast address aligned to 16 bytes");
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
    return launched(what);
  if (major < 9) return invalid(what, "the multimem algorithms need compute capability 9.0 or more");
  launch_multimem(algorithm, group_of(g), static_cast<char*>(multicast), m, dtype, shape, stream);
  return launched(what);
}

}  // namespace peer
}  // namespace tpk
