// What the forward and the backward scan share: B, C and delta of one chunk, in L1, along a route.
#pragma once
#include <cmath>
#include <vector>

#include "tiles.h"

namespace ssmvision {
namespace {

constexpr float LOG2E = 1.44269504088896341f;

// (d, rows) -> (rows, d) for the channels of one task, so that lanes load contiguous channels.
inline std::vector<float> channels_last(const float* p, int64_t d0, int64_t d1, int64_t rows, float scale) {
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

inline bool lanes_share_groups(const Scan& s) {
  const auto shared = [&](const GroupedView& v) { return v.groups == 1 || s.channels / v.groups % LANES == 0; };
  return shared(s.B) && shared(s.C);
}

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

}  // namespace
}  // namespace ssmvision
