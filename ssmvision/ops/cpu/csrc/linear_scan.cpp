// The linear recurrence h_t = a_t h_{t-1} + x_t and its adjoint on one CPU core.
//
// They move memory and hardly compute. So a row of states is cut into blocks: the state that a step needs is the row of h
// that the step before it has just written, still in the cache, and every tensor passes through the core once. A row is
// a row of floats; complex numbers are (re, im) pairs in it.
#include <utility>

#include "tiles.h"

namespace ssmvision {
namespace {

constexpr int64_t BLOCK = 8192;  // floats

struct Real {
  static constexpr int64_t FLOATS = 1;
  static vf splat_number(const float* p) { return splat(*p); }
  static vf multiply(vf a, vf b) { return a * b; }
  static vf multiply_conjugate(vf a, vf b) { return a * b; }
};

struct Complex {
  static constexpr int64_t FLOATS = 2;
  static constexpr auto LANE = std::make_integer_sequence<int, LANES>();

  static vf splat_number(const float* p) {
    vf v;
    for (int i = 0; i < LANES; ++i) v[i] = p[i % 2];
    return v;
  }
  template <int... I>
  static vf real(vf v, std::integer_sequence<int, I...>) { return __builtin_shufflevector(v, v, (I & ~1)...); }
  template <int... I>
  static vf imaginary(vf v, std::integer_sequence<int, I...>) { return __builtin_shufflevector(v, v, (I | 1)...); }
  template <int... I>
  static vf times_i(vf v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ 1)...) * vf{(I % 2 ? 1.f : -1.f)...};
  }
  static vf multiply(vf a, vf b) { return real(a, LANE) * b + imaginary(a, LANE) * times_i(b, LANE); }
  static vf multiply_conjugate(vf a, vf b) { return real(a, LANE) * b - imaginary(a, LANE) * times_i(b, LANE); }
};

template <class Body>
inline __attribute__((always_inline)) void for_lanes(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) body(i, LANES);
  if (i < count) body(i, int(count - i));
}

// Calls body(state, first, last) for the floats of a block that share the decay of `state`.
template <class Number, class Body>
inline void for_shared(const LinearScan& s, int64_t begin, int64_t count, const Body& body) {
  const int64_t run = s.sharing * Number::FLOATS;
  for (int64_t i = 0; i < count;) {
    const int64_t state = (begin + i) / run, end = std::min(count, (state + 1) * run - begin);
    body(state, i, end);
    i = end;
  }
}

// The decays of one block, one for every float of x.
template <class Number>
struct Decay {
  const LinearScan& s;
  const float* base;
  int64_t begin, count;
  float spread[BLOCK + LANES];

  Decay(const LinearScan& scan, int64_t ib, int64_t begin_, int64_t count_)
      : s(scan), base(scan.a.at(ib, 0)), begin(begin_), count(count_) {
    if (s.sharing > 1 && s.constant) fill(base);
  }
  const float* at(int64_t t) {
    const float* a = base + t * s.a.l;
    if (s.sharing == 1) return a + begin;
    if (!s.constant) fill(a);
    return spread;
  }
  void fill(const float* a) {
    for_shared<Number>(s, begin, count, [&](int64_t state, int64_t first, int64_t last) {
      const vf value = Number::splat_number(a + state * Number::FLOATS);
      for (int64_t i = first; i < last; i += LANES) store(spread + i, value);  // what is too much is overwritten
    });
  }
};

template <class Number>
void forward_block(const LinearScan& s, int64_t ib, int64_t begin, int64_t count) {
  Decay<Number> decay(s, ib, begin, count);
  const float* before = s.initial ? s.initial + ib * s.channels + begin : nullptr;
  const int64_t next = s.reverse ? -s.x.l : s.x.l;
  for (int64_t step = 0; step < s.steps; ++step) {
    const int64_t t = s.token(step);
    const float* x = s.x.at(ib, 0) + t * s.x.l + begin;
    float* h = s.h.at(ib, 0) + t * s.h.l + begin;
    if (!before || s.is_reset(ib, t)) {
      std::copy(x, x + count, h);
    } else {
      const float* a = decay.at(t);
      for_lanes(count, [&](int64_t i, int width) {
        __builtin_prefetch(x + next + i);  // at a jump from block to block the hardware starts guessing anew
        const vf kept = Number::multiply(load_part(a + i, width), load_part(before + i, width));
        store_part(h + i, kept + load_part(x + i, width), width);
      });
    }
    before = h;
  }
  float* last = s.last + ib * s.channels + begin;
  if (before) std::copy(before, before + count, last);
  else std::fill(last, last + count, 0.f);
}

template <class Number>
void backward_block(const LinearScanGrad& s, int64_t ib, int64_t slice, int64_t begin, int64_t count) {
  Decay<Number> decay(s, ib, begin, count);
  float products[BLOCK];
  const bool constant = s.constant, summed = s.sharing > 1 && !constant;
  const float* const initial = s.initial ? s.initial + ib * s.channels + begin : nullptr;
  float* const carried = s.dinitial + ib * s.channels + begin;  // the gradient that a state gets from later ones
  if (s.dlast) std::copy_n(s.dlast + ib * s.channels + begin, count, carried);
  else std::fill(carried, carried + count, 0.f);

  for (int64_t step = s.steps - 1; step >= 0; --step) {
    const int64_t t = s.token(step);
    const float* before = step ? s.h.at(ib, 0) + s.token(step - 1) * s.h.l + begin : initial;
    const float* dh = s.dh.at(ib, 0) + t * s.dh.l + begin;
    float* dx = s.dx.at(ib, 0) + t * s.dx.l + begin;
    float* const da_row = s.da + ((slice * s.batch + ib) * (constant ? 1 : s.steps) + (constant ? 0 : t)) * s.width;
    float* da = summed ? products : da_row + begin;
    if (!before || s.is_reset(ib, t)) {
      for_lanes(count, [&](int64_t i, int width) {
        store_part(dx + i, load_part(dh + i, width) + load_part(carried + i, width), width);
        store_part(carried + i, vf{}, width);
        if (!constant) store_part(da + i, vf{}, width);
      });
      continue;
    }
    const float* a = decay.at(t);
    for_lanes(count, [&](int64_t i, int width) {
      const vf grad = load_part(dh + i, width) + load_part(carried + i, width);
      const vf product = Number::multiply_conjugate(load_part(before + i, width), grad);
      store_part(dx + i, grad, width);
      store_part(carried + i, Number::multiply_conjugate(load_part(a + i, width), grad), width);
      store_part(da + i, constant ? load_part(da + i, width) + product : product, width);
    });
    if (summed)
      for_shared<Number>(s, begin, count, [&](int64_t state, int64_t first, int64_t last) {
        vf sum{};
        for_lanes(last - first, [&](int64_t i, int width) { sum += load_part(products + first + i, width); });
        for (int i = 0; i < LANES; ++i) da_row[state * Number::FLOATS + i % Number::FLOATS] += sum[i];
      });
  }
}

}  // namespace

void linear_scan_forward(const LinearScan& s, int64_t ib, int64_t d0, int64_t d1) {
  for (int64_t d = d0; d < d1; d += BLOCK) {
    const int64_t count = std::min(BLOCK, d1 - d);
    if (s.complex) forward_block<Complex>(s, ib, d, count);
    else forward_block<Real>(s, ib, d, count);
  }
}

void linear_scan_backward(const LinearScanGrad& s, int64_t ib, int64_t slice, int64_t d0, int64_t d1) {
  for (int64_t d = d0; d < d1; d += BLOCK) {
    const int64_t count = std::min(BLOCK, d1 - d);
    if (s.complex) backward_block<Complex>(s, ib, slice, d, count);
    else backward_block<Real>(s, ib, slice, d, count);
  }
}

}  // namespace ssmvision
