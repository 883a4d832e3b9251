// Float vectors of the processor's width, with GCC/Clang vector extensions: the same source compiles to AVX-512, AVX2,
// NEON or plain C. On them, what the kernels share: 16-channel blocks, half precision, exponentials, activations, sums.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace m1 {

constexpr int N = 16;  // states per channel, and channels per group; a group is the unit of all loads and stores

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int BLOCKS = N / W;  // vectors per group

typedef float vec __attribute__((vector_size(W * sizeof(float))));
typedef uint32_t uvec __attribute__((vector_size(W * sizeof(uint32_t))));
typedef int32_t ivec __attribute__((vector_size(W * sizeof(int32_t))));
typedef uint16_t halves __attribute__((vector_size(W * sizeof(uint16_t))));

inline vec splat(float x) { return vec{} + x; }

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec load(const bf16* p) {
  halves h;
  std::memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}

// Rounds to nearest, ties to even. NaN stays NaN. The instruction takes numbers below 2^-126 as zero.
inline void store(bf16* p, vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const uvec bits = (uvec)v;
  uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = v == v ? rounded : uvec{} + 0x7fc0u;
  const halves h = __builtin_convertvector(rounded, halves);
#endif
  std::memcpy(p, &h, sizeof h);
}

// float16 has no vector type, so processors without the instruction shift its bits into a float's. A power of 2 then
// corrects the exponent, for subnormal numbers too; infinity and NaN get the float's own.
inline vec widen(halves h) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vec)_mm256_cvtph_ps((__m128i)h);
#else
  const uvec bits = __builtin_convertvector(h, uvec);
  const uvec size = (uvec)((vec)((bits & 0x7fffu) << 13) * 0x1p112f);
  return (vec)(size | ((bits & 0x7c00u) == 0x7c00u ? uvec{} + 0x7f800000u : uvec{}) | (bits & 0x8000u) << 16);
#endif
}

inline vec load(const f16* p) {
  halves h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}

// Rounds to nearest, ties to even; beyond 65519 to infinity. NaN stays NaN.
inline void store(f16* p, vec v) {
#if defined(__AVX512F__)
  const halves h = (halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const halves h = (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const uvec bits = (uvec)v, size = bits & 0x7fffffffu;
  const uvec normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const uvec subnormal = (uvec)((vec)size + 0.5f) - 0x3f000000u;  // the addition rounds to multiples of 2^-24
  uvec rounded = size < 0x38800000u ? subnormal : normal;
  rounded = size >= 0x47800000u ? uvec{} + 0x7c00u : rounded;
  rounded = v == v ? rounded : uvec{} + 0x7e00u;
  const halves h = __builtin_convertvector(rounded | (bits >> 16 & 0x8000u), halves);
#endif
  std::memcpy(p, &h, sizeof h);
}

inline float sum(vec v) {
  float total = 0;
  for (int lane = 0; lane < W; ++lane) total += v[lane];
  return total;
}

// Converts `count` numbers.
template <class T>
inline void to_float(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i == count) return;
  T rest[W] = {};
  std::memcpy(rest, from + i, (count - i) * sizeof(T));
  const vec v = load(rest);
  std::memcpy(to + i, &v, (count - i) * sizeof(float));
}

template <class T>
inline void from_float(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i == count) return;
  vec v = {};
  std::memcpy(&v, from + i, (count - i) * sizeof(float));
  T rest[W];
  store(rest, v);
  std::memcpy(to + i, rest, (count - i) * sizeof(T));
}

// Calls f with a value of the element type that `dtype` names (ops/cpu/__init__.py).
template <class F>
inline void with_type(int64_t dtype, F f) {
  switch (dtype) {
    case 0: return f(float{});
    case 1: return f(bf16{});
    case 2: return f(f16{});
  }
}

// The maximum; b where either is NaN. GCC doesn't find this instruction by itself for vectors.
#if defined(__AVX512F__)
inline vec max(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline vec max(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline vec max(vec a, vec b) { return a > b ? a : b; }
#endif
inline float highest(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int lane = 1; lane < W; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
#endif
}

inline vec abs(vec x) { return (vec)((uvec)x & 0x7fffffffu); }

// 2^x for x <= 0, with relative error 1e-7, exact at 0. It is 2^k 2^r with k the nearest integer: a polynomial in r,
// and then k added to the exponent's bits. x < -126 counts as -126. NaN stays NaN.
inline vec exp2_nonpositive(vec x) {
  const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  x = max(splat(-126.0f), x);
  const vec t = x + magic, r = x - (t - magic);
  vec p = splat(1.32646869e-3f);
  p = p * r + 9.67151206e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93146980e-1f;
  p = p * r + 1.0f;
  return (vec)((uvec)p + ((uvec)t << 23));
}

constexpr float LOG2E = 1.44269504089f, LN2 = 0.693147180560f;

// 1 / x for x in [1, 3], relative error 2e-7. The processor's estimate and a Newton step cost a third of a division.
inline vec reciprocal(vec x) {
#if defined(__AVX512F__)
  const vec r = (vec)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  const vec r = (vec)_mm256_rcp_ps((__m256)x);
#else
  return 1.0f / x;
#endif
#ifdef __AVX2__
  return r * (2.0f - x * r);
#endif
}

// log(1 + e) for e in [0, 1], as 2 atanh(s) with s = e / (2 + e): exact to rounding even for tiny e.
inline vec log1p_unit(vec e) {
  const vec s = e * reciprocal(2.0f + e), q = s * s;
  vec p = splat(0.14089166f);
  p = p * q + 0.13980302f;
  p = p * q + 0.20012455f;
  p = p * q + 0.33333157f;
  p = p * q + 1.0f;
  return 2.0f * s * p;
}

inline vec sigmoid(vec x) {
  const vec e = exp2_nonpositive(-LOG2E * abs(x));
  return (x < 0.0f ? e : splat(1.0f)) * reciprocal(1.0f + e);
}

inline vec softplus(vec x) {
  return max(vec{}, x) + log1p_unit(exp2_nonpositive(-LOG2E * abs(x)));
}

// Sums the lanes of each of W vectors: lane i of the result is the sum of vector i. It takes log2(W) levels of shuffles
// and adds. A level folds vectors i and i + H into one, which holds their sums of H lanes side by side.
template <int H>
constexpr int pick(int lane, int offset) { return (lane & H ? W - H : 0) + lane + offset; }

template <int H, int... lane>
inline vec fold(vec a, vec b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, pick<H>(lane, 0)...) + __builtin_shufflevector(a, b, pick<H>(lane, H)...);
}

// Overwrites v.
template <int H = W / 2>
inline vec sum_lanes(vec* v) {
  if constexpr (H == 0) {
    return v[0];
  } else {
    for (int i = 0; i < H; ++i) v[i] = fold<H>(v[i], v[i + H], std::make_integer_sequence<int, W>());
    return sum_lanes<H / 2>(v);
  }
}

}  // namespace m1
