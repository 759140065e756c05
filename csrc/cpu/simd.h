// Sixteen fp32 lanes in GCC/Clang vector extensions: one zmm, two ymm or four xmm/NEON registers, by the flags of the
// including file. Lanes and order of summation are the same for every instruction set.
//
// Included only by kernels_*.cpp, each compiled for another instruction set: everything here is forced inline, and no
// standard header with inline functions is used, because the linker keeps one copy of those and it might be the AVX-512
// one.
#pragma once

#include <stddef.h>
#include <stdint.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define TPK_INLINE static inline __attribute__((always_inline))

namespace tpk {
namespace cpu {
namespace TPK_ISA {

typedef float vf __attribute__((vector_size(64), aligned(64)));
typedef int32_t vi __attribute__((vector_size(64), aligned(64)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(64)));
typedef uint16_t vh __attribute__((vector_size(32), aligned(32)));
// The same, at any address.
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int kLanes = 16;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

TPK_INLINE vf splat(float value) { return vf{} + value; }
// A select on the sign of a comparison result, bit by bit: what a ternary on vectors does, also in older compilers.
TPK_INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

TPK_INLINE vf widen(vh half, bf16) { return (vf)(__builtin_convertvector(half, vu) << 16); }

TPK_INLINE vf widen(vh half, f16) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)half);
#else
  const vu h = __builtin_convertvector(half, vu);
  // Exponent and mantissa moved into place and rebiased by a multiplication, which also gets subnormals right.
  const vf magic = (vf)(vu{} + 0x77800000u);  // 2^112
  vf value = (vf)((h & 0x7fffu) << 13) * magic;
  const vi special = (vi)((h & 0x7c00u) == 0x7c00u);
  value = (vf)((vi)value | (special & 0x7f800000));
  return (vf)((vu)value | ((h & 0x8000u) << 16));
#endif
}

TPK_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
TPK_INLINE vf load(const bf16* p) { return widen((vh) * reinterpret_cast<const vh_any*>(p), bf16{}); }
TPK_INLINE vf load(const f16* p) { return widen((vh) * reinterpret_cast<const vh_any*>(p), f16{}); }

TPK_INLINE void store(float* p, vf value) { *reinterpret_cast<vf_any*>(p) = value; }

TPK_INLINE void store(bf16* p, vf value) {
  const vu bits = (vu)value;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const vu quiet = (bits >> 16) | 0x40u;                            // NaN stays NaN: rounding could carry it into inf
  const vu nan = (vu)(value != value);
  *reinterpret_cast<vh_any*>(p) = __builtin_convertvector((quiet & nan) | (rounded & ~nan), vh);
}

TPK_INLINE uint16_t to_half_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to inf
  if (bits < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the mantissa aligned to 2^-24 and rounded to nearest even by the adder itself.
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t aligned;
    __builtin_memcpy(&aligned, &magnitude, 4);
    return static_cast<uint16_t>(sign | (aligned - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

TPK_INLINE void store(f16* p, vf value) {
#if defined(__AVX512F__)
  *reinterpret_cast<vh_any*>(p) = (vh)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = to_half_bits(value[i]);
#endif
}

// Partial vectors: lanes from n on are zero, memory behind them is not touched.
template <class T>
TPK_INLINE vf load_part(const T* p, int n) {
  T buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
TPK_INLINE void store_part(T* p, vf value, int n) {
  T buffer[kLanes];
  store(buffer, value);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class T>
TPK_INLINE vf load_upto(const T* p, ptrdiff_t n) {
  return n >= kLanes ? load(p) : load_part(p, static_cast<int>(n));
}

template <class T>
TPK_INLINE void store_upto(T* p, vf value, ptrdiff_t n) {
  if (n >= kLanes) {
    store(p, value);
  } else {
    store_part(p, value, static_cast<int>(n));
  }
}

// value as it reads back after a round trip through T.
template <class T>
TPK_INLINE vf round_to(vf value, const T*) {
  T buffer[kLanes];
  store(buffer, value);
  return load(buffer);
}
TPK_INLINE vf round_to(vf value, const float*) { return value; }

#if defined(__clang__)
#define TPK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TPK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})  // GCC has the other one only from 12 on
#endif

// Sums of the lanes of sixteen vectors, one sum a lane. Every sum is the same tree, (lane j + lane j+8), then 4, 2, 1,
// whatever its neighbours are.
#define TPK_FOLD8(a, b)                                                        \
  (TPK_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + \
   TPK_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define TPK_FOLD4(a, b)                                                          \
  (TPK_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) + \
   TPK_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#define TPK_FOLD2(a, b)                                                          \
  (TPK_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) + \
   TPK_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define TPK_FOLD1(a, b)                                                           \
  (TPK_SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) + \
   TPK_SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))

TPK_INLINE vf sum_lanes(const vf* v) {
  vf eight[8];
  for (int i = 0; i < 8; ++i) eight[i] = TPK_FOLD8(v[i], v[i + 8]);
  vf four[4];
  for (int i = 0; i < 4; ++i) four[i] = TPK_FOLD4(eight[i], eight[i + 4]);
  const vf two0 = TPK_FOLD2(four[0], four[2]);
  const vf two1 = TPK_FOLD2(four[1], four[3]);
  return TPK_FOLD1(two0, two1);
}

TPK_INLINE float sum_lanes(vf v) {
  vf s = TPK_FOLD8(v, v);
  s = TPK_FOLD4(s, s);
  s = TPK_FOLD2(s, s);
  s = TPK_FOLD1(s, s);
  return s[0];
}

// exp with at most 2 ulp of error; inf, 0 and NaN where they belong. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
TPK_INLINE vf exp(vf x) {
  const vf high = splat(89.0f), low = splat(-104.0f);
  x = select((vi)(x > high), high, x);  // written so that NaN passes
  x = select((vi)(x < low), low, x);
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vf biased = x * 1.44269504088896341f + shifter;
  const vi n = (vi)biased - (vi)shifter;
  const vf nf = biased - shifter;
  vf r = x - nf * 0.693359375f;
  r = r - nf * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Two factors, since 2^128 and 2^-149 are no normal floats.
  const vi half = n >> 1;
  const vf scale0 = (vf)((half + 127) << 23);
  const vf scale1 = (vf)((n - half + 127) << 23);
  return p * scale0 * scale1;
}

TPK_INLINE vf silu(vf x) { return x / (exp(-x) + 1.0f); }

}  // namespace TPK_ISA
}  // namespace cpu
}  // namespace tpk
