// Group normalization and activation of channels-last pictures on one CPU core.
#include <cmath>
#include <vector>

#include "frames.h"

namespace ssmvision {

void norm_forward(const FrameNorm& s, int64_t n) {
  const int64_t c = s.channels, at = n * s.pixels * c;
  std::vector<float> affine_of(2 * c);
  float *scale = affine_of.data(), *shift = scale + c, *mean = s.mean + n * c, *inverse = s.inverse + n * c;
  group_statistics(s.x + at, s, mean, inverse);
  affine(s, mean, inverse, scale, shift);
  with_activation(s.activation, [&]<Activation ACT> {
    apply_norm<ACT>(s.x + at, scale, shift, s.pixels, c, s.y + at);
  });
}

namespace {

// dx = the gradient before the activation; dbias and dweight = its sums with 1 and with the normalized pixels.
template <Activation ACT>
void before_activation(const FrameNormGrad& s, const float* x, const float* dy, const float* mean, const float* inverse,
                       float* dx, float* dweight, float* dbias) {
  const int64_t c = s.channels;
  for_each_vector(c, [&](int64_t d, int lanes) {
    const vf centre = load_part(mean + d, lanes), inv = load_part(inverse + d, lanes);
    const vf weight = load_part(s.weight + d, lanes), bias = load_part(s.bias + d, lanes);
    vf sums[2];
    sum_pixels<2>(sums, s.pixels, [&](int64_t p, vf* sum) {
      const vf normal = (load_part(x + p * c + d, lanes) - centre) * inv, z = weight * normal + bias;
      vf y, slope;
      activate<ACT, 1>(&y, &z, &slope);
      const vf grad = load_part(dy + p * c + d, lanes) * slope;
      store_part(dx + p * c + d, grad, lanes);
      sum[0] += grad;
      sum[1] += grad * normal;
    });
    store_part(dbias + d, sums[0], lanes);
    store_part(dweight + d, sums[1], lanes);
  });
}

}  // namespace

void norm_backward(const FrameNormGrad& s, int64_t n) {
  const int64_t c = s.channels, at = n * s.pixels * c;
  const float count = float(s.pixels) * float(c / s.groups);
  const float *x = s.x + at, *mean = s.mean + n * c, *inverse = s.inverse + n * c;
  float *dx = s.dx + at, *dweight = s.dweight + n * c, *dbias = s.dbias + n * c;
  with_activation(s.activation, [&]<Activation ACT> {
    before_activation<ACT>(s, x, s.dy + at, mean, inverse, dx, dweight, dbias);
  });
  // What mean and standard deviation of a group pass on, (level + along normal) / std, is taken off each pixel.
  std::vector<float> level(c), along(c);
  for (int64_t d = 0; d < c; ++d) {
    level[d] = s.weight[d] * dbias[d];
    along[d] = s.weight[d] * dweight[d];
  }
  average_groups(level.data(), c, s.groups, count);
  average_groups(along.data(), c, s.groups, count);
  for_each_vector(c, [&](int64_t d, int lanes) {
    const vf inv = load_part(inverse + d, lanes), scale = inv * load_part(s.weight + d, lanes);
    const vf slope = load_part(along.data() + d, lanes) * inv * inv;
    const vf constant = load_part(level.data() + d, lanes) * inv - load_part(mean + d, lanes) * slope;
    for (int64_t p = 0; p < s.pixels; ++p) {
      float* at_pixel = dx + p * c + d;
      const vf pixel = load_part(x + p * c + d, lanes);
      store_part(at_pixel, scale * load_part(at_pixel, lanes) - slope * pixel - constant, lanes);
    }
  });
}

}  // namespace ssmvision
