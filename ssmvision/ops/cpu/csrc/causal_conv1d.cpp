// The causal depthwise convolution on one CPU core.
#include "tiles.h"

namespace ssmvision {
namespace {

constexpr int MAX_WIDTH = 16;  // checked by the caller

// The inputs of one chunk and the width - 1 steps before it, zero before the first step: tile[t + width - 1] = x of step t.
struct Window {
  vf tile[CHUNK + MAX_WIDTH - 1];

  void load(const Conv& s, const float* x, const Steps& steps, const int64_t* row, int64_t chunk, int lanes) {
    const int64_t begin = chunk * CHUNK;
    for (int j = 0; j < s.width - 1; ++j) {
      const int64_t t = begin - (s.width - 1) + j;
      tile[j] = t < 0 ? vf{} : load_row(x + (row ? row[t] : t) * s.x.l, s.x.c, lanes);
    }
    load_lanes(tile + s.width - 1, x, s.x.c, s.x.l, steps, lanes);
  }
};

// The first tap of each step of a chunk: earlier ones lie before the latest reset.
struct FirstTap {
  int64_t of[CHUNK] = {};

  FirstTap(const Conv& s, const Steps& steps, const int64_t* row, const uint8_t* flags, int64_t chunk) {
    if (!flags) return;
    const int64_t begin = chunk * CHUNK;
    int64_t seen = s.width;  // taps since the latest reset
    for (int64_t t = std::max<int64_t>(0, begin - s.width + 1); t < begin + steps.count; ++t) {
      seen = flags[row ? row[t] : t] ? 1 : seen + 1;
      if (t >= begin) of[t - begin] = std::max<int64_t>(0, s.width - seen);
    }
  }
};

inline vf convolve(const vf* window, const vf* weight, vf bias, int64_t first, int64_t width) {
  for (int64_t j = first; j < width; ++j) bias += weight[j] * window[j];
  return bias;
}

inline void load_weights(vf* weight, vf& bias, const Conv& s, int64_t ik, int64_t d, int lanes) {
  for (int64_t j = 0; j < s.width; ++j) weight[j] = load_part(s.weight + (ik * s.width + j) * s.channels + d, lanes);
  bias = s.bias ? load_part(s.bias + ik * s.channels + d, lanes) : vf{};
}

inline const uint8_t* flags(const Conv& s, int64_t ib, int64_t ik) {
  return s.reset ? s.reset + ib * s.reset_b + ik * s.reset_k : nullptr;
}

// Adds the gradient of a window to dx, where windows of neighbouring chunks overlap.
inline void add_window(const ConvGrad& s, const Window& grad, const Steps& steps, const int64_t* row, int64_t ib,
                       int64_t d, int64_t chunk, int lanes) {
  float* dx = s.dx.at(ib, 0) + d * s.dx.c;
  for (int j = 0; j < s.width - 1; ++j) {
    const int64_t t = chunk * CHUNK - (s.width - 1) + j;
    float* p = dx + (row && t >= 0 ? row[t] : t) * s.dx.l;
    for (int i = 0; i < (t < 0 ? 0 : lanes); ++i) p[i * s.dx.c] += grad.tile[j][i];
  }
  store_lanes(grad.tile + s.width - 1, dx, s.dx.c, s.dx.l, steps, lanes, true);
}

}  // namespace

void conv_forward(const Conv& s, int64_t ib, int64_t d0, int64_t d1) {
  Window window;
  vf weight[MAX_WIDTH], bias, y[CHUNK];
  for (int64_t chunk = 0; chunk * CHUNK < s.tokens; ++chunk)
    for (int64_t ik = 0; ik < s.routes; ++ik) {
      const int64_t* row = s.order ? s.order + ik * s.tokens : nullptr;
      const Steps steps(row, s.tokens, chunk, nullptr);
      const FirstTap first(s, steps, row, flags(s, ib, ik), chunk);
      for (int64_t d = d0; d < d1; d += LANES) {
        const int lanes = int(std::min<int64_t>(LANES, d1 - d));
        load_weights(weight, bias, s, ik, d, lanes);
        window.load(s, s.x.at(ib, 0) + d * s.x.c, steps, row, chunk, lanes);
        for (int t = 0; t < steps.count; ++t) {
          const vf sum = convolve(window.tile + t, weight, bias, first.of[t], s.width);
          y[t] = s.silu ? sum * sigmoid(sum) : sum;
        }
        store_lanes(y, s.y.at(ib, ik) + d * s.y.c, s.y.c, s.y.l, steps, lanes, false);
      }
    }
}

void conv_backward(const ConvGrad& s, int64_t ib, int64_t d0, int64_t d1) {
  Window window, dwindow;
  vf weight[MAX_WIDTH], dweight[MAX_WIDTH], bias, dy[CHUNK];
  for (int64_t ik = 0; ik < s.routes; ++ik) {
    const int64_t* row = s.order ? s.order + ik * s.tokens : nullptr;
    for (int64_t d = d0; d < d1; d += LANES) {
      const int lanes = int(std::min<int64_t>(LANES, d1 - d));
      load_weights(weight, bias, s, ik, d, lanes);
      std::fill(dweight, dweight + s.width, vf{});
      vf dbias{};
      for (int64_t chunk = 0; chunk * CHUNK < s.tokens; ++chunk) {
        const Steps steps(row, s.tokens, chunk, nullptr);
        const FirstTap first(s, steps, row, flags(s, ib, ik), chunk);
        window.load(s, s.x.at(ib, 0) + d * s.x.c, steps, row, chunk, lanes);
        load_lanes(dy, s.dy.at(ib, ik) + d * s.dy.c, s.dy.c, s.dy.l, steps, lanes);
        std::fill(dwindow.tile, dwindow.tile + CHUNK + s.width - 1, vf{});
        for (int t = 0; t < steps.count; ++t) {
          vf grad = dy[t];
          if (s.silu) {
            const vf sum = convolve(window.tile + t, weight, bias, first.of[t], s.width), gate = sigmoid(sum);
            grad *= gate * (splat(1.f) + sum * (splat(1.f) - gate));
          }
          dbias += grad;
          for (int64_t j = first.of[t]; j < s.width; ++j) {
            dweight[j] += grad * window.tile[t + j];
            dwindow.tile[t + j] += grad * weight[j];
          }
        }
        add_window(s, dwindow, steps, row, ib, d, chunk, lanes);
      }
      const int64_t bk = ib * s.routes + ik;
      for (int64_t j = 0; j < s.width; ++j) store_part(s.dweight + (bk * s.width + j) * s.channels + d, dweight[j], lanes);
      store_part(s.dbias + bk * s.channels + d, dbias, lanes);
    }
  }
}

}  // namespace ssmvision
