// Attention of few queries over a KV cache, in segments of kSegment positions. Included by kernels_*.cpp only.
//
// Segments start at multiples of kSegment whatever the lengths and threads are, each gives (max, sum, weighted values),
// and they are put together in order: the same bits for any number of threads and any neighbours in the batch.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace tpk {
namespace cpu {
namespace TPK_ISA {

constexpr int kChunks = 4;  // vectors of the head dimension summed side by side

// scores[g * kSegment + j] = q[g] . k[j] * scale for n keys
template <class T, int G>
TPK_INLINE void score_keys(const float* q, ptrdiff_t ldq, const T* k, ptrdiff_t ldk, ptrdiff_t n, ptrdiff_t d,
                           float scale, float* scores) {
  vf part[G][kLanes];
  for (ptrdiff_t j = 0; j < n; j += kLanes) {
    const int keys = n - j < kLanes ? static_cast<int>(n - j) : kLanes;
    for (int i = 0; i < keys; ++i) {
      const T* key = k + (j + i) * ldk;
      vf acc[G];
      for (int g = 0; g < G; ++g) acc[g] = vf{};
      for (ptrdiff_t c = 0; c < d; c += kLanes) {
        const vf kv = load_upto(key + c, d - c);
        for (int g = 0; g < G; ++g) acc[g] += load(q + g * ldq + c) * kv;
      }
      for (int g = 0; g < G; ++g) part[g][i] = acc[g];
    }
    for (int i = keys; i < kLanes; ++i)
      for (int g = 0; g < G; ++g) part[g][i] = vf{};
    for (int g = 0; g < G; ++g) store(scores + g * kSegment + j, sum_lanes(part[g]) * scale);
  }
}

// out[g * ldo + c] = sum over j of p[g][j] * v[j][c], for C vectors of the head dimension
template <class T, int G, int C>
TPK_INLINE void weigh_values(const float* p, const T* v, ptrdiff_t ldv, ptrdiff_t n, ptrdiff_t width, float* out,
                             ptrdiff_t ldo) {
  vf acc[G][C];
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < C; ++c) acc[g][c] = vf{};
  for (ptrdiff_t j = 0; j < n; ++j) {
    vf value[C];
    for (int c = 0; c < C; ++c) value[c] = C > 1 ? load(v + j * ldv + c * kLanes) : load_upto(v + j * ldv, width);
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) acc[g][c] += value[c] * p[g * kSegment + j];
  }
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < C; ++c) store(out + g * ldo + c * kLanes, acc[g][c]);
}

// Writes the head's output from its segments' partial results.
template <class T>
TPK_INLINE void merge_segments(const float* partial, ptrdiff_t segments, ptrdiff_t d16, ptrdiff_t d, T* out) {
  const ptrdiff_t stride = d16 + kLanes;
  float top = -__builtin_inff();
  for (ptrdiff_t s = 0; s < segments; ++s) {
    const float* part = partial + s * stride;
    if (part[1] != 0.0f && part[0] > top) top = part[0];
  }
  vf acc[kMaxHeadDim / kLanes] = {};
  float total = 0.0f;
  for (ptrdiff_t s = 0; s < segments; ++s) {
    const float* part = partial + s * stride;
    if (part[1] == 0.0f) continue;  // nothing to see in it (NaN is not equal and goes on)
    const float factor = exp(splat(part[0] - top))[0];
    total += factor * part[1];
    for (ptrdiff_t c = 0; c < d16; c += kLanes) acc[c / kLanes] += load(part + kLanes + c) * factor;
  }
  for (ptrdiff_t c = 0; c < d; c += kLanes) store_upto(out + c, acc[c / kLanes] / total, d - c);
}

template <class T, int G>
static __attribute__((noinline)) void attend_heads(const AttentionArgs& a, ptrdiff_t row, ptrdiff_t head,
                                                   ptrdiff_t kv_head, ptrdiff_t segment, ptrdiff_t t) {
  float q[G * kMaxHeadDim] __attribute__((aligned(64)));
  float scores[G * kSegment] __attribute__((aligned(64)));
  for (int g = 0; g < G; ++g) {
    const T* from = static_cast<const T*>(a.q) + row * a.q_batch + (head + g) * a.q_head + t * a.q_token;
    for (ptrdiff_t c = 0; c < a.d16; c += kLanes) store(q + g * a.d16 + c, load_upto(from + c, a.d - c));
  }
  const ptrdiff_t last = a.lengths[row] + t;
  ptrdiff_t from = segment * kSegment, to = from + kSegment;
  if (a.window > 0 && last - a.window + 1 > from) from = last - a.window + 1;
  if (last + 1 < to) to = last + 1;
  const ptrdiff_t n = to - from;
  const ptrdiff_t stride = a.d16 + kLanes;
  // partial [batch, hq, tokens, segments, stride]: max and sum in the first vector, then the values
  const ptrdiff_t ldp = a.tokens * a.segments * stride;
  float* partial = a.partial + ((row * a.hq + head) * a.tokens + t) * a.segments * stride + segment * stride;
  if (n <= 0) {
    for (int g = 0; g < G; ++g) partial[g * ldp] = partial[g * ldp + 1] = 0.0f;
    return;
  }
  const T* k = static_cast<const T*>(a.k) + row * a.k_batch + kv_head * a.k_head + from * a.k_pos;
  const T* v = static_cast<const T*>(a.v) + row * a.v_batch + kv_head * a.v_head + from * a.v_pos;
  score_keys<T, G>(q, a.d16, k, a.k_pos, n, a.d, a.scale, scores);
  for (int g = 0; g < G; ++g) {
    float* s = scores + g * kSegment;
    for (ptrdiff_t j = n; j % kLanes; ++j) s[j] = -__builtin_inff();
    vf high = splat(-__builtin_inff());
    for (ptrdiff_t j = 0; j < n; j += kLanes) {
      const vf x = load(s + j);
      high = select((vi)(x > high), x, high);
    }
    float top = high[0];
    for (int i = 1; i < kLanes; ++i) top = high[i] > top ? high[i] : top;
    const float shift = top == -__builtin_inff() ? 0.0f : top;
    vf sum = {};
    for (ptrdiff_t j = 0; j < n; j += kLanes) {
      const vf p = exp(load(s + j) - shift);
      sum += p;
      store(s + j, p);
    }
    partial[g * ldp] = top;
    partial[g * ldp + 1] = sum_lanes(sum);
  }
  ptrdiff_t c = 0;
  for (; c + kChunks * kLanes <= a.d; c += kChunks * kLanes)
    weigh_values<T, G, kChunks>(scores, v + c, a.v_pos, n, 0, partial + kLanes + c, ldp);
  for (; c < a.d; c += kLanes) weigh_values<T, G, 1>(scores, v + c, a.v_pos, n, a.d - c, partial + kLanes + c, ldp);
  if (a.segments == 1)
    for (int g = 0; g < G; ++g)
      merge_segments(partial + g * ldp, 1, a.d16, a.d,
                     static_cast<T*>(a.out) + ((row * a.tokens + t) * a.hq + head + g) * a.d);
}

template <class T>
static void attend(const AttentionArgs& a, ptrdiff_t row, ptrdiff_t kv_head, ptrdiff_t segment) {
  const ptrdiff_t group = a.hq / a.hkv;
  for (ptrdiff_t t = 0; t < a.tokens; ++t) {
    ptrdiff_t head = kv_head * group;
    const ptrdiff_t end = head + group;
    for (; head + 4 <= end; head += 4) attend_heads<T, 4>(a, row, head, kv_head, segment, t);
    if (end - head == 3) attend_heads<T, 3>(a, row, head, kv_head, segment, t);
    if (end - head == 2) attend_heads<T, 2>(a, row, head, kv_head, segment, t);
    if (end - head == 1) attend_heads<T, 1>(a, row, head, kv_head, segment, t);
  }
}

template <class T>
static void combine(const AttentionArgs& a, ptrdiff_t row, ptrdiff_t head) {
  const ptrdiff_t stride = a.segments * (a.d16 + kLanes);
  for (ptrdiff_t t = 0; t < a.tokens; ++t)
    merge_segments(a.partial + ((row * a.hq + head) * a.tokens + t) * stride, a.segments, a.d16, a.d,
                   static_cast<T*>(a.out) + ((row * a.tokens + t) * a.hq + head) * a.d);
}

}  // namespace TPK_ISA
}  // namespace cpu
}  // namespace tpk
