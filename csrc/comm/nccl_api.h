// The part of NCCL's binary interface that is used here, declared anew so that no NCCL header is needed to build.
// Values and layouts have not changed since 2.18; nccl_library.cpp refuses anything older.
#pragma once

#include <climits>
#include <cstddef>

namespace tpk::nccl {

using Comm = void*;
using Stream = void*;  // cudaStream_t

struct UniqueId {
  char bytes[128];
};

// ncclResult_t
enum Result : int {
  kSuccess = 0,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

// ncclDataType_t. tp_kernels/comm/nccl.py has the twin of this table.
enum DataType : int {
  kInt8 = 0,
  kUint8 = 1,
  kInt32 = 2,
  kUint32 = 3,
  kInt64 = 4,
  kUint64 = 5,
  kFloat16 = 6,
  kFloat32 = 7,
  kFloat64 = 8,
  kBfloat16 = 9,
  kFloat8e4m3 = 10,  // these two since 2.24
  kFloat8e5m2 = 11,
};
constexpr int kNumDataTypes = 12;
constexpr int kFirstVersionWithFloat8 = 22400;

constexpr std::size_t bytes_of(DataType type) {
  switch (type) {
    case kInt8:
    case kUint8:
    case kFloat8e4m3:
    case kFloat8e5m2:
      return 1;
    case kFloat16:
    case kBfloat16:
      return 2;
    case kInt32:
    case kUint32:
    case kFloat32:
      return 4;
    case kInt64:
    case kUint64:
    case kFloat64:
      return 8;
  }
  return 0;
}

// ncclRedOp_t
enum RedOp : int { kSum = 0, kMax = 2 };

constexpr int kUndefined = INT_MIN;

// ncclConfig_t as of 2.18. A library reads `size` bytes of it and gives members that came after `version` their
// defaults, so newer ones accept it. The last member lies where newer layouts have trafficClass: undefined there too,
// whatever a library makes of the bytes between the end of the old struct and its size.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = kUndefined;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
  int padding = kUndefined;
};
static_assert(sizeof(Config) == 48 && offsetof(Config, blocking) == 16 && offsetof(Config, net_name) == 32 &&
              offsetof(Config, split_share) == 40);

// Entry points; names as in NCCL without the prefix. Those of the last block are null where the library lacks them.
struct Functions {
  Result (*GetVersion)(int*);
  Result (*GetUniqueId)(UniqueId*);
  Result (*CommInitRankConfig)(Comm*, int, UniqueId, int, Config*);
  Result (*CommFinalize)(Comm);
  Result (*CommDestroy)(Comm);
  Result (*CommAbort)(Comm);
  Result (*CommGetAsyncError)(Comm, Result*);
  const char* (*GetErrorString)(Result);
  const char* (*GetLastError)(Comm);
  Result (*AllReduce)(const void*, void*, std::size_t, DataType, RedOp, Comm, Stream);
  Result (*ReduceScatter)(const void*, void*, std::size_t, DataType, RedOp, Comm, Stream);
  Result (*AllGather)(const void*, void*, std::size_t, DataType, Comm, Stream);
  Result (*Broadcast)(const void*, void*, std::size_t, DataType, int, Comm, Stream);
  Result (*Reduce)(const void*, void*, std::size_t, DataType, RedOp, int, Comm, Stream);
  Result (*GroupStart)();
  Result (*GroupEnd)();
  Result (*MemAlloc)(void**, std::size_t);  // these four since 2.19
  Result (*MemFree)(void*);
  Result (*CommRegister)(Comm, void*, std::size_t, void**);
  Result (*CommDeregister)(Comm, void*);
  Result (*CommWindowRegister)(Comm, void*, std::size_t, void**, int);  // these two since 2.27
  Result (*CommWindowDeregister)(Comm, void*);
};

}  // namespace tpk::nccl
