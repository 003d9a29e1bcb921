// The selective scan on one CPU core; included by kernels.cpp once per instruction set.
//
// Lanes run over channels, so the recurrence needs no horizontal sums; the state stays in registers; time goes in
// chunks whose tiles stay in L1. Chunks are the outer loop and channel blocks the inner one, so B and C are gathered
// once per chunk. A route is an index table: every load and store goes through it, nothing is permuted in memory.
#pragma once
#include <cmath>
#include <vector>

#include "tiles.h"

namespace ssmvision {
namespace {

// States whose recurrences advance in lockstep: as many as leave their constants in registers.
constexpr int TOGETHER = LANES == 16 ? 4 : 2;
constexpr float LOG2E = 1.44269504088896341f;

// (d, rows) -> (rows, d) for the channels of one task, so that lanes load contiguous channels.
static std::vector<float> channels_last(const float* p, int64_t d0, int64_t d1, int64_t rows, float scale) {
  std::vector<float> out(size_t(rows * (d1 - d0)));
  for (int64_t d = d0; d < d1; ++d)
    for (int64_t r = 0; r < rows; ++r) out[size_t(r * (d1 - d0) + d - d0)] = scale * p[d * rows + r];
  return out;
}

// B or C of one chunk when all lanes of a channel block belong to one group: scalars [t][n], broadcast on use.
struct SharedCoefficients {
  const GroupedView& view;
  const float* base;
  int64_t states, per_group, group = -1;
  std::vector<float> values;

  SharedCoefficients(const GroupedView& v, const Scan& s, int64_t ib, int64_t ik)
      : view(v), base(v.at(ib, ik)), states(s.states), per_group(s.channels / v.groups), values(size_t(CHUNK * states)) {}

  vf get(int t, int64_t n) const { return splat(values[size_t(t * states + n)]); }
  void next_chunk() { group = -1; }
  void load(const Steps& s, int64_t d, int) {
    if (group == d / per_group) return;
    group = d / per_group;
    const float* p = base + group * view.c;
    for (int64_t n = 0; n < states; ++n)
      for (int t = 0; t < s.count; ++t) values[size_t(t * states + n)] = p[n * view.n + s.token[t] * view.l];
  }
};

// B or C of one chunk and channel block when lanes belong to different groups: vectors [t][n].
struct LaneCoefficients {
  const GroupedView& view;
  const float* base;
  int64_t states, per_group;
  std::vector<vf> values;

  LaneCoefficients(const GroupedView& v, const Scan& s, int64_t ib, int64_t ik)
      : view(v), base(v.at(ib, ik)), states(s.states), per_group(s.channels / v.groups), values(size_t(CHUNK * states)) {}

  vf get(int t, int64_t n) const { return values[size_t(t * states + n)]; }
  void next_chunk() {}
  void load(const Steps& s, int64_t d, int width) {
    for (int t = 0; t < s.count; ++t)
      for (int64_t n = 0; n < states; ++n)
        for (int i = 0; i < width; ++i)
          values[size_t(t * states + n)][i] = base[(d + i) / per_group * view.c + n * view.n + s.token[t] * view.l];
  }
};

static bool lanes_share_groups(const Scan& s) {
  const auto shared = [&](const GroupedView& v) { return v.groups == 1 || s.channels / v.groups % LANES == 0; };
  return shared(s.B) && shared(s.C);
}

// Gradients of B or C: one vector per [t][n], summed over channel blocks; lanes are added up once per chunk and group.
struct CoefficientGrad {
  float* base;  // (g, l, n) of this slice, sample and route
  int64_t states, tokens, per_group, group = -1;
  bool shared;
  std::vector<vf> sums;

  CoefficientGrad(float* partial, const GroupedView& v, const Scan& s, int64_t slice, int64_t ib, int64_t ik, bool shared_)
      : base(partial + ((slice * s.batch + ib) * s.routes + ik) * v.groups * s.tokens * s.states),
        states(s.states), tokens(s.tokens), per_group(s.channels / v.groups), shared(shared_),
        sums(size_t(CHUNK * states)) {}

  void add(int t, int64_t n, vf value) { sums[size_t(t * states + n)] += value; }
  void enter(const Steps& s, int64_t d) {
    if (shared && group == d / per_group) return;
    flush(s, 0, LANES);
    group = d / per_group;
  }
  void leave(const Steps& s, int64_t d, int width) {
    if (!shared) flush(s, d, width);
  }
  void flush(const Steps& s, int64_t d, int width) {
    if (group < 0) return;
    for (int t = 0; t < s.count; ++t)
      for (int64_t n = 0; n < states; ++n) {
        vf& sum = sums[size_t(t * states + n)];
        const int64_t cell = s.token[t] * states + n;
        if (shared) base[group * tokens * states + cell] += hsum(sum);
        else for (int i = 0; i < width; ++i) base[(d + i) / per_group * tokens * states + cell] += sum[i];
        sum = vf{};
      }
    group = -1;
  }
};

// Delta of one route as the kernels need it: loaded, or projected from its low-rank form inside the chunk.
struct Delta {
  const Scan& s;
  int64_t ib, ik, d0, slice;
  std::vector<float> weight, rows;  // (r, d) of this task; [t][r] of this chunk

  Delta(const Scan& scan, int64_t ib_, int64_t ik_, int64_t d0_, int64_t d1)
      : s(scan), ib(ib_), ik(ik_), d0(d0_), slice(d1 - d0_) {
    if (!s.projection) return;
    weight = channels_last(s.projection + ik * s.channels * s.rank, d0, d1, s.rank, 1.f);
    rows.resize(size_t(CHUNK * s.rank));
  }
  void next_chunk(const Steps& steps) {
    const float* p = s.delta.at(ib, ik);
    for (int64_t r = 0; r < (s.projection ? s.rank : 0); ++r)
      for (int t = 0; t < steps.count; ++t) rows[size_t(t * s.rank + r)] = p[r * s.delta.c + steps.token[t] * s.delta.l];
  }
  // raw[t] = delta + bias, before softplus.
  void load(vf* raw, const Steps& steps, int64_t d, int width) const {
    const vf bias = s.bias ? load_part(s.bias + ik * s.channels + d, width) : vf{};
    if (!s.projection) {
      load_tile(raw, s.delta.at(ib, ik) + d * s.delta.c, s.delta.c, s.delta.l, steps, width);
      for (int t = 0; t < steps.count; ++t) raw[t] += bias;
      return;
    }
    for (int t = 0; t < steps.count; ++t) raw[t] = bias;
    for (int64_t r = 0; r < s.rank; ++r) {
      const vf w = load_part(&weight[size_t(r * slice + d - d0)], width);
      for (int t = 0; t < steps.count; ++t) raw[t] += w * splat(rows[size_t(t * s.rank + r)]);
    }
  }
};

// Two passes with short chains instead of one with long ones, for the scheduler's sake; see exp2_products.
inline void softplus_tile(vf* x, int count) {
  vf e[CHUNK];
  for (int t = 0; t < count; ++t) e[t] = exp_neg_abs(x[t]);
  for (int t = 0; t < count; ++t) x[t] = vmax(splat(0.f), x[t]) + log1pv(e[t]);
}

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

static void scan_forward(const Scan& s, int64_t ib, int64_t d0, int64_t d1) {
  for (int64_t ik = 0; ik < s.routes; ++ik) {
    if (lanes_share_groups(s)) forward_route<SharedCoefficients>(s, ib, ik, d0, d1);
    else forward_route<LaneCoefficients>(s, ib, ik, d0, d1);
  }
}

// What one channel block of one chunk reads and accumulates.
struct BlockGrad {
  vf dt[CHUNK], raw[CHUNK], u[CHUNK], dy[CHUNK];
  vf ddt[CHUNK];  // through the decay
  vf db[CHUNK];   // sum over states of dh * B: the gradient of dt * u
};

// Recompute the states of NS states forward, then run the recurrence of the gradients backward. Returns through h the
// gradient of the state before the chunk, through da the gradient of A.
template <int NS, class Coefficients>
static void retreat(BlockGrad& g, vf* h, vf* dh, vf* da, const vf* a, const Coefficients& B, const Coefficients& C,
                    CoefficientGrad& dB, CoefficientGrad& dC, int64_t n, const Steps& steps) {
  vf decay[CHUNK][NS], state[CHUNK + 1][NS];
  for (int i = 0; i < NS; ++i) state[0][i] = h[i];
  for (int t = 0; t < steps.count; ++t) {
    const vf x = g.dt[t] * g.u[t];
    const bool cut = steps.reset[t];
    for (int i = 0; i < NS; ++i) {
      decay[t][i] = cut ? vf{} : exp2v(g.dt[t] * (a[i] * splat(LOG2E)));
      state[t + 1][i] = (cut ? vf{} : decay[t][i] * state[t][i]) + x * B.get(t, n + i);
    }
  }
  for (int t = steps.count - 1; t >= 0; --t) {
    const vf dy = g.dy[t], dt = g.dt[t], x = dt * g.u[t];
    vf ddt = g.ddt[t], db = g.db[t];
    for (int i = 0; i < NS; ++i) {
      const vf grad = dh[i] + dy * C.get(t, n + i);
      dC.add(t, n + i, dy * state[t + 1][i]);
      dB.add(t, n + i, grad * x);
      dh[i] = grad * decay[t][i];
      const vf ddecay = dh[i] * state[t][i];  // d loss / d (dt * A)
      da[i] += ddecay * dt;
      ddt += ddecay * a[i];
      db += grad * B.get(t, n + i);
    }
    g.ddt[t] = ddt;
    g.db[t] = db;
  }
}

template <int NS, class Coefficients>
static void retreat_states(BlockGrad& g, const float* saved, float* dstate, float* dA, int64_t stride, const float* A,
                           int64_t stride_a, const Coefficients& B, const Coefficients& C, CoefficientGrad& dB,
                           CoefficientGrad& dC, int64_t n, const Steps& steps, int width) {
  vf h[NS], dh[NS], da[NS], a[NS];
  for (int i = 0; i < NS; ++i) {
    h[i] = load_part(saved + (n + i) * stride, width);
    dh[i] = load_part(dstate + (n + i) * stride, width);
    da[i] = load_part(dA + (n + i) * stride, width);
    a[i] = load_part(A + (n + i) * stride_a, width);
  }
  retreat<NS>(g, h, dh, da, a, B, C, dB, dC, n, steps);
  for (int i = 0; i < NS; ++i) {
    store_part(dstate + (n + i) * stride, dh[i], width);
    store_part(dA + (n + i) * stride, da[i], width);
  }
}

template <class Coefficients>
static void backward_route(const ScanGrad& s, int64_t ib, int64_t ik, int64_t slice_index, int64_t d0, int64_t d1) {
  const int64_t chunks = (s.steps + CHUNK - 1) / CHUNK, plane = s.states * s.channels, slice = d1 - d0;
  const int64_t bk = ib * s.routes + ik;
  const std::vector<float> A = channels_last(s.A + ik * plane, d0, d1, s.states, 1.f);
  const int64_t* const order = s.order ? s.order + ik * s.steps : nullptr;
  const uint8_t* const flags = s.reset ? s.reset + ib * s.reset_b + ik * s.reset_k : nullptr;
  const float* const saved = s.checkpoints + bk * chunks * plane;
  float* const dstate = s.dinitial + bk * plane;  // doubles as the running gradient of the state
  float* const dA = s.dA + bk * plane;
  const float* const u = s.u.at(ib, s.shared_u ? 0 : ik);
  const float* const dy = s.dy.at(ib, s.merge ? 0 : ik);
  float* const du = s.du.at(ib, s.shared_u ? 0 : ik);
  const bool shared = lanes_share_groups(s);
  Coefficients B(s.B, s, ib, ik), C(s.C, s, ib, ik);
  CoefficientGrad dB(s.dB, s.B, s, slice_index, ib, ik, shared), dC(s.dC, s.C, s, slice_index, ib, ik, shared);
  Delta delta(s, ib, ik, d0, d1);
  BlockGrad g;

  for (int64_t n = 0; n < s.states; ++n)
    for (int64_t d = d0; d < d1; ++d) {
      dstate[n * s.channels + d] = s.dlast ? s.dlast[bk * plane + d * s.states + n] : 0.f;
      dA[n * s.channels + d] = 0.f;
    }
  for (int64_t d = d0; d < d1; ++d) {
    if (s.dD) s.dD[bk * s.channels + d] = 0.f;
    if (s.dbias) s.dbias[bk * s.channels + d] = 0.f;
  }
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const Steps steps(order, s.steps, chunk, flags);
    B.next_chunk();
    C.next_chunk();
    delta.next_chunk(steps);
    for (int64_t d = d0; d < d1; d += LANES) {
      const int width = int(std::min<int64_t>(LANES, d1 - d));
      load_tile(g.u, u + d * s.u.c, s.u.c, s.u.l, steps, width);
      load_tile(g.dy, dy + d * s.dy.c, s.dy.c, s.dy.l, steps, width);
      delta.load(g.raw, steps, d, width);
      for (int t = 0; t < steps.count; ++t) {
        g.dt[t] = g.raw[t];
        g.ddt[t] = g.db[t] = vf{};
      }
      if (s.softplus) softplus_tile(g.dt, steps.count);
      B.load(steps, d, width);
      C.load(steps, d, width);
      dB.enter(steps, d);
      dC.enter(steps, d);
      const float* a = &A[size_t(d - d0)];
      int64_t n = 0;
      for (; n + 2 <= s.states; n += 2)
        retreat_states<2>(g, saved + chunk * plane + d, dstate + d, dA + d, s.channels, a, slice, B, C, dB, dC, n, steps, width);
      for (; n < s.states; ++n)
        retreat_states<1>(g, saved + chunk * plane + d, dstate + d, dA + d, s.channels, a, slice, B, C, dB, dC, n, steps, width);
      dB.leave(steps, d, width);
      dC.leave(steps, d, width);

      const vf skip = s.D ? load_part(s.D + ik * s.channels + d, width) : vf{};
      vf dskip{}, dbias{};
      for (int t = 0; t < steps.count; ++t) {
        dskip += g.dy[t] * g.u[t];
        vf ddt = g.ddt[t] + g.db[t] * g.u[t];
        if (s.softplus) ddt *= sigmoid(g.raw[t]);
        g.ddt[t] = ddt;
        dbias += ddt;
        g.db[t] = g.db[t] * g.dt[t] + skip * g.dy[t];  // now the gradient of u
      }
      const int64_t channel = ik * s.channels + d + ib * s.routes * s.channels;
      if (s.dD) store_part(s.dD + channel, load_part(s.dD + channel, width) + dskip, width);
      if (s.dbias) store_part(s.dbias + channel, load_part(s.dbias + channel, width) + dbias, width);
      store_tile(g.db, du + d * s.du.c, s.du.c, s.du.l, steps, width, s.shared_u && ik > 0);
      store_tile(g.ddt, s.ddelta.at(ib, ik) + d * s.ddelta.c, s.ddelta.c, s.ddelta.l, steps, width, false);
    }
    dB.flush(steps, 0, LANES);
    dC.flush(steps, 0, LANES);
  }
}

static void scan_backward(const ScanGrad& s, int64_t ib, int64_t slice, int64_t d0, int64_t d1) {
  for (int64_t ik = 0; ik < s.routes; ++ik) {
    if (lanes_share_groups(s)) backward_route<SharedCoefficients>(s, ib, ik, slice, d0, d1);
    else backward_route<LaneCoefficients>(s, ib, ik, slice, d0, d1);
  }
}

}  // namespace
}  // namespace ssmvision
