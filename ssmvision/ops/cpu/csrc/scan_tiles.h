// What the forward and the backward scan share: B, C and delta of one chunk, in L1, along a route.
#pragma once
#include <cmath>
#include <vector>

#include "tiles.h"

namespace ssmvision {
namespace {

inline int64_t whole_vectors(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }

// (d, rows) -> (rows, d) for the channels of one task, so that lanes load contiguous channels; rows are padded with zeros
// to whole vectors.
inline std::vector<float> channels_last(const float* p, int64_t d0, int64_t d1, int64_t rows, float scale) {
  const int64_t stride = whole_vectors(d1 - d0);
  std::vector<float> out(size_t(rows * stride));
  for (int64_t d = d0; d < d1; d += LANES) {
    const int64_t width = std::min<int64_t>(LANES, d1 - d);
    int64_t r = 0;
    for (; width == LANES && r + LANES <= rows; r += LANES) {
      vf block[LANES];
      for (int i = 0; i < LANES; ++i) block[i] = splat(scale) * load(p + (d + i) * rows + r);
      transpose(block);
      for (int i = 0; i < LANES; ++i) store(&out[size_t((r + i) * stride + d - d0)], block[i]);
    }
    for (; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i) out[size_t(r * stride + d - d0 + i)] = scale * p[(d + i) * rows + r];
  }
  return out;
}

// Calls body.operator()<N>(t) for blocks of N steps and <1> for the rest: N independent chains hide each other's latency.
template <int N, class Body>
[[gnu::always_inline]] inline void in_blocks(int count, const Body& body) {
  int t = 0;
  for (; t + N <= count; t += N) body.template operator()<N>(t);
  for (; t < count; ++t) body.template operator()<1>(t);
}

inline vf lanes(float shared) { return splat(shared); }
inline vf lanes(vf own) { return own; }

// B or C of one chunk when all lanes of a channel block belong to one group: scalars [t][n], broadcast on use.
struct SharedCoefficients {
  const GroupedView& view;
  const float* base;
  int64_t states, per_group, group = -1;
  std::vector<float> values;

  SharedCoefficients(const GroupedView& v, const Scan& s, int64_t ib, int64_t ik)
      : view(v), base(v.at(ib, ik)), states(s.states), per_group(s.channels / v.groups), values(size_t(CHUNK * states)) {}

  const float* at(int t, int64_t n) const { return &values[size_t(t * states + n)]; }
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

  const vf* at(int t, int64_t n) const { return &values[size_t(t * states + n)]; }
  void next_chunk() {}
  void load(const Steps& s, int64_t d, int width) {
    for (int t = 0; t < s.count; ++t)
      for (int64_t n = 0; n < states; ++n)
        for (int i = 0; i < width; ++i)
          values[size_t(t * states + n)][i] = base[(d + i) / per_group * view.c + n * view.n + s.token[t] * view.l];
  }
};

inline bool lanes_share_groups(const Scan& s) {
  const auto shared = [&](const GroupedView& v) { return v.groups == 1 || s.channels / v.groups % LANES == 0; };
  return shared(s.B) && shared(s.C);
}

// x = log(1 + exp(x + bias)); and slope = 1 / (1 + exp(-x - bias)) of the old x, unless it is null.
inline void softplus_tile(vf* x, vf bias, vf* slope, int count) {
  for (int t = 0; t < count; t += LOCKSTEP) {
    vf raw[LOCKSTEP], e[LOCKSTEP];
    for (int i = 0; i < LOCKSTEP; ++i) raw[i] = x[t + i] + bias;
    softplus<LOCKSTEP>(x + t, e, raw);
    for (int i = 0; slope && i < LOCKSTEP; ++i) slope[t + i] = sigmoid(raw[i], e[i]);
  }
}

// Delta of one route as the kernels need it: loaded, or projected from its low-rank form inside the chunk.
struct Delta {
  const Scan& s;
  int64_t ib, ik, d0, slice;
  std::vector<float> weight, rows;  // (r, d) of this task; [t][r] of this chunk

  Delta(const Scan& scan, int64_t ib_, int64_t ik_, int64_t d0_, int64_t d1)
      : s(scan), ib(ib_), ik(ik_), d0(d0_), slice(whole_vectors(d1 - d0_)) {
    if (!s.projection) return;
    weight = channels_last(s.projection + ik * s.channels * s.rank, d0, d1, s.rank, 1.f);
    rows.resize(size_t(CHUNK * s.rank));
  }
  void next_chunk(const Steps& steps) {
    const float* p = s.delta.at(ib, ik);
    for (int64_t r = 0; r < (s.projection ? s.rank : 0); ++r)
      for (int t = 0; t < steps.count; ++t) rows[size_t(t * s.rank + r)] = p[r * s.delta.c + steps.token[t] * s.delta.l];
  }
  // Delta of channels d .. d + width, yet without the bias.
  void load(vf* raw, const Steps& steps, int64_t d, int width) const {
    if (!s.projection) return load_tile(raw, s.delta.at(ib, ik) + d * s.delta.c, s.delta.c, s.delta.l, steps, width);
    for (int c = 0; c < width; c += LANES, raw += ROOM) project(raw, steps, &weight[size_t(d + c - d0)]);
  }
  // The step sizes of one vector of channels, from what `load` left; and the slope of softplus unless it is null.
  void activate(vf* raw, vf* slope, const Steps& steps, int64_t d, int width) const {
    const vf bias = s.bias ? load_part(s.bias + ik * s.channels + d, width) : vf{};
    if (s.softplus) softplus_tile(raw, bias, slope, steps.count);
    else if (s.bias) for (int t = 0; t < steps.count; ++t) raw[t] += bias;
  }
  // The sums of eight steps stay in registers.
  void project(vf* raw, const Steps& steps, const float* w) const {
    in_blocks<8>(steps.count, [&]<int N>(int t) {
      const float* row = &rows[size_t(t * s.rank)];
      vf sum[N] = {};
      for (int64_t r = 0; r < s.rank; ++r)
        for (int i = 0; i < N; ++i) sum[i] += ::load(w + r * slice) * splat(row[i * s.rank + r]);
      for (int i = 0; i < N; ++i) raw[t + i] = sum[i];
    });
  }
};

inline float largest_magnitude(const vf* x, int count) {
  vf largest{};
  for (int t = 0; t < count; ++t) largest = vmax(largest, (vf)((vi)x[t] & INT32_MAX));
  return hmax(largest);
}

// decay[i][t] = 2^(dt[t] a2[i]) for NS states. BOUNDED: no exponent exceeds 126 in magnitude. A pass of its own, and not
// part of the recurrence, as the two together need more registers than there are.
template <int NS>
inline void decays(vf (*decay)[ROOM], const vf* dt, const vf* a2, bool bounded, int count) {
  for (int i = 0; i < NS; ++i) {
    if (!bounded) {
      for (int t = 0; t < count; ++t) decay[i][t] = exp2v(dt[t] * a2[i]);
      continue;
    }
    vf rate[LOCKSTEP];
    for (int j = 0; j < LOCKSTEP; ++j) rate[j] = a2[i];
    for (int t = 0; t < count; t += LOCKSTEP) exp2_products<LOCKSTEP>(decay[i] + t, dt + t, rate);
  }
}

}  // namespace
}  // namespace ssmvision
