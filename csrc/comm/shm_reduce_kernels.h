// Body of the reduction kernels; included by one .cpp per instruction set, after every other header, inside a region
// compiled for that set. TPK_ISA names the namespace, TPK_LEVEL is 0 (baseline), 2 (AVX2 + F16C) or 3 (AVX-512).
//
// Nothing here may instantiate an inline function of a standard header: the linker would keep one copy for the whole
// library, perhaps the one with AVX-512 in it, and a baseline processor would fault on it.

namespace tpk {
namespace TPK_ISA {

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

template <class To, class From>
static inline To bits_as(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Each dtype: storage type, accumulator, and the way between them.
struct Float32 {
  typedef float Storage;
  typedef float Acc;
  static inline Acc load(Storage x) { return x; }
  static inline Storage store(Acc x) { return x; }
};
struct Float64 {
  typedef double Storage;
  typedef double Acc;
  static inline Acc load(Storage x) { return x; }
  static inline Storage store(Acc x) { return x; }
};
struct Int32 {
  typedef int Storage;
  typedef int Acc;
  static inline Acc load(Storage x) { return x; }
  static inline Storage store(Acc x) { return x; }
};
struct Int64 {
  typedef long long Storage;
  typedef long long Acc;
  static inline Acc load(Storage x) { return x; }
  static inline Storage store(Acc x) { return x; }
};
struct BFloat16 {
  typedef u16 Storage;
  typedef float Acc;
  static inline Acc load(Storage x) { return bits_as<float>(static_cast<u32>(x) << 16); }
  // Round to nearest even; NaN becomes torch's 0x7fc0.
  static inline Storage store(Acc x) {
    const u32 bits = bits_as<u32>(x);
    const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<u16>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};
struct Float16 {
  typedef u16 Storage;
  typedef float Acc;
#if defined(__aarch64__)
  static inline Acc load(Storage x) { return static_cast<float>(bits_as<__fp16>(x)); }
  static inline Storage store(Acc x) { return bits_as<u16>(static_cast<__fp16>(x)); }
#else
  // Branchless, so that the loop vectorises on processors without a conversion instruction.
  static inline Acc load(Storage x) {
    const u32 sign = static_cast<u32>(x & 0x8000u) << 16;
    const u32 body = static_cast<u32>(x & 0x7fffu) << 13;
    const u32 exponent = body & 0x0f800000u;
    // Normal: rebias. Inf/NaN: rebias twice. Subnormal: let the float unit renormalise it (exact).
    const u32 normal = body + (112u << 23);
    const u32 special = body + (224u << 23);
    const u32 subnormal = bits_as<u32>(bits_as<float>(body + (113u << 23)) - bits_as<float>(113u << 23));
    const u32 magnitude = exponent == 0x0f800000u ? special : (exponent == 0u ? subnormal : normal);
    return bits_as<float>(magnitude | sign);
  }
  static inline Storage store(Acc x) {
    const u32 bits = bits_as<u32>(x);
    const u32 sign = (bits >> 16) & 0x8000u;
    const u32 body = bits & 0x7fffffffu;
    // Rounds to nearest even: normals by integer arithmetic, subnormals by adding 0.5, whose last bit is 2^-24.
    const u32 normal = (body - (112u << 23) + 0xfffu + ((body >> 13) & 1u)) >> 13;
    const u32 subnormal = bits_as<u32>(bits_as<float>(body) + 0.5f) - 0x3f000000u;
    const u32 nan = 0x7e00u;
    u32 half = body < (113u << 23) ? subnormal : normal;
    half = body >= 0x47800000u ? 0x7c00u : half;
    half = body > 0x7f800000u ? nan : half;
    return static_cast<u16>(half | sign);
  }
#endif
};

struct Sum {
  static inline float combine(float a, float b) { return a + b; }
  static inline double combine(double a, double b) { return a + b; }
  // Unsigned inside: an overflowing sum wraps instead of being undefined.
  static inline int combine(int a, int b) { return static_cast<int>(static_cast<u32>(a) + static_cast<u32>(b)); }
  static inline long long combine(long long a, long long b) {
    return static_cast<long long>(static_cast<u64>(a) + static_cast<u64>(b));
  }
};
struct Max {
  // !(b <= a) is true for a larger b and for a NaN on either side; a NaN in a is then kept by the second choice.
  template <class F>
  static inline F of_float(F a, F b) {
    const F larger = !(b <= a) ? b : a;
    return a != a ? a : larger;
  }
  static inline float combine(float a, float b) { return of_float(a, b); }
  static inline double combine(double a, double b) { return of_float(a, b); }
  static inline int combine(int a, int b) { return b > a ? b : a; }
  static inline long long combine(long long a, long long b) { return b > a ? b : a; }
};

#if defined(__clang__)
#define TPK_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define TPK_VECTORIZE _Pragma("GCC ivdep")
#endif

// Accumulators of one block stay in the first-level cache while source after source is added to them.
static const size_t kBlock = 1024;

template <class D, class Op>
static inline void add_source(typename D::Acc* acc, const typename D::Storage* src, size_t n) {
  TPK_VECTORIZE
  for (size_t i = 0; i < n; ++i) acc[i] = Op::combine(acc[i], D::load(src[i]));
}

template <class D, class Op>
static void reduce_range(typename D::Storage* dst, const typename D::Storage* const* src, int num_src, size_t begin,
                         size_t n) {
  const typename D::Storage* a = src[0] + begin;
  if (num_src == 1) {
    __builtin_memmove(dst, a, n * sizeof(*dst));
    return;
  }
  const typename D::Storage* b = src[1] + begin;
  if (num_src == 2) {
    TPK_VECTORIZE
    for (size_t i = 0; i < n; ++i) dst[i] = D::store(Op::combine(D::load(a[i]), D::load(b[i])));
    return;
  }
  const typename D::Storage* c = src[2] + begin;
  if (num_src == 3) {
    TPK_VECTORIZE
    for (size_t i = 0; i < n; ++i)
      dst[i] = D::store(Op::combine(Op::combine(D::load(a[i]), D::load(b[i])), D::load(c[i])));
    return;
  }
  const typename D::Storage* d = src[3] + begin;
  if (num_src == 4) {
    TPK_VECTORIZE
    for (size_t i = 0; i < n; ++i)
      dst[i] =
          D::store(Op::combine(Op::combine(Op::combine(D::load(a[i]), D::load(b[i])), D::load(c[i])), D::load(d[i])));
    return;
  }
  alignas(64) typename D::Acc acc[kBlock];
  for (size_t at = 0; at < n; at += kBlock) {
    const size_t m = n - at < kBlock ? n - at : kBlock;
    TPK_VECTORIZE
    for (size_t i = 0; i < m; ++i)
      acc[i] = Op::combine(Op::combine(Op::combine(D::load(a[at + i]), D::load(b[at + i])), D::load(c[at + i])),
                           D::load(d[at + i]));
    for (int r = 4; r < num_src; ++r) add_source<D, Op>(acc, src[r] + begin + at, m);
    TPK_VECTORIZE
    for (size_t i = 0; i < m; ++i) dst[at + i] = D::store(acc[i]);
  }
}

#if TPK_LEVEL >= 2
// GCC does not vectorise half <-> float, so float16 is written out: kHalf elements a step, a padded step at the end.
// 256 bits at both levels: these loops wait for memory, not for the conversion.
typedef __m256 VecF;
static const size_t kHalf = 8;
static inline VecF load_half(const u16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store_half(u16* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline VecF combine_half(VecF a, VecF b, Sum) { return _mm256_add_ps(a, b); }
static inline VecF combine_half(VecF a, VecF b, Max) {
  const VecF larger = _mm256_blendv_ps(a, b, _mm256_cmp_ps(b, a, _CMP_NLE_UQ));
  return _mm256_blendv_ps(larger, a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

template <class Op>
static void reduce_half(u16* dst, const u16* const* src, int num_src, size_t begin, size_t n) {
  size_t i = 0;
  for (; i + kHalf <= n; i += kHalf) {
    VecF acc = load_half(src[0] + begin + i);
    for (int r = 1; r < num_src; ++r) acc = combine_half(acc, load_half(src[r] + begin + i), Op());
    store_half(dst + i, acc);
  }
  if (i == n) return;
  const size_t rest = n - i;
  u16 padded[kHalf] = {};
  __builtin_memcpy(padded, src[0] + begin + i, rest * 2);
  VecF acc = load_half(padded);
  for (int r = 1; r < num_src; ++r) {
    __builtin_memcpy(padded, src[r] + begin + i, rest * 2);
    acc = combine_half(acc, load_half(padded), Op());
  }
  store_half(padded, acc);
  __builtin_memcpy(dst + i, padded, rest * 2);
}
template <>
void reduce_range<Float16, Sum>(u16* dst, const u16* const* src, int num_src, size_t begin, size_t n) {
  reduce_half<Sum>(dst, src, num_src, begin, n);
}
template <>
void reduce_range<Float16, Max>(u16* dst, const u16* const* src, int num_src, size_t begin, size_t n) {
  reduce_half<Max>(dst, src, num_src, begin, n);
}
#endif

#if TPK_LEVEL >= 3
typedef __m512i VecI;
static inline VecI load_vec(const void* p) { return _mm512_loadu_si512(p); }
static inline void stream_vec(void* p, VecI v) { _mm512_stream_si512(static_cast<VecI*>(p), v); }
#elif TPK_LEVEL >= 2
typedef __m256i VecI;
static inline VecI load_vec(const void* p) { return _mm256_loadu_si256(static_cast<const VecI*>(p)); }
static inline void stream_vec(void* p, VecI v) { _mm256_stream_si256(static_cast<VecI*>(p), v); }
#endif

// Streaming stores need aligned addresses: the unaligned ends go through memcpy.
static void copy_streaming(void* dst, const void* src, size_t bytes) {
#if TPK_LEVEL >= 2
  char* d = static_cast<char*>(dst);
  const char* s = static_cast<const char*>(src);
  size_t i = (64 - (reinterpret_cast<u64>(d) & 63)) & 63;
  if (i > bytes) i = bytes;
  __builtin_memcpy(d, s, i);
  const size_t step = sizeof(VecI);
  for (; i + 4 * step <= bytes; i += 4 * step) {
    const VecI v0 = load_vec(s + i), v1 = load_vec(s + i + step);
    const VecI v2 = load_vec(s + i + 2 * step), v3 = load_vec(s + i + 3 * step);
    stream_vec(d + i, v0);
    stream_vec(d + i + step, v1);
    stream_vec(d + i + 2 * step, v2);
    stream_vec(d + i + 3 * step, v3);
  }
  __builtin_memcpy(d + i, s + i, bytes - i);
  _mm_sfence();  // orders them before the flag that publishes the data
#else
  __builtin_memcpy(dst, src, bytes);
#endif
}

template <class D, class Op>
static void reduce(void* dst, const void* const* src, int num_src, size_t count) {
  typedef typename D::Storage S;
  reduce_range<D, Op>(static_cast<S*>(dst), reinterpret_cast<const S* const*>(src), num_src, 0, count);
}

// A block is reduced into the first-level cache and leaves it by streaming stores.
template <class D, class Op>
static void reduce_streaming(void* dst, const void* const* src, int num_src, size_t count) {
  typedef typename D::Storage S;
  alignas(64) S block[8192 / sizeof(S)];
  const size_t step = sizeof(block) / sizeof(S);
  for (size_t at = 0; at < count; at += step) {
    const size_t n = count - at < step ? count - at : step;
    reduce_range<D, Op>(block, reinterpret_cast<const S* const*>(src), num_src, at, n);
    copy_streaming(static_cast<S*>(dst) + at, block, n * sizeof(S));
  }
}

// In the order of the codes in common/dtype.h.
#define TPK_TABLE(fn)                                                                                                 \
  {                                                                                                                   \
    {fn<Float32, Sum>, fn<Float32, Max>}, {fn<BFloat16, Sum>, fn<BFloat16, Max>},                                     \
        {fn<Float16, Sum>, fn<Float16, Max>}, {fn<Float64, Sum>, fn<Float64, Max>}, {fn<Int32, Sum>, fn<Int32, Max>}, \
    {                                                                                                                 \
      fn<Int64, Sum>, fn<Int64, Max>                                                                                  \
    }                                                                                                                 \
  }
static const ReduceKernels kKernels = {TPK_ISA_NAME, TPK_TABLE(reduce), TPK_TABLE(reduce_streaming), copy_streaming};
#undef TPK_TABLE

}  // namespace TPK_ISA
}  // namespace tpk
