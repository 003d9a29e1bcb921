// The adjoint of the selective scan on one CPU core: states are recomputed chunk by chunk from saved ones, in L1, and the
// recurrence of the gradients runs backward through them. Laid out as the forward scan is.
#include "scan_tiles.h"

namespace ssmvision {
namespace {

// What goes through a chunk together: NS states of NV vectors of channels share the loads of dt, x and dy, of B and C, and
// the sums that they add to.
constexpr int STATES = 2, VECTORS = 2;

// Gradients of B or C: one vector per [n][t], summed over channel blocks; lanes are added up once per chunk and group.
struct CoefficientGrad {
  float* base;  // (g, l, n) of this slice, sample and route
  int64_t states, tokens, per_group, group = -1;
  bool shared;
  std::vector<vf> sums;

  CoefficientGrad(float* partial, const GroupedView& v, const Scan& s, int64_t slice, int64_t ib, int64_t ik, bool shared_)
      : base(partial + ((slice * s.batch + ib) * s.routes + ik) * v.groups * s.tokens * s.states),
        states(s.states), tokens(s.tokens), per_group(s.channels / v.groups), shared(shared_),
        sums(size_t(ROOM * states)) {}

  vf* at(int64_t n) { return &sums[size_t(n * ROOM)]; }
  void enter(const Steps& s, int64_t d) {
    if (shared && group == d / per_group) return;
    flush(s);
    group = d / per_group;
  }
  // Channels of one vector that belong to different groups.
  void leave(const Steps& s, int64_t d, int width) {
    if (shared) return;
    for (int64_t n = 0; n < states; ++n)
      for (int t = 0; t < s.count; ++t) {
        vf& sum = at(n)[t];
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
      vf block[LANES] = {};
      float* to[LANES];
      int cells = 0;
      for (; cells < LANES && t < s.count; ++cells) {
        to[cells] = out + s.token[t] * states + n;
        block[cells] = at(n)[t];
        at(n)[t] = vf{};
        if (++n == states) n = 0, ++t;
      }
      const vf total = sum_lanes(block);
      for (int i = 0; i < cells; ++i) *to[i] += total[i];
    }
    group = -1;
  }
};

// What VECTORS vectors of channels of one chunk read and accumulate, in tiles.
struct BlockGrad {
  vf dt[VECTORS * ROOM], u[VECTORS * ROOM], dy[VECTORS * ROOM];
  vf slope[VECTORS * ROOM];  // of softplus, at delta
  vf x[VECTORS * ROOM];      // dt * u
  vf ddt[VECTORS * ROOM];    // through the decay
  vf db[VECTORS * ROOM];     // sum over states of dh * B: the gradient of x
};

// The states of NS states are recomputed forward, then the recurrence of the gradients runs backward. h enters as the
// state before the chunk; dh enters as the gradient of the state after it and leaves as that of the state before.
template <int NS, int NV, class Coefficient>
static void retreat(BlockGrad& g, const int v0, const vf* h, vf* dh, vf* da, const vf* a,
                    const vf* a2, const Coefficient* B,
                    const Coefficient* C, vf* dB, vf* dC, int64_t states, const Steps& steps, bool bounded) {
  constexpr int N = NS * NV;  // [i][j]
  const vf *dts = g.dt + v0 * ROOM, *xs = g.x + v0 * ROOM, *dys = g.dy + v0 * ROOM;
  vf *ddts = g.ddt + v0 * ROOM, *dbs = g.db + v0 * ROOM;
  vf state[CHUNK + 1][N], decay[CHUNK][N], grad_a[N], grad[N];
  if (!bounded) {
    for (int t = 0; t < steps.count; ++t)
      for (int i = 0; i < N; ++i) decay[t][i] = exp2v(dts[i % NV * ROOM + t] * a2[i]);
  }
  {
    vf s[N];
    for (int i = 0; i < N; ++i) state[0][i] = s[i] = h[i];
    const auto run=[&](auto && dec){
    for (int t = 0; t < steps.count; ++t, B += states) {
      vf e[N], x[NV];
      for (int j = 0; j < NV; ++j) x[j] = xs[j * ROOM + t];
      dec(t,e);
      if (__builtin_expect(steps.reset[t], 0))
        for (int i = 0; i < N; ++i) e[i] = s[i] = vf{};
      for (int i = 0; i < N; ++i) s[i] = e[i] * s[i] + x[i % NV] * lanes(B[i / NV]);
      for (int i = 0; i < N; ++i) decay[t][i] = e[i], state[t + 1][i] = s[i];
    }};
    if (bounded) run([&](int t,vf* e){
        vf d[N];
        for (int i = 0; i < N; ++i) d[i] = dts[i % NV * ROOM + t];
        exp2_products<N>(e, d, a2);
    }); else run([&](int t,vf* e){
        for (int i = 0; i < N; ++i) e[i] = decay[t][i];
    });
  }
  for (int i = 0; i < N; ++i) {
    grad_a[i] = da[i];
    grad[i] = dh[i];
  }
  C += steps.count * states;
  for (int t = steps.count - 1; t >= 0; --t) {
    B -= states;
    C -= states;
    vf ddt[NV], db[NV];
    for (int j = 0; j < NV; ++j) ddt[j] = ddts[j * ROOM + t], db[j] = dbs[j * ROOM + t];
    for (int i = 0; i < NS; ++i) {
      vf sum_b = dB[i * ROOM + t], sum_c = dC[i * ROOM + t];
      for (int j = 0; j < NV; ++j) {
        const int k = i * NV + j;
        const vf dy = dys[j * ROOM + t], dt = dts[j * ROOM + t], x = xs[j * ROOM + t];
        const vf dstate = grad[k] + dy * lanes(C[i]);
        sum_c += dy * state[t + 1][k];
        sum_b += dstate * x;
        grad[k] = dstate * decay[t][k];
        const vf ddecay = grad[k] * state[t][k];  // d loss / d (dt * A)
        grad_a[k] += ddecay * dt;
        ddt[j] += ddecay * a[k];
        db[j] += dstate * lanes(B[i]);
      }
      dB[i * ROOM + t] = sum_b;
      dC[i * ROOM + t] = sum_c;
    }
    for (int j = 0; j < NV; ++j) ddts[j * ROOM + t] = ddt[j], dbs[j * ROOM + t] = db[j];
  }
  for (int i = 0; i < N; ++i) {
    da[i] = grad_a[i];
    dh[i] = grad[i];
  }
}

template <int NS, int NV, class Coefficients>
static void retreat_states(BlockGrad& g, int v0, const float* saved, float* dstate, float* dA, int64_t stride, const float* A,
                           int64_t stride_a, const Coefficients& B, const Coefficients& C, CoefficientGrad& dB,
                           CoefficientGrad& dC, int64_t n, const Steps& steps, int width, bool bounded) {
  constexpr int N = NS * NV;
  vf h[N], dh[N], da[N], a[N], a2[N];
  for (int i = 0; i < N; ++i) {
    const int64_t at = (n + i / NV) * stride + i % NV * LANES;
    h[i] = load_part(saved + at, width);
    dh[i] = load_part(dstate + at, width);
    da[i] = load_part(dA + at, width);
    a[i] = load(A + (n + i / NV) * stride_a + i % NV * LANES);
    a2[i] = splat(LOG2E) * a[i];
  }
  retreat<NS, NV>(g, v0, h, dh, da, a, a2, B.at(0, n), C.at(0, n), dB.at(n), dC.at(n), B.states, steps, bounded);
  for (int i = 0; i < N; ++i) {
    const int64_t at = (n + i / NV) * stride + i % NV * LANES;
    store_part(dstate + at, dh[i], width);
    store_part(dA + at, da[i], width);
  }
}

// The gradients of u (in u's place) and of delta before softplus (in dt's place) once all states have been through. Also
// the gradients of D and of the bias.
static void finish(BlockGrad& g, int v, bool softplus, vf skip, vf& dskip, vf& dbias, int count) {
  dskip = dbias = vf{};
  for (int t = v * ROOM; t < v * ROOM + count; ++t) {
    dskip += g.dy[t] * g.u[t];
    vf ddt = g.ddt[t] + g.db[t] * g.u[t];
    if (softplus) ddt *= g.slope[t];
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
  BlockGrad g{};
  vf e[ROOM];

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
    for (int64_t block = d0; block < d1; block += VECTORS * LANES) {
      const int64_t end = std::min(d1, block + VECTORS * LANES);
      load_tile(g.u, u + block * s.u.c, s.u.c, s.u.l, steps, int(end - block));
      load_tile(g.dy, dy + block * s.dy.c, s.dy.c, s.dy.l, steps, int(end - block));
      delta.load(g.dt, steps, block, int(end - block));
      const int vectors = int(end - block + LANES - 1) / LANES;
      float largest = 0.f;
      for (int v = 0; v < vectors; ++v) {
        if (s.softplus) softplus_tile(g.dt + v * ROOM, g.slope + v * ROOM, e, steps.count);
        largest = std::max(largest, largest_magnitude(g.dt + v * ROOM, steps.count));
        for (int t = v * ROOM; t < v * ROOM + steps.count; ++t) {
          g.x[t] = g.dt[t] * g.u[t];
          g.ddt[t] = g.db[t] = vf{};
        }
      }
      const bool bounded = largest * steepest * LOG2E <= 126.f;  // false if NaN
      const auto through = [&]<int NV>(int v) {
        const int64_t d = block + v * LANES;
        const int width = int(std::min<int64_t>(LANES, end - d));
        B.load(steps, d, width);
        C.load(steps, d, width);
        dB.enter(steps, d);
        dC.enter(steps, d);
        const float* a = &A[size_t(d - d0)];
        const float* h = saved + chunk * plane + d;
        int64_t n = 0;
        for (; n + STATES <= s.states; n += STATES)
          retreat_states<STATES, NV>(g, v, h, dstate + d, dA + d, s.channels, a, slice, B, C, dB, dC, n, steps, width, bounded);
        for (; n < s.states; ++n)
          retreat_states<1, NV>(g, v, h, dstate + d, dA + d, s.channels, a, slice, B, C, dB, dC, n, steps, width, bounded);
        dB.leave(steps, d, width);
        dC.leave(steps, d, width);
      };
      if (shared && end - block == VECTORS * LANES && block / dB.per_group == (end - 1) / dB.per_group && block / dC.per_group == (end - 1) / dC.per_group)
        through.template operator()<VECTORS>(0);
      else
        for (int v = 0; v < vectors; ++v) through.template operator()<1>(v);
      for (int v = 0; v < vectors; ++v) {
        const int64_t d = block + v * LANES;
        const int width = int(std::min<int64_t>(LANES, end - d));
        const int64_t channel = bk * s.channels + d;
        const vf skip = s.D ? load_part(s.D + ik * s.channels + d, width) : vf{};
        vf dskip, dbias;
        finish(g, v, s.softplus, skip, dskip, dbias, steps.count);
        if (s.dD) store_part(s.dD + channel, load_part(s.dD + channel, width) + dskip, width);
        if (s.dbias) store_part(s.dbias + channel, load_part(s.dbias + channel, width) + dbias, width);
      }
      const int width = int(end - block);
      store_tile(g.u, du + block * s.du.c, s.du.c, s.du.l, steps, width, s.shared_u && ik > 0);
      store_tile(g.dt, s.ddelta.at(ib, ik) + block * s.ddelta.c, s.ddelta.c, s.ddelta.l, steps, width, false);
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
