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
  float* checkpoints;                // (b, k, chunks, n, d): the state before each chunk
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
  int64_t slices;
};

struct ConvGrad : Conv {
  View dy, dx;            // dx is zeroed
  float *dweight, *dbias; // (b, k, w, d) and (b, k, d)
};

// One task: sample ib, channels [d0, d1), every route in turn (so that merged outputs have one writer).
void scan_forward(const Scan&, int64_t ib, int64_t d0, int64_t d1);
void scan_backward(const ScanGrad&, int64_t ib, int64_t slice, int64_t d0, int64_t d1);
void conv_forward(const Conv&, int64_t ib, int64_t d0, int64_t d1);
void conv_backward(const ConvGrad&, int64_t ib, int64_t d0, int64_t d1);

}  // namespace ssmvision
