// The scan of Mamba-2 and its adjoint on one CPU core.
//
// A head's state is a matrix (n, p) that one number per step lets decay. Lanes run over p; a block of rows stays in
// registers while a chunk of steps goes by, and two vectors of p share what is broadcast from B and C. Tiles are padded
// to whole vectors, so that no inner loop has a remainder.
#include <vector>

#include "tiles.h"

namespace ssmvision {
namespace {

constexpr int ROWS = 4;  // rows of the state in registers, times two vectors each

// One head's chunk. Tiles are [t][v] with v vectors of p, B and C are [t][n].
struct Chunk {
  const Ssd& s;
  const int64_t ib, ih, vectors;
  float step[CHUNK], decay[CHUNK];
  std::vector<vf> x, drive;  // drive = step * x
  std::vector<float> B, C;

  Chunk(const Ssd& s_, int64_t ib_, int64_t ih_)
      : s(s_), ib(ib_), ih(ih_), vectors((s_.head_dim + LANES - 1) / LANES), step(), decay(),
        x(size_t(CHUNK * vectors)), drive(size_t(CHUNK * vectors)), B(size_t(CHUNK * s_.states)),
        C(size_t(CHUNK * s_.states)) {}

  void load(const Steps& steps) {
    const float* p = s.step.at(ib, ih);
    for (int t = 0; t < steps.count; ++t) step[t] = p[steps.token[t] * s.step.l];
    const vf a2 = splat(s.A[ih] * LOG2E);
    for (int t = 0; t < steps.count; t += LANES) store(decay + t, exp2v(a2 * ::load(step + t)));
    load_rows(x.data(), s.x, steps);
    for (int64_t i = 0; i < steps.count * vectors; ++i) drive[size_t(i)] = x[size_t(i)] * splat(step[i / vectors]);
    coefficients(B, s.B, steps);
    coefficients(C, s.C, steps);
  }
  void load_rows(vf* tile, const View& from, const Steps& steps) const {
    const float* p = from.at(ib, ih);
    for (int t = 0; t < steps.count; ++t)
      for (int64_t v = 0; v < vectors; ++v)
        tile[t * vectors + v] = load_row(p + steps.token[t] * from.l + v * LANES * from.c, from.c, width(v));
  }
  void store_rows(const vf* tile, const View& to, const Steps& steps) const {
    float* p = to.at(ib, ih);
    for (int t = 0; t < steps.count; ++t)
      for (int64_t v = 0; v < vectors; ++v)
        store_part(p + steps.token[t] * to.l + v * LANES, tile[t * vectors + v], width(v));
  }
  void coefficients(std::vector<float>& tile, const View& from, const Steps& steps) const {
    const float* p = from.at(ib, group());
    for (int t = 0; t < steps.count; ++t)
      for (int64_t n = 0; n < s.states; ++n) tile[size_t(t * s.states + n)] = p[steps.token[t] * from.l + n * from.c];
  }
  int64_t group() const { return ih / (s.heads / s.groups); }
  int width(int64_t v) const { return int(std::min<int64_t>(LANES, s.head_dim - v * LANES)); }

  // State matrices in memory are (n, p) without padding.
  void load_state(vf* state, const float* p) const {
    for (int64_t n = 0; n < s.states; ++n)
      for (int64_t v = 0; v < vectors; ++v)
        state[n * vectors + v] = load_part(p + n * s.head_dim + v * LANES, width(v));
  }
  void store_state(const vf* state, float* p) const {
    for (int64_t n = 0; n < s.states; ++n)
      for (int64_t v = 0; v < vectors; ++v)
        store_part(p + n * s.head_dim + v * LANES, state[n * vectors + v], width(v));
  }
  // From (p, n), the public layout; zero if there is none.
  void load_transposed(vf* state, const float* p) const {
    for (int64_t n = 0; n < s.states; ++n)
      for (int64_t i = 0; i < vectors * LANES; ++i)
        state[n * vectors + i / LANES][i % LANES] = p && i < s.head_dim ? p[i * s.states + n] : 0.f;
  }
};

// Calls rows.template operator()<NS>(n) or <1>(n) for blocks of rows n that cover the state.
template <int NS, class Rows>
inline void for_each_block(int64_t states, const Rows& rows) {
  int64_t n = 0;
  for (; n + NS <= states; n += NS) rows.template operator()<NS>(n);
  for (; n < states; ++n) rows.template operator()<1>(n);
}

// Rows n .. n + NS and vectors v .. v + NV of the state through one chunk; y is added to.
template <int NS, int NV>
static void advance(const Chunk& c, const Steps& steps, vf* state, vf* y, int64_t n, int64_t v) {
  const int64_t vectors = c.vectors, states = c.s.states;
  vf h[NS][NV];
  for (int i = 0; i < NS; ++i)
    for (int j = 0; j < NV; ++j) h[i][j] = state[(n + i) * vectors + v + j];
  for (int t = 0; t < steps.count; ++t) {
    const float *B = &c.B[size_t(t * states + n)], *C = &c.C[size_t(t * states + n)];
    const vf decay = splat(c.decay[t]);
    vf drive[NV], out[NV];
    for (int j = 0; j < NV; ++j) {
      drive[j] = c.drive[size_t(t * vectors + v + j)];
      out[j] = y[t * vectors + v + j];
    }
    if (__builtin_expect(steps.reset[t], 0))
      for (int i = 0; i < NS; ++i)
        for (int j = 0; j < NV; ++j) h[i][j] = vf{};
    for (int i = 0; i < NS; ++i)
      for (int j = 0; j < NV; ++j) {
        h[i][j] = decay * h[i][j] + drive[j] * splat(B[i]);
        out[j] += h[i][j] * splat(C[i]);
      }
    for (int j = 0; j < NV; ++j) y[t * vectors + v + j] = out[j];
  }
  for (int i = 0; i < NS; ++i)
    for (int j = 0; j < NV; ++j) state[(n + i) * vectors + v + j] = h[i][j];
}

// What the backward pass of a chunk accumulates: per step, and per step and row for one block of rows.
struct ChunkGrad {
  std::vector<vf> dy, ddrive;  // [t][v]
  vf ddecay[CHUNK];            // gradient of step * A; lanes are added up at the end
  vf dB[CHUNK][ROWS], dC[CHUNK][ROWS];
};

// States n .. n + NS of vectors v .. v + NV are recomputed forward through the chunk, then the recurrence of their
// gradients runs backward. dstate enters as the gradient of the state after the chunk and leaves as that before it.
template <int NS, int NV>
static void retreat(const Chunk& c, ChunkGrad& g, const Steps& steps, const vf* state, vf* dstate, int64_t n,
                    int64_t v) {
  const int64_t vectors = c.vectors, states = c.s.states;
  vf h[CHUNK + 1][NS][NV], dh[NS][NV];
  for (int i = 0; i < NS; ++i)
    for (int j = 0; j < NV; ++j) {
      h[0][i][j] = state[(n + i) * vectors + v + j];
      dh[i][j] = dstate[(n + i) * vectors + v + j];
    }
  for (int t = 0; t < steps.count; ++t) {
    const float* B = &c.B[size_t(t * states + n)];
    const vf decay = splat(c.decay[t]), *drive = &c.drive[size_t(t * vectors + v)];
    const bool cut = steps.reset[t];
    for (int i = 0; i < NS; ++i)
      for (int j = 0; j < NV; ++j)
        h[t + 1][i][j] = (cut ? vf{} : decay * h[t][i][j]) + drive[j] * splat(B[i]);
  }
  for (int t = steps.count - 1; t >= 0; --t) {
    const float *B = &c.B[size_t(t * states + n)], *C = &c.C[size_t(t * states + n)];
    const int64_t row = t * vectors + v;
    const vf decay = splat(steps.reset[t] ? 0.f : c.decay[t]);
    vf dy[NV], drive[NV], ddrive[NV], ddecay = g.ddecay[t];
    for (int j = 0; j < NV; ++j) {
      dy[j] = g.dy[size_t(row + j)];
      drive[j] = c.drive[size_t(row + j)];
      ddrive[j] = g.ddrive[size_t(row + j)];
    }
    for (int i = 0; i < NS; ++i) {
      vf dB = g.dB[t][i], dC = g.dC[t][i];
      for (int j = 0; j < NV; ++j) {
        const vf grad = dh[i][j] + dy[j] * splat(C[i]);
        dC += dy[j] * h[t + 1][i][j];
        dB += grad * drive[j];
        ddrive[j] += grad * splat(B[i]);
        dh[i][j] = grad * decay;
        ddecay += dh[i][j] * h[t][i][j];
      }
      g.dB[t][i] = dB;
      g.dC[t][i] = dC;
    }
    for (int j = 0; j < NV; ++j) g.ddrive[size_t(row + j)] = ddrive[j];
    g.ddecay[t] = ddecay;
  }
  for (int i = 0; i < NS; ++i)
    for (int j = 0; j < NV; ++j) dstate[(n + i) * vectors + v + j] = dh[i][j];
}

// Adds the lanes of rows n .. n + NS to a partial sum (l, n) and clears them.
template <int NS>
static void flush(vf (*sums)[ROWS], float* partial, const Steps& steps, int64_t states, int64_t n) {
  for (int t = 0; t < steps.count; ++t)
    for (int i = 0; i < NS; ++i) {
      partial[steps.token[t] * states + n + i] += hsum(sums[t][i]);
      sums[t][i] = vf{};
    }
}

}  // namespace

void ssd_forward(const Ssd& s, int64_t ib, int64_t ih) {
  const int64_t chunks = (s.tokens + CHUNK - 1) / CHUNK, plane = s.states * s.head_dim, bh = ib * s.heads + ih;
  const uint8_t* const flags = s.reset ? s.reset + ib * s.tokens : nullptr;
  Chunk c(s, ib, ih);
  std::vector<vf> state(size_t(s.states * c.vectors)), y(size_t(CHUNK * c.vectors));
  c.load_transposed(state.data(), s.initial ? s.initial + bh * plane : nullptr);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Steps steps(nullptr, s.tokens, chunk, flags);
    c.store_state(state.data(), s.checkpoints + (bh * chunks + chunk) * plane);
    c.load(steps);
    std::fill(y.begin(), y.end(), vf{});
    for_each_block<ROWS>(s.states, [&]<int NS>(int64_t n) {
      int64_t v = 0;
      for (; v + 2 <= c.vectors; v += 2) advance<NS, 2>(c, steps, state.data(), y.data(), n, v);
      for (; v < c.vectors; ++v) advance<NS, 1>(c, steps, state.data(), y.data(), n, v);
    });
    c.store_rows(y.data(), s.y, steps);
  }
  c.store_state(state.data(), s.last + bh * plane);
}

void ssd_backward(const SsdGrad& s, int64_t ib, int64_t slice, int64_t ih) {
  const int64_t chunks = (s.tokens + CHUNK - 1) / CHUNK, plane = s.states * s.head_dim, bh = ib * s.heads + ih;
  const uint8_t* const flags = s.reset ? s.reset + ib * s.tokens : nullptr;
  Chunk c(s, ib, ih);
  ChunkGrad g{};
  g.dy.resize(c.x.size());
  g.ddrive.resize(c.x.size());
  std::vector<vf> state(size_t(s.states * c.vectors)), dstate(state.size());
  const int64_t partial = ((slice * s.batch + ib) * s.groups + c.group()) * s.tokens * s.states;
  float dA = 0.f;
  c.load_transposed(dstate.data(), s.dlast ? s.dlast + bh * plane : nullptr);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const Steps steps(nullptr, s.tokens, chunk, flags);
    c.load(steps);
    c.load_rows(g.dy.data(), s.dy, steps);
    c.load_state(state.data(), s.checkpoints + (bh * chunks + chunk) * plane);
    std::fill(g.ddrive.begin(), g.ddrive.end(), vf{});
    std::fill(g.ddecay, g.ddecay + CHUNK, vf{});
    for_each_block<ROWS>(s.states, [&]<int NS>(int64_t n) {
      int64_t v = 0;
      for (; v + 2 <= c.vectors; v += 2) retreat<NS, 2>(c, g, steps, state.data(), dstate.data(), n, v);
      for (; v < c.vectors; ++v) retreat<NS, 1>(c, g, steps, state.data(), dstate.data(), n, v);
      flush<NS>(g.dB, s.dB + partial, steps, s.states, n);
      flush<NS>(g.dC, s.dC + partial, steps, s.states, n);
    });
    for (int t = 0; t < steps.count; ++t) {
      vf through_drive{};
      for (int64_t v = 0; v < c.vectors; ++v) {
        vf& ddrive = g.ddrive[size_t(t * c.vectors + v)];
        through_drive += ddrive * c.x[size_t(t * c.vectors + v)];
        ddrive *= splat(c.step[t]);  // now the gradient of x
      }
      const float dexponent = hsum(g.ddecay[t]);
      dA += dexponent * c.step[t];
      s.dstep.at(ib, ih)[steps.token[t] * s.dstep.l] = dexponent * s.A[ih] + hsum(through_drive);
    }
    c.store_rows(g.ddrive.data(), s.dx, steps);
  }
  s.dA[bh] = dA;
  c.store_state(dstate.data(), s.dinitial + bh * plane);
}

}  // namespace ssmvision
