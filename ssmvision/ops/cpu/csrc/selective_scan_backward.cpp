// The adjoint of the selective scan on one CPU core: states are recomputed chunk by chunk from saved ones, in L1, and the
// recurrence of the gradients runs backward through them. Laid out as the forward scan is.
#include "scan_tiles.h"

namespace ssmvision {
namespace {

constexpr int STATES = 2;  // that go through a chunk together: they share the loads of dt, x and dy

// Gradients of B or C: one vector per [t][n], summed over channel blocks; lanes are added up once per chunk and group.
struct CoefficientGrad {
  float* base;  // (g, l, n) of this slice, sample and route
  int64_t states, tokens, per_group, group = -1;
  bool shared;
  std::vector<vf> sums;

  CoefficientGrad(float* partial, const GroupedView& v, const Scan& s, int64_t slice, int64_t ib, int64_t ik, bool shared_)
      : base(partial + ((slice * s.batch + ib) * s.routes + ik) * v.groups * s.tokens * s.states),
        states(s.states), tokens(s.tokens), per_group(s.channels / v.groups), shared(shared_),
        sums(size_t(CHUNK * states + LANES)) {}

  vf* at(int64_t n) { return &sums[size_t(n)]; }
  void enter(const Steps& s, int64_t d) {
    if (shared && group == d / per_group) return;
    flush(s);
    group = d / per_group;
  }
  // Channels of one vector that belong to different groups.
  void leave(const Steps& s, int64_t d, int width) {
    if (shared) return;
    for (int t = 0; t < s.count; ++t)
      for (int64_t n = 0; n < states; ++n) {
        vf& sum = sums[size_t(t * states + n)];
        for (int i = 0; i < width; ++i) base[((d + i) / per_group * tokens + s.token[t]) * states + n] += sum[i];
        sum = vf{};
      }
    group = -1;
  }
  void flush(const Steps& s) {
    if (group < 0) return;
    float* const out = base + group * tokens * states;
    int t = 0;
    int64_t n = 0;
    for (int64_t cell = 0; cell < s.count * states; cell += LANES) {  // LANES cells at a time: no horizontal sums
      vf* const block = &sums[size_t(cell)];
      transpose(block);
      vf total{};
      for (int i = 0; i < LANES; ++i) {
        total += block[i];
        block[i] = vf{};
      }
      for (int i = 0; i < LANES && t < s.count; ++i) {
        out[s.token[t] * states + n] += total[i];
        if (++n == states) n = 0, ++t;
      }
    }
    group = -1;
  }
};

// What one vector of channels of one chunk reads and accumulates.
struct BlockGrad {
  vf *dt, *u, *dy;
  vf x[CHUNK];    // dt * u
  vf ddt[CHUNK];  // through the decay
  vf db[CHUNK];   // sum over states of dh * B: the gradient of x
};

// The states of NS states are recomputed forward, then the recurrence of the gradients runs backward. h enters as the
// state before the chunk; dh enters as the gradient of the state after it and leaves as that of the state before.
template <int NS, class Coefficient>
static void retreat(BlockGrad& g, vf (*decay)[ROOM], const vf* h, vf* dh, vf* da, const vf* a, const Coefficient* B,
                    const Coefficient* C, vf* dB, vf* dC, int64_t states, const Steps& steps) {
  vf state[CHUNK + 1][NS], grad_a[NS], grad[NS];
  for (int i = 0; i < NS; ++i) {
    state[0][i] = h[i];
    grad_a[i] = da[i];
    grad[i] = dh[i];
  }
  for (int t = 0; t < steps.count; ++t, B += states)
    for (int i = 0; i < NS; ++i) {
      if (__builtin_expect(steps.reset[t], 0)) {
        decay[i][t] = vf{};
        state[t + 1][i] = g.x[t] * lanes(B[i]);
      } else {
        state[t + 1][i] = decay[i][t] * state[t][i] + g.x[t] * lanes(B[i]);
      }
    }
  C += steps.count * states;
  dB += steps.count * states;
  dC += steps.count * states;
  for (int t = steps.count - 1; t >= 0; --t) {
    B -= states;
    C -= states;
    dB -= states;
    dC -= states;
    const vf dy = g.dy[t], dt = g.dt[t], x = g.x[t];
    vf ddt = g.ddt[t], db = g.db[t];
    for (int i = 0; i < NS; ++i) {
      const vf dstate = grad[i] + dy * lanes(C[i]);
      dC[i] += dy * state[t + 1][i];
      dB[i] += dstate * x;
      grad[i] = dstate * decay[i][t];
      const vf ddecay = grad[i] * state[t][i];  // d loss / d (dt * A)
      grad_a[i] += ddecay * dt;
      ddt += ddecay * a[i];
      db += dstate * lanes(B[i]);
    }
    g.ddt[t] = ddt;
    g.db[t] = db;
  }
  for (int i = 0; i < NS; ++i) {
    da[i] = grad_a[i];
    dh[i] = grad[i];
  }
}

template <int NS, class Coefficients>
static void retreat_states(BlockGrad& g, const float* saved, float* dstate, float* dA, int64_t stride, const float* A,
                           int64_t stride_a, const Coefficients& B, const Coefficients& C, CoefficientGrad& dB,
                           CoefficientGrad& dC, int64_t n, const Steps& steps, int width, bool bounded) {
  vf h[NS], dh[NS], da[NS], a[NS], a2[NS], decay[NS][ROOM];
  for (int i = 0; i < NS; ++i) {
    h[i] = load_part(saved + (n + i) * stride, width);
    dh[i] = load_part(dstate + (n + i) * stride, width);
    da[i] = load_part(dA + (n + i) * stride, width);
    a[i] = load(A + (n + i) * stride_a);
    a2[i] = splat(LOG2E) * a[i];
  }
  decays<NS>(decay, g.dt, a2, bounded, steps.count);
  retreat<NS>(g, decay, h, dh, da, a, B.at(0, n), C.at(0, n), dB.at(n), dC.at(n), B.states, steps);
  for (int i = 0; i < NS; ++i) {
    store_part(dstate + (n + i) * stride, dh[i], width);
    store_part(dA + (n + i) * stride, da[i], width);
  }
}

// The gradients of u (in u's place) and of delta before softplus (in dt's place) once all states have been through; e is
// what softplus_tile left, raw its argument. Also the gradients of D and of the bias.
static void finish(BlockGrad& g, const vf* raw, const vf* e, bool softplus, vf skip, vf& dskip, vf& dbias, int count) {
  dskip = dbias = vf{};
  for (int t = 0; t < count; ++t) {
    dskip += g.dy[t] * g.u[t];
    vf ddt = g.ddt[t] + g.db[t] * g.u[t];
    if (softplus) ddt *= sigmoid(raw[t], e[t]);
    g.u[t] = g.db[t] * g.dt[t] + skip * g.dy[t];
    g.dt[t] = ddt;
    dbias += ddt;
  }
}

template <class Coefficients>
static void backward_route(const ScanGrad& s, int64_t ib, int64_t ik, int64_t slice_index, int64_t d0, int64_t d1) {
  const int64_t chunks = (s.steps + CHUNK - 1) / CHUNK, plane = s.states * s.channels, slice = whole_vectors(d1 - d0);
  const int64_t bk = ib * s.routes + ik;
  const std::vector<float> A = channels_last(s.A + ik * plane, d0, d1, s.states, 1.f);
  float steepest = 0.f;
  for (const float a : A) steepest = std::max(steepest, std::abs(a));
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
  vf dts[2 * ROOM] = {}, us[2 * ROOM], dys[2 * ROOM], raw[CHUNK], e[ROOM];
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
    for (int64_t block = d0; block < d1; block += 2 * LANES) {
      const int64_t end = std::min(d1, block + 2 * LANES);
      load_tile(us, u + block * s.u.c, s.u.c, s.u.l, steps, int(end - block));
      load_tile(dys, dy + block * s.dy.c, s.dy.c, s.dy.l, steps, int(end - block));
      delta.load(dts, steps, block, int(end - block));
      g.dt = dts, g.u = us, g.dy = dys;
      for (int64_t d = block; d < end; d += LANES, g.dt += ROOM, g.u += ROOM, g.dy += ROOM) {
        const int width = int(std::min<int64_t>(LANES, end - d));
        std::copy(g.dt, g.dt + steps.count, raw);
        if (s.softplus) softplus_tile(g.dt, e, steps.count);
        const bool bounded = largest_magnitude(g.dt, steps.count) * steepest * LOG2E <= 126.f;  // false if NaN
        for (int t = 0; t < steps.count; ++t) {
          g.x[t] = g.dt[t] * g.u[t];
          g.ddt[t] = g.db[t] = vf{};
        }
        B.load(steps, d, width);
        C.load(steps, d, width);
        dB.enter(steps, d);
        dC.enter(steps, d);
        const float* a = &A[size_t(d - d0)];
        const float* h = saved + chunk * plane + d;
        int64_t n = 0;
        for (; n + STATES <= s.states; n += STATES)
          retreat_states<STATES>(g, h, dstate + d, dA + d, s.channels, a, slice, B, C, dB, dC, n, steps, width, bounded);
        for (; n < s.states; ++n)
          retreat_states<1>(g, h, dstate + d, dA + d, s.channels, a, slice, B, C, dB, dC, n, steps, width, bounded);
        dB.leave(steps, d, width);
        dC.leave(steps, d, width);

        const int64_t channel = bk * s.channels + d;
        const vf skip = s.D ? load_part(s.D + ik * s.channels + d, width) : vf{};
        vf dskip, dbias;
        finish(g, raw, e, s.softplus, skip, dskip, dbias, steps.count);
        if (s.dD) store_part(s.dD + channel, load_part(s.dD + channel, width) + dskip, width);
        if (s.dbias) store_part(s.dbias + channel, load_part(s.dbias + channel, width) + dbias, width);
      }
      const int width = int(end - block);
      store_tile(us, du + block * s.du.c, s.du.c, s.du.l, steps, width, s.shared_u && ik > 0);
      store_tile(dts, s.ddelta.at(ib, ik) + block * s.ddelta.c, s.ddelta.c, s.ddelta.l, steps, width, false);
    }
    dB.flush(steps);
    dC.flush(steps);
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
