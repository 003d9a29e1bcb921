// Vectors of LANES floats on the compiler's own vector extension: the same source becomes AVX-512, AVX2, SSE2 or NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
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

// out[i] = 2^f[i] for |f[i]| <= 1/2, to a relative error of 1e-7. The constant term is exactly 1, so that a decay of 2^0
// never drifts over thousands of steps.
template <int N>
[[gnu::always_inline]] static inline void exp2_fractions(vf* out, const vf* f) {
  for (int i = 0; i < N; ++i) out[i] = splat(0.00132647273f) * f[i] + splat(0.00967151299f);
  for (int i = 0; i < N; ++i) out[i] = out[i] * f[i] + splat(0.0555073358f);
  for (int i = 0; i < N; ++i) out[i] = out[i] * f[i] + splat(0.240222424f);
  for (int i = 0; i < N; ++i) out[i] = out[i] * f[i] + splat(0.693147004f);
  for (int i = 0; i < N; ++i) out[i] = out[i] * f[i] + splat(1.f);
}

// out[i] = 2^(a[i] b[i]) where |a[i] b[i]| <= 126 is known: no comparisons. The N chains advance in lockstep: a core's
// floating-point scheduler is too short to overlap whole chains one after the other, and four to five of them fill its
// pipes. Always inlined, so that the arrays are registers.
#if defined(__AVX512F__) && LANES == 16
// AVX-512 rounds and scales in one instruction each, off the multipliers: 1.3 times as fast as the arithmetic below.
template <int N>
[[gnu::always_inline]] static inline void exp2_products(vf* out, const vf* a, const vf* b) {
  vf x[N], whole[N], p[N];
  for (int i = 0; i < N; ++i) x[i] = a[i] * b[i];
  for (int i = 0; i < N; ++i) whole[i] = (vf)_mm512_roundscale_ps((__m512)x[i], _MM_FROUND_TO_NEAREST_INT);
  for (int i = 0; i < N; ++i) x[i] = (vf)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEAREST_INT);
  exp2_fractions<N>(p, x);
  for (int i = 0; i < N; ++i) out[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)whole[i]);
}
#else
// Adding 1.5 * 2^23 rounds a number to an integer and leaves that integer in the low bits of the mantissa.
constexpr float ROUNDER = 12582912.f;

template <int N>
[[gnu::always_inline]] static inline void exp2_products(vf* out, const vf* a, const vf* b) {
  vf rounded[N], f[N], p[N];
  for (int i = 0; i < N; ++i) rounded[i] = a[i] * b[i] + splat(ROUNDER);
  for (int i = 0; i < N; ++i) f[i] = a[i] * b[i] - (rounded[i] - splat(ROUNDER));
  exp2_fractions<N>(p, f);
  for (int i = 0; i < N; ++i) out[i] = (vf)((vi)p[i] + ((vi)rounded[i] << 23));
}
#endif

// 2^x for any x. Far below 2^-126 the result is a positive number under 1e-37; NaN stays NaN.
static inline vf exp2v(vf x) {
  x = vmax(splat(-126.f), vmin(splat(127.f), x));  // constants first: NaN passes through
  const vf one = splat(1.f);
  exp2_products<1>(&x, &x, &one);
  return x;
}

constexpr float LOG2E = 1.44269504088896341f;

// e[i] = exp(-|x[i]|)
template <int N>
[[gnu::always_inline]] static inline void exp_neg_abs(vf* e, const vf* x) {
  vf magnitude[N], log2e[N];
  for (int i = 0; i < N; ++i) {
    magnitude[i] = vmax(splat(-87.f), (vf)((vi)x[i] | INT32_MIN));  // the constant first: NaN passes through
    log2e[i] = splat(LOG2E);
  }
  exp2_products<N>(e, magnitude, log2e);
}

// log(1 + exp(x[i])) as max(x, 0) + log(1 + e) with e = exp(-|x|), which is left in e. log(1 + e) / e on [0, 1] is a
// polynomial of relative error 3e-8: small steps keep their precision, and there is no division.
template <int N>
[[gnu::always_inline]] static inline void softplus(vf* out, vf* e, const vf* x) {
  vf p[N];
  exp_neg_abs<N>(e, x);
  for (int i = 0; i < N; ++i) p[i] = splat(0.00523269f) * e[i] - splat(0.02950524f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * e[i] + splat(0.07822595f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * e[i] - splat(0.13663246f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * e[i] + splat(0.19106007f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * e[i] - splat(0.24842982f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * e[i] + splat(0.33319097f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * e[i] - splat(0.49999493f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * e[i] + splat(0.99999997f);
  for (int i = 0; i < N; ++i) out[i] = p[i] * e[i] + vmax(splat(0.f), x[i]);
}

// 1 / (1 + exp(-x)) from e = exp(-|x|).
static inline vf sigmoid(vf x, vf e) {
  const vf one = splat(1.f);
  return (x >= 0.f ? one : e) / (one + e);
}
static inline vf sigmoid(vf x) {
  vf e;
  exp_neg_abs<1>(&e, &x);
  return sigmoid(x, e);
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

// Lane q of every four lanes of the result is the sum of those four lanes of the q-th argument.
template <int... I>
static inline vf sum_fours(vf a, vf b, vf c, vf d, std::integer_sequence<int, I...>) {
  const auto halves = [](vf x, vf y) {  // x0 + x2, y0 + y2, x1 + x3, y1 + y3
    return __builtin_shufflevector(x, y, (I / 4 * 4 + I % 4 / 2 + I % 2 * LANES)...) +
           __builtin_shufflevector(x, y, (I / 4 * 4 + I % 4 / 2 + I % 2 * LANES + 2)...);
  };
  const vf ab = halves(a, b), cd = halves(c, d);
  return __builtin_shufflevector(ab, cd, (I / 4 * 4 + I % 2 + I % 4 / 2 * LANES)...) +
         __builtin_shufflevector(ab, cd, (I / 4 * 4 + I % 2 + I % 4 / 2 * LANES + 2)...);
}
static inline vf sum_fours(vf a, vf b, vf c, vf d) {
  return sum_fours(a, b, c, d, std::make_integer_sequence<int, LANES>());
}
