// RMS norm, SwiGLU gate, and what stands between the QKV projection and attention. Included by kernels_*.cpp only.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace tpk {
namespace cpu {
namespace TPK_ISA {

static float read_floats(const float* data, ptrdiff_t begin, ptrdiff_t end) {
  vf sums[8] = {};
  ptrdiff_t i = begin;
  for (; i + 8 * kLanes <= end; i += 8 * kLanes)
    for (int j = 0; j < 8; ++j) sums[j] += load(data + i + j * kLanes);
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  float sum = sum_lanes(sums[0]);
  for (; i < end; ++i) sum += data[i];
  return sum;
}

// 1 / sqrt(mean of squares + eps)
template <class T>
TPK_INLINE float inverse_rms(const T* x, ptrdiff_t width, float eps) {
  vf squares = {};
  for (ptrdiff_t i = 0; i < width; i += kLanes) {
    const vf v = load_upto(x + i, width - i);
    squares += v * v;
  }
  return 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(width) + eps);
}

template <class T>
static void norm_rows(const NormArgs& a, ptrdiff_t begin, ptrdiff_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  for (ptrdiff_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.width;
      T* sum = static_cast<T*>(a.sum) + row * a.width;
      for (ptrdiff_t i = 0; i < a.width; i += kLanes) {
        const ptrdiff_t left = a.width - i;
        store_upto(sum + i, load_upto(x + i, left) + load_upto(residual + i, left), left);
      }
      x = sum;
    }
    const float scale = inverse_rms(x, a.width, a.eps);
    for (ptrdiff_t i = 0; i < a.width; i += kLanes) {
      const ptrdiff_t left = a.width - i;
      const vf normed = round_to(load_upto(x + i, left) * scale, x);
      store_upto(out + i, normed * load_upto(weight + i, left), left);
    }
  }
}

template <class T>
static void silu_mul_rows(const void* in, ptrdiff_t ld, void* out, ptrdiff_t width, ptrdiff_t begin, ptrdiff_t end) {
  for (ptrdiff_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(in) + row * ld;
    T* o = static_cast<T*>(out) + row * width;
    for (ptrdiff_t i = 0; i < width; i += kLanes) {
      const ptrdiff_t left = width - i;
      store_upto(o + i, silu(load_upto(gate + i, left)) * load_upto(gate + width + i, left), left);
    }
  }
}

// One head of one token: optional norm, then x * cos + rotate_half(x) * sin.
template <class T>
TPK_INLINE void rotate_head(const T* x, const T* norm, float eps, const float* cos, const float* sin, ptrdiff_t d,
                            T* out) {
  T normed[kMaxHeadDim + kLanes];
  if (norm) {
    const float scale = inverse_rms(x, d, eps);
    for (ptrdiff_t i = 0; i < d; i += kLanes) {
      const vf v = round_to(load_upto(x + i, d - i) * scale, x);
      store(normed + i, v * load_upto(norm + i, d - i));
    }
    x = normed;
  }
  const ptrdiff_t half = d / 2;
  for (ptrdiff_t i = 0; i < half; i += kLanes) {
    const ptrdiff_t left = half - i;
    const vf low = load_upto(x + i, left), high = load_upto(x + half + i, left);
    store_upto(out + i, low * load_upto(cos + i, left) - high * load_upto(sin + i, left), left);
    store_upto(out + half + i, high * load_upto(cos + half + i, left) + low * load_upto(sin + half + i, left), left);
  }
}

template <class T>
static void qkv_tokens(const QkvArgs& a, ptrdiff_t begin, ptrdiff_t end) {
  for (ptrdiff_t token = begin; token < end; ++token) {
    const ptrdiff_t row = token / a.tokens, t = token % a.tokens;
    const ptrdiff_t slot = a.lengths[row] + t;
    const ptrdiff_t position = a.positions ? a.positions[row * a.positions_stride + t] : slot;
    const float* cos = a.cos + position * a.ldcos;
    const float* sin = a.sin + position * a.ldcos;
    const T* x = static_cast<const T*>(a.qkv) + token * a.ld;
    T* q = static_cast<T*>(a.q_out) + token * a.hq * a.d;
    for (ptrdiff_t h = 0; h < a.hq; ++h)
      rotate_head(x + h * a.d, static_cast<const T*>(a.q_norm), a.eps, cos, sin, a.d, q + h * a.d);
    x += a.hq * a.d;
    T* k = static_cast<T*>(a.k_cache) + row * a.k_batch + slot * a.k_pos;
    for (ptrdiff_t h = 0; h < a.hkv; ++h)
      rotate_head(x + h * a.d, static_cast<const T*>(a.k_norm), a.eps, cos, sin, a.d, k + h * a.k_head);
    x += a.hkv * a.d;
    T* v = static_cast<T*>(a.v_cache) + row * a.v_batch + slot * a.v_pos;
    for (ptrdiff_t h = 0; h < a.hkv; ++h)
      __builtin_memcpy(v + h * a.v_head, x + h * a.d, static_cast<size_t>(a.d) * sizeof(T));
  }
}

}  // namespace TPK_ISA
}  // namespace cpu
}  // namespace tpk
