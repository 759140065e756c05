// All-reduce by multicast addresses (NVLink SHARP): the switch adds, and distributes what is stored. sm_90 and later.
//
// Another numerics class than the other kernels: the switch adds the ranks' values in fp32 in its own order.
#include "kernels/peer_launch.cuh"
#include "kernels/peer_pack.cuh"

namespace tpk {
namespace peer {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline uint4 reduce_load(const char* at, float) {
  uint4 v;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ inline uint4 reduce_load(const char* at, __nv_bfloat16) {
  uint4 v;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ inline uint4 reduce_load(const char* at, __half) {
  uint4 v;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ inline void store_all(char* at, uint4 v) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
#endif

// `multicast` stands for half 0 of all ranks at once. Steps and exchanges are those of the kernels that pull
// (peer_all_reduce.cu); all ranks are in the same call, so the half has the same offset everywhere.
template <class T>
__global__ void __launch_bounds__(512, 1) multimem_kernel(const __grid_constant__ Group g, char* multicast,
                                                          const __grid_constant__ Message m, bool two_shot) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
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
    move_units<8, 1>(
        m.packs, parts, part, false, first, step,
        [&](int, std::size_t i, uint4(&v)[1]) { v[0] = load_elements(x, i * kElements<T>, m.n, m.x_vectors); },
        [&](std::size_t i, uint4(&v)[1]) {
          if (!past.failed) store_pack(own_half + i * kPackBytes, v[0]);
        });
  }
  if (!exchange(g, call, 0, past.failed)) return;

  const char* source = multicast + (m.in.registered ? m.in.offset : half);
  char* target = multicast + (m.to.registered ? m.to.offset : half);
  const Slice mine = slice_of(m.packs, parts, part);
  move_units<4, 1>(
      mine.end - mine.begin, 1, 0, false, first, step,
      [&](int, std::size_t i, uint4(&v)[1]) { v[0] = reduce_load(source + (mine.begin + i) * kPackBytes, T{}); },
      [&](std::size_t i, uint4(&v)[1]) {
        if (two_shot)
          store_all(target + (mine.begin + i) * kPackBytes, v[0]);
        else
          store_elements(out, i * kElements<T>, m.n, m.out_vectors, v[0]);
      });
  if ((two_shot || m.in.registered) && !exchange(g, call, 1, false)) return;
  if (two_shot && !m.to.registered) {
    move_units<8, 1>(
        m.packs, parts, part, false, first, step,
        [&](int, std::size_t i, uint4(&v)[1]) { v[0] = load_shared(own_half + i * kPackBytes); },
        [&](std::size_t i, uint4(&v)[1]) { store_elements(out, i * kElements<T>, m.n, m.out_vectors, v[0]); });
  }
  BlockState next = past.state;
  next.calls = call + 1;
  remember(g, next);
#else
  __trap();  // the launcher refuses such a device
#endif
}

}  // namespace

void launch_multimem(Algorithm algorithm, const Group& group, char* multicast, const Message& message, DType dtype,
                     Shape shape, cudaStream_t stream) {
  const bool two_shot = algorithm == Algorithm::kMultimem;
  const dim3 blocks(shape.blocks), threads(shape.threads);
  if (dtype == DType::kFloat32)
    multimem_kernel<float><<<blocks, threads, 0, stream>>>(group, multicast, message, two_shot);
  else if (dtype == DType::kBFloat16)
    multimem_kernel<__nv_bfloat16><<<blocks, threads, 0, stream>>>(group, multicast, message, two_shot);
  else
    multimem_kernel<__half><<<blocks, threads, 0, stream>>>(group, multicast, message, two_shot);
}

}  // namespace peer
}  // namespace tpk
