// The adjoint of the selective scan on one CPU core: decays and states are recomputed chunk by chunk from saved states, in
// L1, and the recurrence of the gradients runs backward through them. Laid out as the forward scan is.
#include "scan_tiles.h"

namespace ssmvision {
namespace {

// What goes through a chunk together: two states of two vectors of channels share the loads of dt, x and dy, of B and C,
// and the sums that they add to. Stores are dear here: a 64-byte store takes Zen 4 as long as nearly two multiply-adds,
// and does not overlap with them.
constexpr int STATES = 2, VECTORS = 2;

// Gradients of B and C where all lanes of a channel block belong to one group of each. Four lanes at a time are added up
// as soon as they are known, by shuffles and additions that cost multiplications no time: then the sums of two states and
// of both gradients share one vector per step, and the sums of a chunk stay in L1. The rest is added up once per chunk.
struct SharedGrad {
  const ScanGrad& s;
  float *const dB, *const dC;  // (g, l, n) of this slice, sample and route
  const int64_t per_group_B, per_group_C;
  int64_t group_B = -1, group_C = -1;
  std::vector<vf> sums;  // [n / STATES][t]

  SharedGrad(const ScanGrad& scan, int64_t slice, int64_t ib, int64_t ik)
      : s(scan), dB(scan.dB + ((slice * s.batch + ib) * s.routes + ik) * s.B.groups * s.tokens * s.states),
        dC(scan.dC + ((slice * s.batch + ib) * s.routes + ik) * s.C.groups * s.tokens * s.states),
        per_group_B(s.channels / s.B.groups), per_group_C(s.channels / s.C.groups),
        sums(size_t((s.states + 1) / STATES * ROOM)) {}

  bool together(int64_t d, int64_t end) const {
    return d / per_group_B == (end - 1) / per_group_B && d / per_group_C == (end - 1) / per_group_C;
  }
  void enter(const Steps& steps, int64_t d, int) {
    if (group_B == d / per_group_B && group_C == d / per_group_C) return;
    flush(steps);
    group_B = d / per_group_B;
    group_C = d / per_group_C;
  }
  template <int NS>
  [[gnu::always_inline]] void add(const Steps&, int64_t n, int t, const vf* b, const vf* c) {
    vf& sum = sums.data()[n / STATES * ROOM + t];
    sum += NS == 1 ? sum_fours(b[0], c[0], vf{}, vf{}) : sum_fours(b[0], c[0], b[NS - 1], c[NS - 1]);
  }
  void flush(const Steps& steps) {
    if (group_B < 0) return;
    for (int t = 0; t < steps.count; ++t) {
      float* const b = dB + (group_B * s.tokens + steps.token[t]) * s.states;
      float* const c = dC + (group_C * s.tokens + steps.token[t]) * s.states;
      for (int64_t n = 0; n < s.states; n += STATES) {
        vf& sum = sums[size_t(n / STATES * ROOM + t)];
        float total[4] = {};
        for (int i = 0; i < LANES; ++i) total[i % 4] += sum[i];
        sum = vf{};
        for (int i = 0; i < STATES && n + i < s.states; ++i) {
          b[n + i] += total[2 * i];
          c[n + i] += total[2 * i + 1];
        }
      }
    }
    group_B = -1;
  }
};

// The same where the lanes of a channel block belong to different groups.
struct LaneGrad {
  const ScanGrad& s;
  float *const dB, *const dC;  // (g, l, n) of this slice, sample and route
  int64_t first = 0;
  int width = 0;

  LaneGrad(const ScanGrad& scan, int64_t slice, int64_t ib, int64_t ik)
      : s(scan), dB(scan.dB + ((slice * s.batch + ib) * s.routes + ik) * s.B.groups * s.tokens * s.states),
        dC(scan.dC + ((slice * s.batch + ib) * s.routes + ik) * s.C.groups * s.tokens * s.states) {}

  bool together(int64_t, int64_t) const { return false; }
  void enter(const Steps&, int64_t d, int width_) {
    first = d;
    width = width_;
  }
  template <int NS>
  void add(const Steps& steps, int64_t n, int t, const vf* b, const vf* c) {
    for (int i = 0; i < NS; ++i)
      for (int lane = 0; lane < width; ++lane) {
        const auto at = [&](const GroupedView& v) {
          return ((first + lane) / (s.channels / v.groups) * s.tokens + steps.token[t]) * s.states + n + i;
        };
        dB[at(s.B)] += b[i][lane];
        dC[at(s.C)] += c[i][lane];
      }
  }
  void flush(const Steps&) {}
};

// What one block of channels of one chunk reads and accumulates, in tiles.
struct BlockGrad {
  vf dt[VECTORS * ROOM], u[VECTORS * ROOM], dy[VECTORS * ROOM];
  vf slope[VECTORS * ROOM];  // of softplus
  vf x[VECTORS * ROOM];      // dt * u
  vf ddt[VECTORS * ROOM];    // through the decay
  vf db[VECTORS * ROOM];     // sum over states of dh * B: the gradient of x
};

// State k of the arrays below is state k / NV of vector k % NV.
template <int N>
struct History {
  vf decay[CHUNK][N], state[CHUNK + 1][N];
};

// The states after every step, from the one before the chunk; decay(t, e) computes the decays of step t.
template <int NS, int NV, class Decay, class Coefficient>
[[gnu::always_inline]] static inline void recompute(History<NS * NV>& past, const Decay& decay, const vf* x,
                                                    const Coefficient* B, int64_t states, const Steps& steps) {
  constexpr int N = NS * NV;
  vf h[N];
  for (int k = 0; k < N; ++k) h[k] = past.state[0][k];
  for (int t = 0; t < steps.count; ++t, B += states) {
    vf e[N];
    decay(t, e);
    if (__builtin_expect(steps.reset[t], 0))
      for (int k = 0; k < N; ++k) e[k] = h[k] = vf{};
    for (int k = 0; k < N; ++k) h[k] = e[k] * h[k] + x[k % NV * ROOM + t] * lanes(B[k / NV]);
    for (int k = 0; k < N; ++k) {
      past.decay[t][k] = e[k];
      past.state[t + 1][k] = h[k];
    }
  }
}

// The recurrence of the gradients, backward through a chunk. dh enters as the gradient of the state after the chunk and
// leaves as that of the state before it; da is added to.
template <int NS, int NV, class Coefficient, class Gradients>
static void retreat(const History<NS * NV>& past, BlockGrad& g, int first, vf* dh, vf* da, const vf* a,
                    const Coefficient* B, const Coefficient* C, int64_t states, Gradients& gradients, int64_t n,
                    const Steps& steps) {
  constexpr int N = NS * NV;
  vf grad[N], grad_a[N];
  for (int k = 0; k < N; ++k) {
    grad[k] = dh[k];
    grad_a[k] = da[k];
  }
  B += steps.count * states;
  C += steps.count * states;
  for (int t = steps.count - 1; t >= 0; --t) {
    B -= states;
    C -= states;
    const int at = first * ROOM + t;
    vf dB[NS] = {}, dC[NS] = {}, ddt[NV], db[NV];
    for (int j = 0; j < NV; ++j) {
      ddt[j] = g.ddt[at + j * ROOM];
      db[j] = g.db[at + j * ROOM];
    }
    for (int k = 0; k < N; ++k) {
      const int i = k / NV, j = k % NV, tile = at + j * ROOM;
      const vf dstate = grad[k] + g.dy[tile] * lanes(C[i]);
      dC[i] += g.dy[tile] * past.state[t + 1][k];
      dB[i] += g.x[tile] * dstate;
      grad[k] = dstate * past.decay[t][k];
      const vf ddecay = grad[k] * past.state[t][k];  // d loss / d (dt * A)
      grad_a[k] += ddecay * g.dt[tile];
      ddt[j] += ddecay * a[k];
      db[j] += dstate * lanes(B[i]);
    }
    gradients.template add<NS>(steps, n, t, dB, dC);
    for (int j = 0; j < NV; ++j) {
      g.ddt[at + j * ROOM] = ddt[j];
      g.db[at + j * ROOM] = db[j];
    }
  }
  for (int k = 0; k < N; ++k) {
    dh[k] = grad[k];
    da[k] = grad_a[k];
  }
}

// States n .. n + NS of vectors first .. first + NV of the block through one chunk. `saved`, `dstate` and `dA` are (n, d)
// with row length `stride`, at the first of these channels.
template <int NS, int NV, class Coefficients, class Gradients>
static void retreat_states(BlockGrad& g, int first, const float* saved, float* dstate, float* dA, int64_t stride,
                           const float* A, int64_t stride_a, const Coefficients& B, const Coefficients& C,
                           Gradients& gradients, int64_t n, const Steps& steps, int width, bool bounded) {
  constexpr int N = NS * NV;
  History<N> past;
  vf dh[N], da[N], a[N], a2[N];
  const auto at = [&](int k) { return (n + k / NV) * stride + k % NV * LANES; };
  for (int k = 0; k < N; ++k) {
    past.state[0][k] = load_part(saved + at(k), width);
    dh[k] = load_part(dstate + at(k), width);
    da[k] = load_part(dA + at(k), width);
    a[k] = load(A + (n + k / NV) * stride_a + k % NV * LANES);
    a2[k] = splat(LOG2E) * a[k];
  }
  const vf *dt = g.dt + first * ROOM, *x = g.x + first * ROOM;
  if (bounded) {
    recompute<NS, NV>(past, [&](int t, vf* e) {
      vf step[N];
      for (int k = 0; k < N; ++k) step[k] = dt[k % NV * ROOM + t];
      exp2_products<N>(e, step, a2);
    }, x, B.at(0, n), B.states, steps);
  } else {
    recompute<NS, NV>(past, [&](int t, vf* e) {
      for (int k = 0; k < N; ++k) e[k] = exp2v(dt[k % NV * ROOM + t] * a2[k]);
    }, x, B.at(0, n), B.states, steps);
  }
  retreat<NS, NV>(past, g, first, dh, da, a, B.at(0, n), C.at(0, n), B.states, gradients, n, steps);
  for (int k = 0; k < N; ++k) {
    store_part(dstate + at(k), dh[k], width);
    store_part(dA + at(k), da[k], width);
  }
}

// What the states of a vector add to, and what they share.
static void begin(BlockGrad& g, int v, int count) {
  for (int t = v * ROOM; t < v * ROOM + count; ++t) {
    g.x[t] = g.dt[t] * g.u[t];
    g.ddt[t] = g.db[t] = vf{};
  }
}

// The gradients of u (in u's place) and of delta before softplus (in dt's place) once all states have been through. Also
// those of D and of the bias: `parameter` and `gradient` are the first channel's place in a row of either.
static void finish(const ScanGrad& s, BlockGrad& g, int v, int64_t parameter, int64_t gradient, int width, int count) {
  const vf skip = s.D ? load_part(s.D + parameter, width) : vf{};
  vf dskip{}, dbias{};
  for (int t = v * ROOM; t < v * ROOM + count; ++t) {
    dskip += g.dy[t] * g.u[t];
    vf ddt = g.ddt[t] + g.db[t] * g.u[t];
    if (s.softplus) ddt *= g.slope[t];
    g.u[t] = g.db[t] * g.dt[t] + skip * g.dy[t];
    g.dt[t] = ddt;
    dbias += ddt;
  }
  const auto add = [&](float* sum, vf v) { store_part(sum, load_part(sum, width) + v, width); };
  if (s.dD) add(s.dD + gradient, dskip);
  if (s.dbias) add(s.dbias + gradient, dbias);
}

// What gradients that are added up start from; the running gradient of the state stands in dinitial.
static void clear(const ScanGrad& s, int64_t bk, int64_t d0, int64_t d1) {
  for (int64_t n = 0; n < s.states; ++n)
    for (int64_t d = d0; d < d1; ++d) {
      const int64_t at = (bk * s.states + n) * s.channels + d;
      s.dinitial[at] = s.dlast ? s.dlast[(bk * s.channels + d) * s.states + n] : 0.f;
      s.dA[at] = 0.f;
    }
  for (int64_t d = d0; d < d1; ++d) {
    if (s.dD) s.dD[bk * s.channels + d] = 0.f;
    if (s.dbias) s.dbias[bk * s.channels + d] = 0.f;
  }
}

template <class Coefficients, class Gradients>
static void backward_route(const ScanGrad& s, int64_t ib, int64_t ik, int64_t slice_index, int64_t d0, int64_t d1) {
  const int64_t chunks = (s.steps + CHUNK - 1) / CHUNK, plane = s.states * s.channels, slice = whole_vectors(d1 - d0);
  const int64_t bk = ib * s.routes + ik;
  const std::vector<float> A = channels_last(s.A + ik * plane, d0, d1, s.states, 1.f);
  float steepest = 0.f;
  for (const float a : A) steepest = std::max(steepest, std::abs(a));
  const int64_t* const order = s.order ? s.order + ik * s.steps : nullptr;
  const uint8_t* const flags = s.reset ? s.reset + ib * s.reset_b + ik * s.reset_k : nullptr;
  const float* const saved = s.checkpoints + bk * chunks * plane;
  float* const dstate = s.dinitial + bk * plane;
  float* const dA = s.dA + bk * plane;
  const float* const u = s.u.at(ib, s.shared_u ? 0 : ik);
  const float* const dy = s.dy.at(ib, s.merge ? 0 : ik);
  float* const du = s.du.at(ib, s.shared_u ? 0 : ik);
  float* const ddelta = s.ddelta.at(ib, ik);
  Coefficients B(s.B, s, ib, ik), C(s.C, s, ib, ik);
  Gradients gradients(s, slice_index, ib, ik);
  Delta delta(s, ib, ik, d0, d1);
  BlockGrad g{};

  clear(s, bk, d0, d1);
  // Vectors v .. v + NV of a block, from channel d on, through one chunk.
  const auto through = [&]<int NV>(const Steps& steps, int64_t chunk, int64_t d, int v, int width, bool bounded) {
    B.load(steps, d, width);
    C.load(steps, d, width);
    gradients.enter(steps, d, width);
    const float *a = &A[size_t(d - d0)], *h = saved + chunk * plane + d;
    int64_t n = 0;
    const auto states = [&]<int NS>() {
      retreat_states<NS, NV>(g, v, h, dstate + d, dA + d, s.channels, a, slice, B, C, gradients, n, steps, width, bounded);
      n += NS;
    };
    while (n + STATES <= s.states) states.template operator()<STATES>();
    while (n < s.states) states.template operator()<1>();
  };
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const Steps steps(order, s.steps, chunk, flags);
    B.next_chunk();
    C.next_chunk();
    delta.next_chunk(steps);
    for (int64_t block = d0; block < d1; block += VECTORS * LANES) {
      const int64_t end = std::min(d1, block + VECTORS * LANES);
      const int width = int(end - block), vectors = (width + LANES - 1) / LANES;
      load_tile(g.u, u + block * s.u.c, s.u.c, s.u.l, steps, width);
      load_tile(g.dy, dy + block * s.dy.c, s.dy.c, s.dy.l, steps, width);
      delta.load(g.dt, steps, block, width);
      prefetch_tile<true>(du + block, s.du.c, s.du.l, steps);
      prefetch_tile<true>(ddelta + block, s.ddelta.c, s.ddelta.l, steps);
      if (end == d1 && chunk > 0) {
        const Steps ahead(order, s.steps, chunk - 1, flags);
        prefetch_tile<false>(u + d0, s.u.c, s.u.l, ahead);
        prefetch_tile<false>(dy + d0, s.dy.c, s.dy.l, ahead);
        prefetch_tile<false>(s.delta.at(ib, ik) + d0, s.delta.c, s.delta.l, ahead);
      }
      bool bounded = true;
      for (int v = 0; v < vectors; ++v) {
        const int part = std::min(LANES, width - v * LANES);
        delta.activate(g.dt + v * ROOM, g.slope + v * ROOM, steps, block + v * LANES, part);
        bounded &= largest_magnitude(g.dt + v * ROOM, steps.count) * steepest * LOG2E <= 126.f;  // false if NaN
        begin(g, v, steps.count);
      }
      if (width == VECTORS * LANES && gradients.together(block, end)) {
        through.template operator()<VECTORS>(steps, chunk, block, 0, LANES, bounded);
      } else {
        for (int v = 0; v < vectors; ++v)
          through.template operator()<1>(
              steps, chunk, block + v * LANES, v, std::min(LANES, width - v * LANES), bounded);
      }
      for (int v = 0; v < vectors; ++v) {
        const int64_t d = block + v * LANES;
        finish(s, g, v, ik * s.channels + d, bk * s.channels + d, std::min(LANES, width - v * LANES), steps.count);
      }
      store_tile(g.u, du + block * s.du.c, s.du.c, s.du.l, steps, width, s.shared_u && ik > 0);
      store_tile(g.dt, ddelta + block * s.ddelta.c, s.ddelta.c, s.ddelta.l, steps, width, false);
    }
    gradients.flush(steps);
  }
}

}  // namespace

void scan_backward(const ScanGrad& s, int64_t ib, int64_t slice, int64_t d0, int64_t d1) {
  for (int64_t ik = 0; ik < s.routes; ++ik) {
    if (lanes_share_groups(s)) backward_route<SharedCoefficients, SharedGrad>(s, ib, ik, slice, d0, d1);
    else backward_route<LaneCoefficients, LaneGrad>(s, ib, ik, slice, d0, d1);
  }
}

}  // namespace ssmvision
