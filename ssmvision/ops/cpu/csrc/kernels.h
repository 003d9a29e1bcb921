// What the library hands to the kernels: pointers, strides (in elements) and sizes.
// Letters: b batch, k route, d channel, n state, g group of channels, l token, t step along a route, r rank of delta.
#pragma once
#include <cstdint>

namespace ssmvision {

constexpr int CHUNK = 64;  // steps between two saved states; must equal CHUNK in ops/_library.py

// A tensor seen as (b, k, c, l): c runs over channels, ranks or groups. A broadcast dimension has stride 0.
struct View {
  float* data = nullptr;
  int64_t b = 0, k = 0, c = 0, l = 0;
  float* at(int64_t ib, int64_t ik) const { return data + ib * b + ik * k; }
};

// B or C: (b, k, g, n, l) with `groups` groups of consecutive channels.
struct GroupedView : View {
  int64_t n = 0, groups = 1;
};

struct Scan {
  int64_t batch, routes, channels, states, tokens, steps, rank;
  bool softplus, merge, shared_u;
  View u, delta, y;                  // y is (b, 1, d, l) when merged
  GroupedView B, C;
  const float* A;                    // (k, d, n) contiguous
  const float* D;                    // (k, d) or null
  const float* bias;                 // (k, d) or null
  const float* projection;           // (k, d, r) or null: delta is then (b, k, r, l)
  const float* initial;              // (b, k, d, n) contiguous or null
  const uint8_t* reset;              // (b, k or 1, l) or null
  int64_t reset_b, reset_k;
  const int64_t* order;              // (k, t) or null for 0, 1, 2, ...
  float* last;                       // (b, k, n, d)
  float* checkpoints;                // (b, k, chunks, n, d): the state before each chunk; or null
  int64_t slices;                    // channel slices per sample that run in parallel
};

struct ScanGrad : Scan {
  View dy, du, ddelta;
  const float* dlast;                // (b, k, d, n) contiguous or null
  float *dA, *dD, *dbias, *dinitial; // (b, k, n, d), (b, k, d), (b, k, d), (b, k, n, d); dD, dbias may be null
  float *dB, *dC;                    // (slices, b, k, g, l, n), zeroed: partial sums, added up by the caller
};

// Depthwise causal convolution of width `width` along every route.
struct Conv {
  int64_t batch, routes, channels, tokens, width;
  bool silu;
  View x, y;              // x is shared by all routes
  const float* weight;    // (k, w, d)
  const float* bias;      // (k, d) or null
  const int64_t* order;   // (k, l) or null
  const uint8_t* reset;   // (b, k or 1, l) or null
  int64_t reset_b, reset_k;
  int64_t slices;
};

struct ConvGrad : Conv {
  View dy, dx;            // dx is zeroed
  float *dweight, *dbias; // (b, k, w, d) and (b, k, d)
};

// First-order linear recurrence of rows of `channels` floats: numbers, or (re, im) pairs if complex.
struct LinearScan {
  int64_t batch, steps, channels;
  int64_t sharing;        // consecutive numbers with the same decay
  bool complex, constant, reverse;  // constant: one row of decays for all steps
  View a, x, h;           // (b, l, floats): b and l are used; broadcast dimensions have stride 0
  const float* initial;   // (b, floats) or null
  const uint8_t* reset;   // (b, l) or null
  float* last;            // (b, floats)
  int64_t slices;
  int64_t token(int64_t step) const { return reverse ? steps - 1 - step : step; }
  bool is_reset(int64_t ib, int64_t t) const { return reset && reset[ib * steps + t]; }
};

struct LinearScanGrad : LinearScan {
  View dh, dx;
  const float* dlast;     // (b, floats) or null
  float* dinitial;        // (b, floats)
  float* da;              // (slices or 1, b, l or 1, width), zeroed unless sharing is 1 and decays vary: partial sums
  int64_t width;
};

// The scan of Mamba-2: heads of p channels, with one state matrix (n, p) each. Views are (b, h, p, l); step has no
// p, and B and C are (b, g, n, l) with `groups` groups of consecutive heads.
struct Ssd {
  int64_t batch, heads, head_dim, states, groups, tokens;
  View x, step, B, C, y;
  const float* A;         // (h,)
  const float* initial;   // (b, h, p, n) contiguous or null
  const uint8_t* reset;   // (b, l) or null
  float* last;            // (b, h, n, p)
  float* checkpoints;     // (b, h, chunks, n, p): the state before each chunk
  int64_t slices;         // slices of heads per sample that run in parallel
};

struct SsdGrad : Ssd {
  View dy, dx, dstep;
  const float* dlast;     // (b, h, p, n) contiguous or null
  float *dA, *dinitial;   // (b, h) and (b, h, n, p)
  float *dB, *dC;         // (slices, b, g, l, n), zeroed: partial sums, added up by the caller
};

enum class Activation : int64_t { none, gelu, relu, silu, elu };  // numbered as ACTIVATIONS in ops/frame_norm.py

// Normalization over the pixels of a picture and the channels of a group. Pictures are (n, h, w, c) in memory.
struct GroupNorm {
  int64_t pixels, channels, groups;
  float eps;
  const float *weight, *bias;  // (c,)
};

struct FrameNorm : GroupNorm {
  int64_t pictures;
  Activation activation;
  const float* x;
  float* y;
  float *mean, *inverse;       // (n, c): of the channel's group
};

struct FrameNormGrad : FrameNorm {
  const float* dy;
  float *dx, *dweight, *dbias; // the last two (n, c), added up by the caller
};

// y = after(plus + bias + conv(before(norm(x)))) of pictures (n, h, w, c), with as many zeros around as keep their size.
struct FrameConv {
  int64_t pictures, height, width, channels, out_channels, kernel_height, kernel_width;
  GroupNorm norm;              // without weight: none
  Activation before, after;
  const float *x, *weight;     // weight (kernel_height, kernel_width, c, out_channels)
  const float *bias, *plus;    // (out_channels,) and as y, which may be y itself; or null
  float *padded, *y;           // padded: room for the pictures with their zeros
  int64_t padded_height() const { return height + kernel_height - 1; }
  int64_t padded_width() const { return width + kernel_width - 1; }
};

// One task: sample ib, channels [d0, d1), every route in turn (so that merged outputs have one writer).
void scan_forward(const Scan&, int64_t ib, int64_t d0, int64_t d1);
void scan_backward(const ScanGrad&, int64_t ib, int64_t slice, int64_t d0, int64_t d1);
void conv_forward(const Conv&, int64_t ib, int64_t d0, int64_t d1);
void conv_backward(const ConvGrad&, int64_t ib, int64_t d0, int64_t d1);
void ssd_forward(const Ssd&, int64_t ib, int64_t ih);
void ssd_backward(const SsdGrad&, int64_t ib, int64_t slice, int64_t ih);
void linear_scan_forward(const LinearScan&, int64_t ib, int64_t d0, int64_t d1);
void linear_scan_backward(const LinearScanGrad&, int64_t ib, int64_t slice, int64_t d0, int64_t d1);

// One task: picture n; of a convolution, the rows [y0, y1) of a picture that was padded before.
void norm_forward(const FrameNorm&, int64_t n);
void norm_backward(const FrameNormGrad&, int64_t n);
void pad_frame(const FrameConv&, int64_t n);
void convolve_rows(const FrameConv&, int64_t n, int64_t y0, int64_t y1);

// out = A state of complex numbers: pixels of `states` each.
void decay_states(const float* state, const float* A, int64_t pixels, int64_t states, float* out);

// out[i] = 2^x[i] for |x[i]| <= 126, `passes` times over, to measure what bounds the scans.
void exp2_passes(const float* x, int64_t count, int64_t passes, float* out);

}  // namespace ssmvision
