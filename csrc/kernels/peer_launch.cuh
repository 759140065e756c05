// What the launchers of the peer-memory kernels share: checks, registered addresses, choice of template.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "kernels/peer_kernels.h"
#include "kernels/peer_sync.cuh"

namespace tpk {
namespace peer {

inline Status invalid(const char* what, const std::string& why) {
  return Status::Error(Code::kInvalidArgument, std::string(what) + ": " + why);
}

inline Status launched(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return Status::Ok();
  return Status::Error(Code::kCuda, std::string(what) + ": " + cudaGetErrorString(error));
}

inline Status check_dtype(const char* what, DType dtype) {
  if (dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16) return Status::Ok();
  return invalid(what, std::string("expected float32, bfloat16 or float16, got ") + name_of(dtype));
}

inline Status check_group(const char* what, const PeerGroup& g) {
  if (g.world < 2 || g.world > kMaxWorld || g.rank < 0 || g.rank >= g.world)
    return invalid(what, "expected 2 to " + std::to_string(kMaxWorld) + " ranks and 0 <= rank < world size, got rank " +
                             std::to_string(g.rank) + " of " + std::to_string(g.world));
  if (g.max_blocks < 1) return invalid(what, "max_blocks must be positive, got " + std::to_string(g.max_blocks));
  if (g.timeout_ns == 0) return invalid(what, "the timeout must be positive");
  if (g.error == nullptr) return invalid(what, "the error record's address is null");
  if (g.half_bytes == 0 || g.half_bytes % kAlignment != 0)
    return invalid(what, "half_bytes must be a positive multiple of " + std::to_string(kAlignment) + ", got " +
                             std::to_string(g.half_bytes));
  for (int r = 0; r < g.world; ++r) {
    const std::string of = " of rank " + std::to_string(r);
    if (g.data[r] == 0 || g.flags[r] == 0) return invalid(what, "an address" + of + " is null");
    if (g.data[r] % 128 != 0) return invalid(what, "the workspace" + of + " is not aligned to 128 bytes");
    if (g.flags[r] < g.data[r] + 2 * g.half_bytes || g.flags[r] - g.data[r] != g.flags[0] - g.data[0])
      return invalid(what, "the flags" + of + " are not where layout_of puts them");
    if ((g.flags[r] - g.data[r]) % kAlignment != 0) return invalid(what, "the flags" + of + " are not aligned");
  }
  return Status::Ok();
}

inline Group group_of(const PeerGroup& g) {
  Group group{};
  for (int r = 0; r < g.world; ++r) {
    group.data[r] = reinterpret_cast<char*>(g.data[r]);
    group.flags[r] = reinterpret_cast<Flags*>(g.flags[r]);
  }
  group.rank = g.rank;
  group.world = g.world;
  group.half_bytes = g.half_bytes;
  group.timeout_ns = g.timeout_ns;
  group.error = static_cast<ErrorRecord*>(g.error);
  return group;
}

// Where a tensor lies in the registered area.
struct Place {
  bool registered = false;
  std::size_t offset = 0;  // from the own data
};

inline Status place_of(const char* what, const PeerGroup& g, const void* tensor, std::size_t bytes, Place* place) {
  const auto address = reinterpret_cast<std::uintptr_t>(tensor);
  const std::uintptr_t begin = g.data[g.rank], end = g.flags[g.rank];
  *place = Place{};
  if (address + bytes <= begin || address >= end + kFlagBytes) return Status::Ok();
  if (address < begin + 2 * g.half_bytes || address + bytes > end)
    return invalid(what, "a tensor lies in the part of the workspace that belongs to the kernels");
  if (address % kPackBytes != 0) return invalid(what, "a registered tensor is not aligned to 16 bytes");
  *place = {true, address - begin};
  return Status::Ok();
}

inline bool is_aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % kPackBytes == 0; }

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <class T>
struct Type {
  using type = T;
};

// call(Type<T>, Constant<kWorld>), where kWorld is 0 for the numbers of ranks that have no kernel of their own.
template <class Call>
void dispatch(DType dtype, int world, Call&& call) {
  const auto with_type = [&](auto type) {
    if (world == 2) return call(type, Constant<2>{});
    if (world == 4) return call(type, Constant<4>{});
    if (world == 8) return call(type, Constant<8>{});
    return call(type, Constant<0>{});
  };
  if (dtype == DType::kFloat32) return with_type(Type<float>{});
  if (dtype == DType::kBFloat16) return with_type(Type<__nv_bfloat16>{});
  return with_type(Type<__half>{});
}

// ---- all-reduce ----------------------------------------------------------------------------------------------------

// Kernel parameter: what is reduced.
struct Message {
  const void* x;
  void* out;
  std::size_t n;
  std::size_t packs;
  Place in, to;
  bool x_vectors, out_vectors;  // addresses allow 16-byte accesses
};

// One per file of kernels; arguments are checked already.
void launch_pull(Algorithm algorithm, const Group& group, const Message& message, DType dtype, Shape shape,
                 cudaStream_t stream);
void launch_multimem(Algorithm algorithm, const Group& group, char* multicast, const Message& message, DType dtype,
                     Shape shape, cudaStream_t stream);
void launch_lamport(const Group& group, const Message& message, DType dtype, Shape shape, cudaStream_t stream);

}  // namespace peer
}  // namespace tpk
