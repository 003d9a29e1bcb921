// The selective scan on one CPU core.
//
// Lanes run over channels, so the recurrence needs no horizontal sums; the state stays in registers; time goes in
// chunks whose tiles stay in L1. Chunks are the outer loop and channel blocks the inner one, so B and C are gathered
// once per chunk. A route is an index table: every load and store goes through it, nothing is permuted in memory.
#include "scan_tiles.h"

namespace ssmvision {
namespace {

// States whose recurrences advance in lockstep: as many as leave their constants in registers.
constexpr int TOGETHER = LANES == 16 ? 4 : 2;

// NS states advance together: they share the loads of dt, x and y, and hide each other's latency. BOUNDED: no exponent
// of this block exceeds 126 in magnitude, which saves the comparisons.
template <int NS, bool BOUNDED, class Coefficients>
static void advance(const vf* dt, const vf* x, vf* y, vf* h, const vf* a2, const Coefficients& B, const Coefficients& C,
                    int64_t n, const Steps& steps) {
  vf state[NS];
  for (int i = 0; i < NS; ++i) state[i] = h[i];
  for (int t = 0; t < steps.count; ++t) {
    vf out = y[t];
    const vf step = dt[t], drive = x[t];
    vf a[NS];
    if (BOUNDED) exp2_products<NS>(a, step, a2);
    else for (int i = 0; i < NS; ++i) a[i] = exp2v(step * a2[i]);
    if (__builtin_expect(steps.reset[t], 0))
      for (int i = 0; i < NS; ++i) state[i] = vf{};
    for (int i = 0; i < NS; ++i) state[i] = a[i] * state[i] + drive * B.get(t, n + i);
    for (int i = 0; i < NS; ++i) out += state[i] * C.get(t, n + i);
    y[t] = out;
  }
  for (int i = 0; i < NS; ++i) h[i] = state[i];
}

// One channel block through one chunk for states n .. n + NS: state -> next, both (n, d) with row length `stride`.
template <int NS, class Coefficients>
static void advance_states(const vf* dt, const vf* x, vf* y, const float* state, float* next, int64_t stride,
                           const float* A2, int64_t stride_a, const Coefficients& B, const Coefficients& C, int64_t n,
                           const Steps& steps, int width, bool bounded) {
  vf h[NS], a2[NS];
  for (int i = 0; i < NS; ++i) {
    h[i] = load_part(state + (n + i) * stride, width);
    a2[i] = load_part(A2 + (n + i) * stride_a, width);
  }
  if (bounded) advance<NS, true>(dt, x, y, h, a2, B, C, n, steps);
  else advance<NS, false>(dt, x, y, h, a2, B, C, n, steps);
  for (int i = 0; i < NS; ++i) store_part(next + (n + i) * stride, h[i], width);
}

template <class Coefficients>
static void forward_route(const Scan& s, int64_t ib, int64_t ik, int64_t d0, int64_t d1) {
  const int64_t chunks = (s.steps + CHUNK - 1) / CHUNK, plane = s.states * s.channels, slice = d1 - d0;
  const int64_t bk = ib * s.routes + ik;
  const std::vector<float> A2 = channels_last(s.A + ik * plane, d0, d1, s.states, LOG2E);
  float steepest = 0.f;
  for (const float a : A2) steepest = std::max(steepest, std::abs(a));
  const int64_t* const order = s.order ? s.order + ik * s.steps : nullptr;
  const uint8_t* const flags = s.reset ? s.reset + ib * s.reset_b + ik * s.reset_k : nullptr;
  float* const saved = s.checkpoints + bk * chunks * plane;
  float* const last = s.last + bk * plane;
  const float* const u = s.u.at(ib, s.shared_u ? 0 : ik);
  float* const out = s.y.at(ib, s.merge ? 0 : ik);
  Coefficients B(s.B, s, ib, ik), C(s.C, s, ib, ik);
  Delta delta(s, ib, ik, d0, d1);
  vf dt[CHUNK], x[CHUNK], y[CHUNK];

  for (int64_t n = 0; n < s.states; ++n)
    for (int64_t d = d0; d < d1; ++d)
      (chunks ? saved : last)[n * s.channels + d] = s.initial ? s.initial[bk * plane + d * s.states + n] : 0.f;

  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Steps steps(order, s.steps, chunk, flags);
    const float* state = saved + chunk * plane;
    float* next = chunk + 1 < chunks ? saved + (chunk + 1) * plane : last;
    B.next_chunk();
    C.next_chunk();
    delta.next_chunk(steps);
    for (int64_t d = d0; d < d1; d += LANES) {
      const int width = int(std::min<int64_t>(LANES, d1 - d));
      load_tile(x, u + d * s.u.c, s.u.c, s.u.l, steps, width);
      delta.load(dt, steps, d, width);
      const vf skip = s.D ? load_part(s.D + ik * s.channels + d, width) : vf{};
      vf largest{};
      if (s.softplus) softplus_tile(dt, steps.count);
      for (int t = 0; t < steps.count; ++t) {
        largest = vmax(largest, vmax(dt[t], -dt[t]));
        y[t] = skip * x[t];
        x[t] *= dt[t];
      }
      const bool bounded = hmax(largest) * steepest <= 126.f;  // false if NaN
      B.load(steps, d, width);
      C.load(steps, d, width);
      const float* a2 = &A2[size_t(d - d0)];
      int64_t n = 0;
      for (; n + TOGETHER <= s.states; n += TOGETHER)
        advance_states<TOGETHER>(dt, x, y, state + d, next + d, s.channels, a2, slice, B, C, n, steps, width, bounded);
      for (; n < s.states; ++n)
        advance_states<1>(dt, x, y, state + d, next + d, s.channels, a2, slice, B, C, n, steps, width, bounded);
      store_tile(y, out + d * s.y.c, s.y.c, s.y.l, steps, width, s.merge && ik > 0);
    }
  }
}

}  // namespace

void scan_forward(const Scan& s, int64_t ib, int64_t d0, int64_t d1) {
  for (int64_t ik = 0; ik < s.routes; ++ik) {
    if (lanes_share_groups(s)) forward_route<SharedCoefficients>(s, ib, ik, d0, d1);
    else forward_route<LaneCoefficients>(s, ib, ik, d0, d1);
  }
}

}  // namespace ssmvision
