#include "cpu/cpu_ops.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace tpk {
namespace cpu {
namespace {

// Weights that one thread reads between two looks at the shared counter: long enough for the prefetcher to get going,
// short enough that the last chunk of a small matrix does not leave the other threads idle.
constexpr std::ptrdiff_t kChunkBytes = 64 << 10;
// Below this much data one thread is faster than waking another.
constexpr std::ptrdiff_t kInlineBytes = 64 << 10;

// Memory of the calling thread that grows and stays, so that a decode step allocates nothing.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* floats(std::ptrdiff_t n) {
    const std::size_t bytes = (static_cast<std::size_t>(n) * sizeof(float) + 4095) & ~std::size_t{4095};
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ == nullptr ? 0 : bytes;
    }
    return static_cast<float*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

thread_local Scratch scratch;

int table_index(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 0;
    case DType::kBFloat16:
      return 1;
    case DType::kFloat16:
      return 2;
    default:
      return -1;
  }
}

Status bad(const char* op, const std::string& what) {
  return Status::Error(Code::kInvalidArgument, std::string(op) + ": " + what);
}

Status bad_dtype(const char* op, DType dtype) {
  return bad(op, std::string("expected float32, bfloat16 or float16, got ") + name_of(dtype));
}

std::ptrdiff_t round_up(std::ptrdiff_t n, std::ptrdiff_t unit) { return (n + unit - 1) / unit * unit; }

// Rows [0, n) in chunks of about kChunkBytes, each a multiple of `unit` rows.
template <class F>
void for_rows(std::ptrdiff_t n, std::ptrdiff_t row_bytes, std::ptrdiff_t unit, int threads, F&& body) {
  if (threads <= 1 || n * row_bytes < kInlineBytes) {
    body(0, n);
    return;
  }
  std::ptrdiff_t rows =
      round_up(std::max<std::ptrdiff_t>(kChunkBytes / std::max<std::ptrdiff_t>(row_bytes, 1), 1), unit);
  const std::ptrdiff_t fair = round_up((n + threads - 1) / threads, unit);
  rows = std::min(rows, fair);
  parallel_for(threads, (n + rows - 1) / rows,
               [&](std::ptrdiff_t chunk) { body(chunk * rows, std::min(n, (chunk + 1) * rows)); });
}

}  // namespace

Status linear(void* out, const void* x, const void* w, const void* bias, const void* residual, std::ptrdiff_t m,
              std::ptrdiff_t n, std::ptrdiff_t k, std::ptrdiff_t ldx, std::ptrdiff_t ldw, std::ptrdiff_t ldr,
              DType dtype, int activation, bool gated, int threads) {
  const int type = table_index(dtype);
  if (type < 0) return bad_dtype("linear", dtype);
  if (m < 0 || n < 0 || k < 0) return bad("linear", "negative size");
  if (activation < 0 || activation >= kNumActivations) return bad("linear", "unknown activation code");
  if (m == 0 || n == 0) return Status::Ok();
  if (out == nullptr || (k > 0 && (x == nullptr || w == nullptr))) return bad("linear", "null address");
  const Kernels& table = kernels();
  const std::ptrdiff_t element = static_cast<std::ptrdiff_t>(size_of(dtype));
  LinearArgs args{};
  args.x = static_cast<const float*>(x);
  args.ldx = ldx;
  // The kernels read x as aligned fp32 vectors past the end of k: anything else is copied once.
  if (type != 0 || k % 16 != 0 || ldx % 16 != 0 || reinterpret_cast<std::uintptr_t>(x) % 64 != 0) {
    args.ldx = round_up(k, 16);
    float* copy = scratch.floats(m * args.ldx);
    if (copy == nullptr && k > 0) return Status::Error(Code::kNoSpace, "linear: out of memory");
    for (std::ptrdiff_t i = 0; i < m; ++i) {
      table.widen[type](static_cast<const char*>(x) + i * ldx * element, copy + i * args.ldx, k);
      std::fill(copy + i * args.ldx + k, copy + (i + 1) * args.ldx, 0.0f);
    }
    args.x = copy;
  }
  args.w = w;
  args.ldw = ldw;
  args.bias = bias;
  args.residual = residual;
  args.ldr = ldr;
  args.out = out;
  args.ldo = n;
  args.m = m;
  args.n = n;
  args.k = k;
  args.activation = activation;
  args.gated = gated ? 1 : 0;
  for_rows(n, k * element * (gated ? 2 : 1), 16, threads,
           [&](std::ptrdiff_t begin, std::ptrdiff_t end) { table.linear[type](args, begin, end); });
  return Status::Ok();
}

Status rms_norm(void* out, void* sum, const void* x, const void* residual, const void* weight, std::ptrdiff_t rows,
                std::ptrdiff_t width, double eps, DType dtype, int threads) {
  const int type = table_index(dtype);
  if (type < 0) return bad_dtype("rms_norm", dtype);
  if (rows < 0 || width < 0) return bad("rms_norm", "negative size");
  if (rows == 0 || width == 0) return Status::Ok();
  if (out == nullptr || x == nullptr || weight == nullptr || (residual != nullptr && sum == nullptr))
    return bad("rms_norm", "null address");
  const NormArgs args{x, residual, weight, out, sum, width, static_cast<float>(eps)};
  const auto kernel = kernels().norm[type];
  for_rows(rows, width * static_cast<std::ptrdiff_t>(size_of(dtype)), 1, threads,
           [&](std::ptrdiff_t begin, std::ptrdiff_t end) { kernel(args, begin, end); });
  return Status::Ok();
}

Status silu_mul(void* out, const void* in, std::ptrdiff_t rows, std::ptrdiff_t width, DType dtype, int threads) {
  const int type = table_index(dtype);
  if (type < 0) return bad_dtype("silu_mul", dtype);
  if (rows < 0 || width < 0) return bad("silu_mul", "negative size");
  if (rows == 0 || width == 0) return Status::Ok();
  if (out == nullptr || in == nullptr) return bad("silu_mul", "null address");
  const auto kernel = kernels().silu_mul[type];
  for_rows(rows, 2 * width * static_cast<std::ptrdiff_t>(size_of(dtype)), 1, threads,
           [&](std::ptrdiff_t begin, std::ptrdiff_t end) { kernel(in, 2 * width, out, width, begin, end); });
  return Status::Ok();
}

Status qkv_rope_cache(void* q_out, const void* qkv, const float* cos, const float* sin, const std::int64_t* lengths,
                      const std::int64_t* positions, std::ptrdiff_t positions_stride, CacheView k, CacheView v,
                      const void* q_norm, const void* k_norm, double eps, std::ptrdiff_t batch, std::ptrdiff_t tokens,
                      std::ptrdiff_t hq, std::ptrdiff_t hkv, std::ptrdiff_t d, std::ptrdiff_t max_len,
                      std::ptrdiff_t table_rows, DType dtype, int threads) {
  const char* op = "qkv_rope_cache";
  const int type = table_index(dtype);
  if (type < 0) return bad_dtype(op, dtype);
  if (batch < 0 || tokens < 0 || hq < 0 || hkv < 0) return bad(op, "negative size");
  if (d <= 0 || d % 2 != 0 || d > kMaxHeadDim) return bad(op, "head_dim must be even and at most 256");
  if (batch == 0 || tokens == 0 || hq + hkv == 0) return Status::Ok();
  if (qkv == nullptr || cos == nullptr || sin == nullptr || lengths == nullptr || (hq > 0 && q_out == nullptr) ||
      (hkv > 0 && (k.data == nullptr || v.data == nullptr)))
    return bad(op, "null address");
  // Checked before anything is written: a slot behind the cache would be somebody else's memory.
  for (std::ptrdiff_t row = 0; row < batch; ++row) {
    if (lengths[row] < 0 || lengths[row] > max_len - tokens)
      return bad(op, "row " + std::to_string(row) + " holds " + std::to_string(lengths[row]) + " tokens, and " +
                         std::to_string(tokens) + " more do not fit into a cache of " + std::to_string(max_len));
    for (std::ptrdiff_t t = 0; t < tokens; ++t) {
      const std::int64_t position = positions ? positions[row * positions_stride + t] : lengths[row] + t;
      if (position < 0 || position >= table_rows)
        return bad(op, "position " + std::to_string(position) + " is outside the rotary table of " +
                           std::to_string(table_rows) + " rows");
    }
  }
  QkvArgs args{};
  args.qkv = qkv;
  args.ld = (hq + 2 * hkv) * d;
  args.cos = cos;
  args.sin = sin;
  args.ldcos = d;
  args.lengths = lengths;
  args.positions = positions;
  args.positions_stride = positions_stride;
  args.q_out = q_out;
  args.k_cache = k.data;
  args.v_cache = v.data;
  args.k_batch = k.batch_stride;
  args.k_head = k.head_stride;
  args.k_pos = k.position_stride;
  args.v_batch = v.batch_stride;
  args.v_head = v.head_stride;
  args.v_pos = v.position_stride;
  args.q_norm = q_norm;
  args.k_norm = k_norm;
  args.eps = static_cast<float>(eps);
  args.tokens = tokens;
  args.hq = hq;
  args.hkv = hkv;
  args.d = d;
  const auto kernel = kernels().qkv[type];
  for_rows(batch * tokens, args.ld * static_cast<std::ptrdiff_t>(size_of(dtype)), 1, threads,
           [&](std::ptrdiff_t begin, std::ptrdiff_t end) { kernel(args, begin, end); });
  return Status::Ok();
}

Status decode_attention(void* out, const void* q, std::ptrdiff_t q_batch, std::ptrdiff_t q_head, std::ptrdiff_t q_token,
                        CacheView k, CacheView v, const std::int64_t* lengths, std::ptrdiff_t batch,
                        std::ptrdiff_t tokens, std::ptrdiff_t hq, std::ptrdiff_t hkv, std::ptrdiff_t d,
                        std::ptrdiff_t max_len, std::ptrdiff_t window, double scale, DType dtype, int threads) {
  const char* op = "decode_attention";
  const int type = table_index(dtype);
  if (type < 0) return bad_dtype(op, dtype);
  if (batch < 0 || tokens < 0 || hq < 0 || window < 0) return bad(op, "negative size");
  if (hkv <= 0 || hq % hkv != 0) return bad(op, "query heads must be a multiple of KV heads");
  if (d <= 0 || d > kMaxHeadDim) return bad(op, "head_dim must be between 1 and 256");
  if (batch == 0 || tokens == 0 || hq == 0) return Status::Ok();
  if (out == nullptr || q == nullptr || k.data == nullptr || v.data == nullptr || lengths == nullptr)
    return bad(op, "null address");
  std::ptrdiff_t longest = 0, visible = 0;
  for (std::ptrdiff_t row = 0; row < batch; ++row) {
    if (lengths[row] < 0 || lengths[row] > max_len - tokens)
      return bad(op, "row " + std::to_string(row) + " ends at " + std::to_string(lengths[row]) + " + " +
                         std::to_string(tokens) + ", outside a cache of " + std::to_string(max_len));
    const std::ptrdiff_t length = static_cast<std::ptrdiff_t>(lengths[row]) + tokens;
    longest = std::max(longest, length);
    visible += window > 0 ? std::min(length, window + tokens) : length;
  }
  AttentionArgs args{};
  args.q = q;
  args.q_batch = q_batch;
  args.q_head = q_head;
  args.q_token = q_token;
  args.k = k.data;
  args.v = v.data;
  args.k_batch = k.batch_stride;
  args.k_head = k.head_stride;
  args.k_pos = k.position_stride;
  args.v_batch = v.batch_stride;
  args.v_head = v.head_stride;
  args.v_pos = v.position_stride;
  args.lengths = lengths;
  args.out = out;
  args.segments = (longest + kSegment - 1) / kSegment;
  args.d16 = round_up(d, 16);
  args.batch = batch;
  args.hq = hq;
  args.hkv = hkv;
  args.tokens = tokens;
  args.d = d;
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.partial = scratch.floats(batch * hq * tokens * args.segments * (args.d16 + 16));
  if (args.partial == nullptr) return Status::Error(Code::kNoSpace, "decode_attention: out of memory");
  const Kernels& table = kernels();
  // Every query re-reads its segment, so the work grows with the queries as well.
  const std::ptrdiff_t work = visible * 2 * hq * tokens * d * static_cast<std::ptrdiff_t>(size_of(dtype));
  parallel_for(work < kInlineBytes ? 1 : threads, batch * hkv * args.segments, [&](std::ptrdiff_t unit) {
    const std::ptrdiff_t segment = unit % args.segments;
    const std::ptrdiff_t pair = unit / args.segments;
    table.attend[type](args, pair / hkv, pair % hkv, segment);
  });
  if (args.segments > 1)
    for (std::ptrdiff_t pair = 0; pair < batch * hq; ++pair) table.combine[type](args, pair / hq, pair % hq);
  return Status::Ok();
}

std::size_t advise_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHuge = std::uintptr_t{2} << 20;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (data == nullptr || end <= begin) return 0;
  void* inside = reinterpret_cast<void*>(begin);
  if (madvise(inside, end - begin, MADV_HUGEPAGE) != 0) return 0;
  // What is already there is moved now (Linux 6.1); without it khugepaged gets to it some time or never.
  constexpr int kCollapse = 25;
  (void)madvise(inside, end - begin, kCollapse);
  return end - begin;
#else
  (void)data;
  (void)bytes;
  return 0;
#endif
}

float read_floats(const float* data, std::ptrdiff_t n, int threads) {
  if (data == nullptr || n <= 0) return 0.0f;
  constexpr std::ptrdiff_t kChunk = (1 << 20) / sizeof(float);
  std::atomic<float> sum{0.0f};
  parallel_for(threads, (n + kChunk - 1) / kChunk, [&](std::ptrdiff_t chunk) {
    const float part = kernels().read(data, chunk * kChunk, std::min(n, (chunk + 1) * kChunk));
    float before = sum.load(std::memory_order_relaxed);
    while (!sum.compare_exchange_weak(before, before + part, std::memory_order_relaxed)) {
    }
  });
  return sum.load(std::memory_order_relaxed);
}

const char* isa_name() { return kernels().name; }

}  // namespace cpu
}  // namespace tpk
