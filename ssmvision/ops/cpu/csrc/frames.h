// Activations and normalization of channels-last pictures: rows of `channels` floats, one per pixel.
#pragma once
#include "kernels.h"
#include "tiles.h"

namespace ssmvision {
namespace {

// act[i](x) of several vectors in lockstep; where `slope` is given, the derivative goes there.
template <Activation ACT, int N>
[[gnu::always_inline]] inline void activate(vf* y, const vf* x, vf* slope = nullptr) {
  const vf one = splat(1.f);
  if constexpr (ACT == Activation::none || ACT == Activation::relu) {
    for (int i = 0; i < N; ++i) {
      const bool relu = ACT == Activation::relu;
      if (slope) slope[i] = relu ? (x[i] > 0.f ? one : vf{}) : one;
      y[i] = relu ? vmax(vf{}, x[i]) : x[i];
    }
  } else if constexpr (ACT == Activation::elu) {
    vf e[N];
    exp_neg_abs<N>(e, x);
    for (int i = 0; i < N; ++i) {
      if (slope) slope[i] = x[i] > 0.f ? one : e[i];
      y[i] = x[i] > 0.f ? x[i] : e[i] - one;
    }
  } else {
    // Both are x sigmoid(u): u = x for silu, u = sqrt(8 / pi) (x + 0.044715 x^3) for the tanh form of gelu.
    const vf linear = splat(ACT == Activation::gelu ? 1.59576912f : 1.f);
    const vf cubic = splat(ACT == Activation::gelu ? 0.0713548163f : 0.f);
    vf u[N], e[N];
    for (int i = 0; i < N; ++i) u[i] = ACT == Activation::silu ? x[i] : x[i] * (linear + cubic * x[i] * x[i]);
    exp_neg_abs<N>(e, u);
    for (int i = 0; i < N; ++i) {
      const vf gate = sigmoid(u[i], e[i]);
      if (slope) slope[i] = gate * (one + x[i] * (one - gate) * (linear + splat(3.f) * cubic * x[i] * x[i]));
      y[i] = x[i] * gate;
    }
  }
}

// Calls call.template operator()<ACT>() with the activation as a constant.
template <class Call>
inline void with_activation(Activation activation, const Call& call) {
  switch (activation) {
    case Activation::gelu: return call.template operator()<Activation::gelu>();
    case Activation::relu: return call.template operator()<Activation::relu>();
    case Activation::silu: return call.template operator()<Activation::silu>();
    case Activation::elu: return call.template operator()<Activation::elu>();
    default: return call.template operator()<Activation::none>();
  }
}

// Calls call(c, lanes) for each vector of channels.
template <class Call>
[[gnu::always_inline]] inline void for_each_vector(int64_t channels, const Call& call) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) call(c, LANES);
  if (c < channels) call(c, int(channels - c));
}

// Sums over the pixels of a picture of N functions of a vector of channels: in several chains, and block by block, so that
// no long sum swallows small terms.
template <int N, class Function>
[[gnu::always_inline]] inline void sum_pixels(vf* out, int64_t pixels, const Function& function) {
  constexpr int CHAINS = 4, BLOCK = 64;
  std::fill_n(out, N, vf{});
  for (int64_t begin = 0; begin < pixels; begin += BLOCK) {
    const int64_t end = std::min<int64_t>(pixels, begin + BLOCK);
    vf sums[CHAINS][N] = {};
    int64_t p = begin;
    for (; p + CHAINS <= end; p += CHAINS)
      for (int i = 0; i < CHAINS; ++i) function(p + i, sums[i]);
    for (; p < end; ++p) function(p, sums[0]);
    for (int j = 0; j < N; ++j) out[j] += (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
  }
}

// The mean over the channels of each group, put in the place of each of them.
inline void average_groups(float* x, int64_t channels, int64_t groups, float count) {
  const int64_t width = channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    float sum = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += x[c];
    std::fill_n(x + g * width, width, sum / count);
  }
}

// The mean and the inverse of the standard deviation that each channel of a picture is normalized with.
inline void group_statistics(const float* x, const GroupNorm& s, float* mean, float* inverse) {
  const int64_t c = s.channels;
  const float count = float(s.pixels) * float(c / s.groups);
  for_each_vector(c, [&](int64_t d, int lanes) {
    vf sum;
    sum_pixels<1>(&sum, s.pixels, [&](int64_t p, vf* sums) { sums[0] += load_part(x + p * c + d, lanes); });
    store_part(mean + d, sum, lanes);
  });
  average_groups(mean, c, s.groups, count);
  for_each_vector(c, [&](int64_t d, int lanes) {
    const vf centre = load_part(mean + d, lanes);
    vf sum;
    sum_pixels<1>(&sum, s.pixels, [&](int64_t p, vf* sums) {
      const vf difference = load_part(x + p * c + d, lanes) - centre;
      sums[0] += difference * difference;
    });
    store_part(inverse + d, sum, lanes);
  });
  average_groups(inverse, c, s.groups, count);
  for (int64_t d = 0; d < c; ++d) inverse[d] = 1.f / std::sqrt(inverse[d] + s.eps);
}

// y = act(scale x + shift) of `count` pixels, `scale` and `shift` of each channel.
template <Activation ACT>
inline void apply_norm(const float* x, const float* scale, const float* shift, int64_t count, int64_t channels, float* y) {
  constexpr int N = 4;
  for_each_vector(channels, [&](int64_t d, int lanes) {
    const vf a = load_part(scale + d, lanes), b = load_part(shift + d, lanes);
    const auto run = [&]<int M>(int64_t p) {
      vf z[M];
      for (int i = 0; i < M; ++i) z[i] = a * load_part(x + (p + i) * channels + d, lanes) + b;
      activate<ACT, M>(z, z);
      for (int i = 0; i < M; ++i) store_part(y + (p + i) * channels + d, z[i], lanes);
    };
    int64_t p = 0;
    for (; p + N <= count; p += N) run.template operator()<N>(p);
    for (; p < count; ++p) run.template operator()<1>(p);
  });
}

// scale = weight / std, shift = bias - mean scale.
inline void affine(const GroupNorm& s, const float* mean, const float* inverse, float* scale, float* shift) {
  for (int64_t d = 0; d < s.channels; ++d) {
    scale[d] = inverse[d] * s.weight[d];
    shift[d] = s.bias[d] - mean[d] * scale[d];
  }
}

}  // namespace
}  // namespace ssmvision
