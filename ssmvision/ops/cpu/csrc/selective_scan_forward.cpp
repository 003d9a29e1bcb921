// The selective scan on one CPU core.
//
// Lanes run over channels, so the recurrence needs no horizontal sums; the state stays in registers; time goes in
// chunks whose tiles stay in L1. Chunks are the outer loop and channel blocks the inner one, so B and C are gathered
// once per chunk. A route is an index table: every load and store goes through it, nothing is permuted in memory.
#include "scan_tiles.h"

namespace ssmvision {
namespace {

constexpr int STATES = 4;  // that go through a chunk together: they share the loads of dt, x and y

// decay(t, e) computes the decays of step t. FIRST: these are the first states, and y is yet to be begun: as skip * input, where x enters as the input and leaves as
// dt * input.
template <int NS, bool FIRST, class Decay, class Coefficient>
[[gnu::always_inline]] static inline void advance(const Decay& decay, const vf* dt, vf* x, vf* y, vf skip, vf* state, const Coefficient* B,
                    const Coefficient* C, int64_t states, const Steps& steps) {
  vf h[NS];
  for (int i = 0; i < NS; ++i) h[i] = state[i];
  for (int t = 0; t < steps.count; ++t, B += states, C += states) {
    if (__builtin_expect(steps.reset[t], 0))
      for (int i = 0; i < NS; ++i) h[i] = vf{};
    vf e[NS], out = FIRST ? skip * x[t] : y[t];
    decay(t, e);
    if (FIRST) x[t] *= dt[t];
    for (int i = 0; i < NS; ++i) h[i] = e[i] * h[i] + x[t] * lanes(B[i]);
    for (int i = 0; i < NS; ++i) out += h[i] * lanes(C[i]);
    y[t] = out;
  }
  for (int i = 0; i < NS; ++i) state[i] = h[i];
}

// One vector of channels through one chunk for states n .. n + NS: state -> next, both (n, d) with row length `stride`.
template <int NS, class Coefficients>
static void advance_states(const vf* dt, vf* x, vf* y, vf skip, const float* state, float* next, int64_t stride,
                           const float* A2, int64_t stride_a, const Coefficients& B, const Coefficients& C, int64_t n,
                           const Steps& steps, int width, bool bounded) {
  vf h[NS], a2[NS], table[NS][ROOM];
  for (int i = 0; i < NS; ++i) {
    h[i] = load_part(state + (n + i) * stride, width);
    a2[i] = load(A2 + (n + i) * stride_a);
  }
  const auto through = [&](const auto& decay) {
    if (n == 0) advance<NS, true>(decay, dt, x, y, skip, h, B.at(0, n), C.at(0, n), B.states, steps);
    else advance<NS, false>(decay, dt, x, y, skip, h, B.at(0, n), C.at(0, n), B.states, steps);
  };
  if (NS > 1 && LANES == 16 && bounded) {  // 32 registers hold the recurrence and its exponentials
    through([&](int t, vf* e) {
      vf step[NS];
      for (int i = 0; i < NS; ++i) step[i] = dt[t];
      exp2_products<NS>(e, step, a2);
    });
  } else {
    decays<NS>(table, dt, a2, bounded, steps.count);
    through([&](int t, vf* e) {
      for (int i = 0; i < NS; ++i) e[i] = table[i][t];
    });
  }
  for (int i = 0; i < NS; ++i) store_part(next + (n + i) * stride, h[i], width);
}

template <class Coefficients>
static void forward_route(const Scan& s, int64_t ib, int64_t ik, int64_t d0, int64_t d1) {
  const int64_t chunks = (s.steps + CHUNK - 1) / CHUNK, plane = s.states * s.channels, slice = whole_vectors(d1 - d0);
  const int64_t bk = ib * s.routes + ik;
  const std::vector<float> A2 = channels_last(s.A + ik * plane, d0, d1, s.states, LOG2E);
  float steepest = 0.f;
  for (const float a : A2) steepest = std::max(steepest, std::abs(a));
  const int64_t* const order = s.order ? s.order + ik * s.steps : nullptr;
  const uint8_t* const flags = s.reset ? s.reset + ib * s.reset_b + ik * s.reset_k : nullptr;
  float* const last = s.last + bk * plane;
  // Where the state before a chunk lies: in memory of its own if a backward pass is to come, else where the last one will.
  const auto before = [&](int64_t chunk) {
    return s.checkpoints && chunk < chunks ? s.checkpoints + (bk * chunks + chunk) * plane : last;
  };
  const float* const u = s.u.at(ib, s.shared_u ? 0 : ik);
  float* const out = s.y.at(ib, s.merge ? 0 : ik);
  Coefficients B(s.B, s, ib, ik), C(s.C, s, ib, ik);
  Delta delta(s, ib, ik, d0, d1);
  vf dts[2 * ROOM] = {}, xs[2 * ROOM], ys[2 * ROOM];

  float* const first = before(0);
  for (int64_t n = 0; n < s.states; ++n)
    for (int64_t d = d0; d < d1; ++d)
      first[n * s.channels + d] = s.initial ? s.initial[bk * plane + d * s.states + n] : 0.f;

  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Steps steps(order, s.steps, chunk, flags);
    const float* state = before(chunk);
    float* next = before(chunk + 1);
    B.next_chunk();
    C.next_chunk();
    delta.next_chunk(steps);
    for (int64_t block = d0; block < d1; block += 2 * LANES) {
      const int64_t end = std::min(d1, block + 2 * LANES);
      load_tile(xs, u + block * s.u.c, s.u.c, s.u.l, steps, int(end - block));
      delta.load(dts, steps, block, int(end - block));
      prefetch_tile<true>(out + block, s.y.c, s.y.l, steps);
      if (end == d1 && chunk + 1 < chunks) {
        const Steps ahead(order, s.steps, chunk + 1, flags);
        prefetch_tile<false>(u + d0, s.u.c, s.u.l, ahead);
        if (!s.projection) prefetch_tile<false>(s.delta.at(ib, ik) + d0, s.delta.c, s.delta.l, ahead);
      }
      vf *dt = dts, *x = xs, *y = ys;
      for (int64_t d = block; d < end; d += LANES, dt += ROOM, x += ROOM, y += ROOM) {
        const int width = int(std::min<int64_t>(LANES, end - d));
        const vf skip = s.D ? load_part(s.D + ik * s.channels + d, width) : vf{};
        delta.activate(dt, nullptr, steps, d, width);
        const bool bounded = largest_magnitude(dt, steps.count) * steepest <= 126.f;  // false if NaN
        B.load(steps, d, width);
        C.load(steps, d, width);
        const float* a2 = &A2[size_t(d - d0)];
        int64_t n = 0;
        for (; n + STATES <= s.states; n += STATES)
          advance_states<STATES>(dt, x, y, skip, state + d, next + d, s.channels, a2, slice, B, C, n, steps, width, bounded);
        for (; n < s.states; ++n)
          advance_states<1>(dt, x, y, skip, state + d, next + d, s.channels, a2, slice, B, C, n, steps, width, bounded);
      }
      store_tile(ys, out + block * s.y.c, s.y.c, s.y.l, steps, int(end - block), s.merge && ik > 0);
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

void exp2_passes(const float* x, int64_t count, int64_t passes, float* out) {
  constexpr int64_t BLOCK = 4 * LANES;  // numbers past the last whole block are left out
  vf rate[4], in[4], result[4];
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int j = 0; j < 4; ++j) rate[j] = splat(1.f);
    asm volatile("" : : "r"(x), "r"(out) : "memory");  // every pass counts
    for (int64_t i = 0; i + BLOCK <= count; i += BLOCK) {
      for (int j = 0; j < 4; ++j) in[j] = load(x + i + j * LANES);
      exp2_products<4>(result, in, rate);
      for (int j = 0; j < 4; ++j) store(out + i + j * LANES, result[j]);
    }
  }
}

}  // namespace ssmvision
