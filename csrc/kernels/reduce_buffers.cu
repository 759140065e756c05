// Sum of several device buffers in rank order with fp32 accumulation: the arithmetic of a one-shot all-reduce, and the
// kernel with which the CUDA build path is proven.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/reduce_buffers.h"

namespace tpk {
namespace {

// ---- kernels -------------------------------------------------------------------------------------------------------

struct Addresses {
  const void* of[kMaxReduceBuffers];
};

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T value[kWidth];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, __half* out) { *out = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

template <typename T, int kWidth>
__global__ void reduce_kernel(Addresses inputs, int count, T* out, std::size_t packs) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs; i += stride) {
    float sum[kWidth] = {};
    for (int b = 0; b < count; ++b) {
      const Pack<T, kWidth> pack = static_cast<const Pack<T, kWidth>*>(inputs.of[b])[i];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += to_float(pack.value[k]);
    }
    Pack<T, kWidth> result;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) from_float(sum[k], &result.value[k]);
    reinterpret_cast<Pack<T, kWidth>*>(out)[i] = result;
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

template <typename T, int kWidth>
cudaError_t launch_packs(const Addresses& inputs, int count, T* out, std::size_t packs, cudaStream_t stream) {
  constexpr int kThreads = 256;
  // Enough blocks to fill any GPU several times over; the grid depends on the size only, never on the local SM count.
  const std::size_t blocks = std::min<std::size_t>((packs + kThreads - 1) / kThreads, 4096);
  reduce_kernel<T, kWidth><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(inputs, count, out, packs);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Addresses& inputs, int count, void* out, std::size_t n, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  bool aligned = reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
  for (int b = 0; b < count; ++b) aligned &= reinterpret_cast<std::uintptr_t>(inputs.of[b]) % 16 == 0;
  const std::size_t packs = aligned ? n / kWidth : 0;
  if (packs > 0) {
    const cudaError_t error = launch_packs<T, kWidth>(inputs, count, static_cast<T*>(out), packs, stream);
    if (error != cudaSuccess) return error;
  }
  const std::size_t done = packs * kWidth;
  if (done == n) return cudaSuccess;
  Addresses rest = inputs;
  for (int b = 0; b < count; ++b) rest.of[b] = static_cast<const T*>(inputs.of[b]) + done;
  return launch_packs<T, 1>(rest, count, static_cast<T*>(out) + done, n - done, stream);
}

}  // namespace

Status reduce_buffers(const void* const* inputs, int count, void* out, std::size_t n, DType dtype, void* stream) {
  if (count < 1 || count > kMaxReduceBuffers) {
    return Status::Error(Code::kInvalidArgument, "reduce_buffers: expected 1 to " + std::to_string(kMaxReduceBuffers) +
                                                     " buffers, got " + std::to_string(count));
  }
  if (n == 0) return Status::Ok();
  Addresses addresses{};
  for (int b = 0; b < count; ++b) {
    if (inputs[b] == nullptr) return Status::Error(Code::kInvalidArgument, "reduce_buffers: an input address is null");
    addresses.of[b] = inputs[b];
  }
  if (out == nullptr) return Status::Error(Code::kInvalidArgument, "reduce_buffers: the output address is null");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      error = launch<float>(addresses, count, out, n, cuda_stream);
      break;
    case DType::kBFloat16:
      error = launch<__nv_bfloat16>(addresses, count, out, n, cuda_stream);
      break;
    case DType::kFloat16:
      error = launch<__half>(addresses, count, out, n, cuda_stream);
      break;
    default:
      return Status::Error(Code::kInvalidArgument,
                           std::string("reduce_buffers: expected float32, bfloat16 or float16"));
  }
  if (error != cudaSuccess) {
    return Status::Error(Code::kCuda, std::string("reduce_buffers: ") + cudaGetErrorString(error));
  }
  return Status::Ok();
}

}  // namespace tpk
