// Vectors of LANES floats on the compiler's own vector extension: the same source becomes AVX-512, AVX2, SSE2 or NEON.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(LANES)
// Forced from outside: 16 lanes can be tried on any machine, the compiler splits them.
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

static inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return x - vf{}; }

// min and max return b if either operand is NaN. x86 has one instruction for that, which compilers find only when told
// to ignore NaN, so it is named here.
#if defined(__AVX512F__) && LANES == 16
static inline vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && LANES == 8
static inline vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
#endif
static inline float hmax(vf v) {
  float m = v[0];
  for (int i = 1; i < LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
static inline float hsum(vf v) {
  float s = 0;
  for (int i = 0; i < LANES; ++i) s += v[i];
  return s;
}

// 2^f for f in [-1/2, 1/2], relative error 1e-7; the constant term is exactly 1, so that a decay of 2^0 never drifts
// over thousands of steps.
static inline vf exp2_fraction(vf f) {
  vf p = splat(0.00132647273f);
  p = p * f + splat(0.00967151299f);
  p = p * f + splat(0.0555073358f);
  p = p * f + splat(0.240222424f);
  p = p * f + splat(0.693147004f);
  return p * f + splat(1.f);
}

// Adding 1.5 * 2^23 rounds a number to an integer and leaves that integer in the low bits of the mantissa.
constexpr float ROUNDER = 12582912.f;
static inline vf scale_exponent(vf p, vf rounded) { return (vf)((vi)p + ((vi)rounded << 23)); }

// 2^x for any x. Far below 2^-126 the result is a positive number under 1e-37; NaN stays NaN.
static inline vf exp2v(vf x) {
  x = vmax(splat(-126.f), vmin(splat(127.f), x));  // constants first: NaN passes through
  const vf rounded = x + splat(ROUNDER);
  return scale_exponent(exp2_fraction(x - (rounded - splat(ROUNDER))), rounded);
}

// out[i] = 2^(a b[i]) where |a b[i]| <= 126 is known: no comparisons, and the product is never rounded. The N chains
// advance in lockstep: a core's floating-point scheduler is too short to overlap whole chains one after the other.
template <int N>
static inline void exp2_products(vf* out, vf a, const vf* b) {
  vf rounded[N], f[N], p[N];
  for (int i = 0; i < N; ++i) rounded[i] = a * b[i] + splat(ROUNDER);
  for (int i = 0; i < N; ++i) f[i] = a * b[i] - (rounded[i] - splat(ROUNDER));
  for (int i = 0; i < N; ++i) p[i] = splat(0.00132647273f) * f[i] + splat(0.00967151299f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(0.0555073358f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(0.240222424f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(0.693147004f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(1.f);
  for (int i = 0; i < N; ++i) out[i] = scale_exponent(p[i], rounded[i]);
}

// log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e)): no cancellation for small e.
static inline vf log1pv(vf e) {
  const vf s = e / (e + splat(2.f));
  const vf w = s * s;
  vf p = splat(0.140891656f);
  p = p * w + splat(0.139803022f);
  p = p * w + splat(0.200124547f);
  p = p * w + splat(0.333331585f);
  p = p * w + splat(1.f);
  return (s + s) * p;
}

static inline vf exp_neg_abs(vf x) { return exp2v(vmin(-x, x) * splat(1.44269504f)); }
static inline vf sigmoid(vf x) {
  const vf e = exp_neg_abs(x), one = splat(1.f);
  return (x >= 0.f ? one : e) / (one + e);
}

// Rows r[i][j] become r[j][i]: log2(LANES) rounds of pairing row i with row i + LANES/2.
static inline void transpose(vf r[LANES]) {
  for (int round = 1; round < LANES; round *= 2) {
    vf out[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      const vf a = r[i], b = r[i + LANES / 2];
#if LANES == 16
      out[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      out[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LANES == 8
      out[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      out[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      out[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      out[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
    }
    for (int i = 0; i < LANES; ++i) r[i] = out[i];
  }
}
