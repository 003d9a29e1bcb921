// The adjoint of the selective scan on one CPU core: states are recomputed chunk by chunk from saved ones, in L1, and the
// recurrence of the gradients runs backward through them. Laid out as the forward scan is.
#include "scan_tiles.h"

namespace ssmvision {
namespace {

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

}  // namespace

void scan_backward(const ScanGrad& s, int64_t ib, int64_t slice, int64_t d0, int64_t d1) {
  for (int64_t ik = 0; ik < s.routes; ++ik) {
    if (lanes_share_groups(s)) backward_route<SharedCoefficients>(s, ib, ik, slice, d0, d1);
    else backward_route<LaneCoefficients>(s, ib, ik, slice, d0, d1);
  }
}

}  // namespace ssmvision
