// One-shot all-reduce of the smallest messages by pushing (Lamport): one trip over the link, no flag and no fence.
#include "kernels/peer_lamport.cuh"
#include "kernels/peer_launch.cuh"

namespace tpk {
namespace peer {
namespace {

template <class T, int kWorld>
__global__ void __launch_bounds__(512, 1)
    lamport_kernel(const __grid_constant__ Group g, const __grid_constant__ Message m) {
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  const T* x = static_cast<const T*>(m.x);
  const auto load = [&](std::size_t i) { return sendable(load_elements(x, i * kElements<T>, m.n, m.x_vectors)); };
  // Before the record of past calls, so that both loads are on their way together.
  const uint4 head = first < m.packs ? load(first) : uint4{};
  const Past past = recall(g);
  const std::uint64_t call = past.state.lamport_calls;
  bool lost = past.failed;
  if (!lost) {
    const int buffer = lamport_buffer(call);
    for (std::size_t i = first; i < m.packs; i += step) push(g, buffer, i, i == first ? head : load(i));
    empty_previous(g, past.state);  // while the peers' data is on its way
    T* out = static_cast<T*>(m.out);
    for (std::size_t i = first; i < m.packs && !lost; i += step) {
      const uint4 own[1] = {i == first ? head : load(i)};
      float sum[1][kElements<T>];
      lost = !receive<T, kWorld, 1, 1>(g, call, i, i + 1, own, sum);
      if (!lost) store_elements(out, i * kElements<T>, m.n, m.out_vectors, packed<T>(sum[0]));
    }
  }
  finish_lamport(g, past.state, m.packs * kPackBytes, lost);
}

}  // namespace

void launch_lamport(const Group& group, const Message& message, DType dtype, Shape shape, cudaStream_t stream) {
  dispatch(dtype, group.world, [&](auto type, auto world) {
    using T = typename decltype(type)::type;
    lamport_kernel<T, decltype(world)::value><<<shape.blocks, shape.threads, 0, stream>>>(group, message);
  });
}

}  // namespace peer
}  // namespace tpk
