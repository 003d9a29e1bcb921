// One frame of ConvS5. A frame of a stream is so small that anything read from memory twice, and any call, costs as much as
// the arithmetic: each convolution reads a padded copy that its norm and activation were applied to on the way.
#include <cmath>
#include <vector>

#include "frames.h"

namespace ssmvision {
namespace {

constexpr int VECTORS = 2;                    // of output channels in registers
constexpr int PIXELS = LANES == 16 ? 8 : 4;   // of a row, likewise

// acc[p] += all taps of P pixels of a row: `in` is the padded picture at the first tap of the first of them.
template <int P, int V>
[[gnu::always_inline]] inline void convolve(const FrameConv& s, const float* in, const float* weight, int lanes,
                                            vf acc[P][V]) {
  const int64_t c = s.channels, row = s.padded_width() * c;
  for (int64_t ky = 0; ky < s.kernel_height; ++ky)
    for (int64_t i = 0; i < s.kernel_width * c; ++i) {  // the taps of a row lie side by side, in both
      const float *x = in + ky * row + i, *w = weight + (ky * s.kernel_width * c + i) * s.out_channels;
      vf wide[V];
      for (int v = 0; v < V; ++v) wide[v] = V == VECTORS ? load(w + v * LANES) : load_part(w, lanes);
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < V; ++v) acc[p][v] += splat(x[p * c]) * wide[v];
    }
}

// P pixels of a row, V vectors of output channels from o on.
template <Activation ACT, int P, int V>
inline void tile(const FrameConv& s, const float* in, int64_t pixel, int64_t o, int lanes) {
  vf acc[P][V];
  for (int v = 0; v < V; ++v) {
    const vf bias = s.bias ? load_part(s.bias + o + v * LANES, lanes) : vf{};
    for (int p = 0; p < P; ++p) {
      const int64_t at = (pixel + p) * s.out_channels + o + v * LANES;
      acc[p][v] = s.plus ? bias + load_part(s.plus + at, lanes) : bias;
    }
  }
  convolve<P, V>(s, in, s.weight + o, lanes, acc);
  for (int p = 0; p < P; ++p) {
    activate<ACT, V>(acc[p], acc[p]);
    for (int v = 0; v < V; ++v) store_part(s.y + (pixel + p) * s.out_channels + o + v * LANES, acc[p][v], lanes);
  }
}

template <Activation ACT, int V>
void rows(const FrameConv& s, int64_t n, int64_t y0, int64_t y1, int64_t o, int lanes) {
  const int64_t c = s.channels;
  for (int64_t y = y0; y < y1; ++y) {
    const int64_t pixel = (n * s.height + y) * s.width;
    const float* in = s.padded + (n * s.padded_height() + y) * s.padded_width() * c;
    int64_t x = 0;
    for (; x + PIXELS <= s.width; x += PIXELS) tile<ACT, PIXELS, V>(s, in + x * c, pixel + x, o, lanes);
    for (; x < s.width; ++x) tile<ACT, 1, V>(s, in + x * c, pixel + x, o, lanes);
  }
}

}  // namespace

void pad_frame(const FrameConv& s, int64_t n) {
  const int64_t c = s.channels, row = s.padded_width() * c, size = s.padded_height() * row;
  const float* x = s.x + n * s.height * s.width * c;
  std::vector<float> parameters(4 * c);
  float *mean = parameters.data(), *inverse = mean + c, *scale = inverse + c, *shift = scale + c;
  std::fill_n(scale, c, 1.f);
  if (s.norm.weight) {
    group_statistics(x, s.norm, mean, inverse);
    affine(s.norm, mean, inverse, scale, shift);
  }
  float* padded = s.padded + n * size;
  std::fill_n(padded, size, 0.f);
  padded += (s.kernel_height - 1) / 2 * row + (s.kernel_width - 1) / 2 * c;
  with_activation(s.before, [&]<Activation ACT> {
    for (int64_t y = 0; y < s.height; ++y)
      apply_norm<ACT>(x + y * s.width * c, scale, shift, s.width, c, padded + y * row);
  });
}

void convolve_rows(const FrameConv& s, int64_t n, int64_t y0, int64_t y1) {
  with_activation(s.after, [&]<Activation ACT> {
    int64_t o = 0;
    for (; o + VECTORS * LANES <= s.out_channels; o += VECTORS * LANES) rows<ACT, VECTORS>(s, n, y0, y1, o, LANES);
    for (; o < s.out_channels; o += LANES)
      rows<ACT, 1>(s, n, y0, y1, o, int(std::min<int64_t>(LANES, s.out_channels - o)));
  });
}

// (re, im) pairs of each pixel times (re, im) of each state.
void decay_states(const float* state, const float* A, int64_t pixels, int64_t states, float* out) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t i = 0; i < 2 * states; i += 2) {
      const float re = state[p * 2 * states + i], im = state[p * 2 * states + i + 1];
      out[p * 2 * states + i] = A[i] * re - A[i + 1] * im;
      out[p * 2 * states + i + 1] = A[i] * im + A[i + 1] * re;
    }
}

}  // namespace ssmvision
