// Registers the native kernels with torch through its stable C ABI: built once, loads in every later torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace ssmvision {
namespace {

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
float* floats(const Optional& t) { return t ? floats(*t) : nullptr; }

// An index outside the tokens would read or write foreign memory.
const int64_t* checked_order(const Optional& order, int64_t tokens) {
  if (!order) return nullptr;
  const int64_t* table = static_cast<const int64_t*>(order->data_ptr());
  bool inside = true;
  for (int64_t i = 0; i < order->numel(); ++i) inside &= uint64_t(table[i]) < uint64_t(tokens);
  if (!inside) throw std::runtime_error("routes hold an index out of range for " + std::to_string(tokens) + " tokens");
  return table;
}

// (b, k, c, ..., l) of any strides; a route dimension of size 1 is shared by all routes.
View view(const Tensor& t) {
  View v;
  v.data = floats(t);
  v.b = t.stride(0);
  v.k = t.size(1) == 1 ? 0 : t.stride(1);
  v.c = t.stride(2);
  v.l = t.stride(t.dim() - 1);
  return v;
}

// (b, k, g, n, l)
GroupedView grouped(const Tensor& t) {
  GroupedView v;
  static_cast<View&>(v) = view(t);
  v.n = t.stride(3);
  v.groups = t.size(2);
  return v;
}

void describe(Scan& s, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
              const Optional& D, const Optional& bias, const Optional& projection, const Optional& reset,
              const Optional& order, bool softplus, bool merge, const Tensor& checkpoints, int64_t slices) {
  s.batch = u.size(0);
  s.routes = A.size(0);
  s.channels = A.size(1);
  s.states = A.size(2);
  s.tokens = u.size(3);
  s.steps = order ? order->size(1) : s.tokens;
  s.rank = projection ? projection->size(2) : 0;
  s.softplus = softplus;
  s.merge = merge;
  s.shared_u = u.size(1) == 1;
  s.u = view(u);
  s.delta = view(delta);
  s.B = grouped(B);
  s.C = grouped(C);
  s.A = floats(A);
  s.D = floats(D);
  s.bias = floats(bias);
  s.projection = floats(projection);
  s.reset = reset ? static_cast<const uint8_t*>(reset->data_ptr()) : nullptr;
  s.reset_b = reset ? reset->stride(0) : 0;
  s.reset_k = reset && reset->size(1) > 1 ? reset->stride(1) : 0;
  s.order = checked_order(order, s.tokens);
  s.checkpoints = floats(checkpoints);
  s.slices = slices;
}

// Calls task(ib, slice, d0, d1) for every sample and channel slice; slices start at multiples of 16 channels.
template <class Shape, class Task>
void for_each_task(const Shape& s, const Task& task) {
  const int64_t blocks = (s.channels + 15) / 16;
  torch::stable::parallel_for(0, s.batch * s.slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t ib = i / s.slices, slice = i % s.slices;
      const int64_t d0 = std::min(s.channels, slice * blocks / s.slices * 16);
      const int64_t d1 = std::min(s.channels, (slice + 1) * blocks / s.slices * 16);
      if (d0 < d1) task(ib, slice, d0, d1);
    }
  });
}

void call_scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional bias, Optional projection,
             Optional initial, Optional reset, Optional order, bool softplus, bool merge, int64_t slices, Tensor y,
             Tensor last, Tensor checkpoints) {
  Scan s;
  describe(s, u, delta, A, B, C, D, bias, projection, reset, order, softplus, merge, checkpoints, slices);
  s.y = view(y);
  s.initial = floats(initial);
  s.last = floats(last);
  for_each_task(s, [&](int64_t ib, int64_t, int64_t d0, int64_t d1) { scan_forward(s, ib, d0, d1); });
}

void call_scan_backward(Tensor dy, Optional dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D,
              Optional bias, Optional reset, Optional order, bool softplus, bool merge, int64_t slices,
              Tensor checkpoints, Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Optional dD,
              Optional dbias, Tensor dinitial) {
  ScanGrad s;
  describe(s, u, delta, A, B, C, D, bias, std::nullopt, reset, order, softplus, merge, checkpoints, slices);
  s.dy = view(dy);
  s.du = view(du);
  s.ddelta = view(ddelta);
  s.dlast = floats(dlast);
  s.dA = floats(dA);
  s.dB = floats(dB);
  s.dC = floats(dC);
  s.dD = floats(dD);
  s.dbias = floats(dbias);
  s.dinitial = floats(dinitial);
  for_each_task(s, [&](int64_t ib, int64_t slice, int64_t d0, int64_t d1) { scan_backward(s, ib, slice, d0, d1); });
}

// x (b, 1, d, l), weight (k, w, d), y (b, k, d, l)
void describe(Conv& s, const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& order,
              const Optional& reset, bool silu, int64_t slices) {
  s.batch = x.size(0);
  s.routes = weight.size(0);
  s.width = weight.size(1);
  s.channels = weight.size(2);
  s.tokens = x.size(3);
  s.silu = silu;
  s.x = view(x);
  s.weight = floats(weight);
  s.bias = floats(bias);
  s.order = checked_order(order, s.tokens);
  s.reset = reset ? static_cast<const uint8_t*>(reset->data_ptr()) : nullptr;
  s.reset_b = reset ? reset->stride(0) : 0;
  s.reset_k = reset && reset->size(1) > 1 ? reset->stride(1) : 0;
  s.slices = slices;
}

void call_conv_forward(Tensor x, Tensor weight, Optional bias, Optional order, Optional reset, bool silu, int64_t slices,
                       Tensor y) {
  Conv s;
  describe(s, x, weight, bias, order, reset, silu, slices);
  s.y = view(y);
  for_each_task(s, [&](int64_t ib, int64_t, int64_t d0, int64_t d1) { conv_forward(s, ib, d0, d1); });
}

void call_conv_backward(Tensor dy, Tensor x, Tensor weight, Optional bias, Optional order, Optional reset, bool silu,
                        int64_t slices, Tensor dx, Tensor dweight, Tensor dbias) {
  ConvGrad s;
  describe(s, x, weight, bias, order, reset, silu, slices);
  s.dy = view(dy);
  s.dx = view(dx);
  s.dweight = floats(dweight);
  s.dbias = floats(dbias);
  for_each_task(s, [&](int64_t ib, int64_t, int64_t d0, int64_t d1) { conv_backward(s, ib, d0, d1); });
}

void describe(Ssd& s, const Tensor& x, const Tensor& step, const Tensor& A, const Tensor& B, const Tensor& C,
              const Optional& reset, int64_t slices, const Tensor& checkpoints) {
  s.batch = x.size(0);
  s.heads = x.size(1);
  s.head_dim = x.size(2);
  s.tokens = x.size(3);
  s.groups = B.size(1);
  s.states = B.size(2);
  s.x = view(x);
  s.step = view(step);
  s.B = view(B);
  s.C = view(C);
  s.A = floats(A);
  s.reset = reset ? static_cast<const uint8_t*>(reset->data_ptr()) : nullptr;
  s.checkpoints = floats(checkpoints);
  s.slices = slices;
}

// Calls task(ib, slice, ih) for every sample and head.
template <class Task>
void for_each_head(const Ssd& s, const Task& task) {
  torch::stable::parallel_for(0, s.batch * s.slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t ib = i / s.slices, slice = i % s.slices;
      for (int64_t ih = slice * s.heads / s.slices; ih < (slice + 1) * s.heads / s.slices; ++ih) task(ib, slice, ih);
    }
  });
}

void call_ssd_forward(Tensor x, Tensor step, Tensor A, Tensor B, Tensor C, Optional initial, Optional reset,
                      int64_t slices, Tensor y, Tensor last, Tensor checkpoints) {
  Ssd s;
  describe(s, x, step, A, B, C, reset, slices, checkpoints);
  s.initial = floats(initial);
  s.y = view(y);
  s.last = floats(last);
  for_each_head(s, [&](int64_t ib, int64_t, int64_t ih) { ssd_forward(s, ib, ih); });
}

void call_ssd_backward(Tensor dy, Optional dlast, Tensor checkpoints, Tensor x, Tensor step, Tensor A, Tensor B, Tensor C,
                       Optional reset, int64_t slices, Tensor dx, Tensor dstep, Tensor dA, Tensor dB, Tensor dC,
                       Tensor dinitial) {
  SsdGrad s;
  describe(s, x, step, A, B, C, reset, slices, checkpoints);
  s.dy = view(dy);
  s.dlast = floats(dlast);
  s.dx = view(dx);
  s.dstep = view(dstep);
  s.dA = floats(dA);
  s.dB = floats(dB);
  s.dC = floats(dC);
  s.dinitial = floats(dinitial);
  for_each_head(s, [&](int64_t ib, int64_t slice, int64_t ih) { ssd_backward(s, ib, slice, ih); });
}

// (b, l, floats)
View rows(const Tensor& t) {
  View v;
  v.data = floats(t);
  v.b = t.size(0) == 1 ? 0 : t.stride(0);
  v.l = t.size(1) == 1 ? 0 : t.stride(1);
  return v;
}

void describe(LinearScan& s, const Tensor& a, const Tensor& h, const Optional& initial, const Optional& reset,
              int64_t sharing, bool complex, bool reverse, int64_t slices) {
  s.batch = h.size(0);
  s.steps = h.size(1);
  s.channels = h.size(2);
  s.sharing = sharing;
  s.complex = complex;
  s.constant = a.size(1) == 1;
  s.reverse = reverse;
  s.a = rows(a);
  s.h = rows(h);
  s.initial = floats(initial);
  s.reset = reset ? static_cast<const uint8_t*>(reset->data_ptr()) : nullptr;
  s.slices = slices;
}

void call_linear_scan_forward(Tensor a, Tensor x, Optional initial, Optional reset, int64_t sharing, bool complex,
                              bool reverse, int64_t slices, Tensor h, Tensor last) {
  LinearScan s;
  describe(s, a, h, initial, reset, sharing, complex, reverse, slices);
  s.x = rows(x);
  s.last = floats(last);
  for_each_task(s, [&](int64_t ib, int64_t, int64_t d0, int64_t d1) { linear_scan_forward(s, ib, d0, d1); });
}

void call_linear_scan_backward(Tensor dh, Optional dlast, Tensor h, Tensor a, Optional initial, Optional reset,
                               int64_t sharing, bool complex, bool reverse, int64_t slices, Tensor da, Tensor dx,
                               Tensor dinitial) {
  LinearScanGrad s;
  describe(s, a, h, initial, reset, sharing, complex, reverse, slices);
  s.dh = rows(dh);
  s.dx = rows(dx);
  s.dlast = floats(dlast);
  s.dinitial = floats(dinitial);
  s.da = floats(da);
  s.width = da.size(3) * da.size(4) * (complex ? 2 : 1);
  for_each_task(s, [&](int64_t ib, int64_t slice, int64_t d0, int64_t d1) {
    linear_scan_backward(s, ib, s.sharing > 1 && !s.constant ? slice : 0, d0, d1);
  });
}

// out = 2^x for x in [-126, 126], `passes` times over: what a core can do at most.
void call_exp2(Tensor x, int64_t passes, Tensor out) { exp2_passes(floats(x), x.numel(), passes, floats(out)); }

}  // namespace
}  // namespace ssmvision

STABLE_TORCH_LIBRARY(ssmvision_cpu, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? bias, "
      "Tensor? projection, Tensor? initial, Tensor? reset, Tensor? order, bool softplus, bool merge, int slices, "
      "Tensor(a!) y, Tensor(b!) last, Tensor(c!) checkpoints) -> ()");
  m.def(
      "selective_scan_backward(Tensor dy, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? bias, Tensor? reset, Tensor? order, bool softplus, bool merge, int slices, "
      "Tensor checkpoints, Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, "
      "Tensor(f!)? dD, Tensor(g!)? dbias, Tensor(h!) dinitial) -> ()");
  m.def("exp2(Tensor x, int passes, Tensor(a!) out) -> ()");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? order, Tensor? reset, bool silu, int slices, "
      "Tensor(a!) y) -> ()");
  m.def(
      "causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? order, Tensor? reset, bool silu, "
      "int slices, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
  m.def(
      "ssd_scan(Tensor x, Tensor step, Tensor A, Tensor B, Tensor C, Tensor? initial, Tensor? reset, int slices, "
      "Tensor(a!) y, Tensor(b!) last, Tensor(c!) checkpoints) -> ()");
  m.def(
      "ssd_scan_backward(Tensor dy, Tensor? dlast, Tensor checkpoints, Tensor x, Tensor step, Tensor A, Tensor B, "
      "Tensor C, Tensor? reset, int slices, Tensor(a!) dx, Tensor(b!) dstep, Tensor(c!) dA, Tensor(d!) dB, "
      "Tensor(e!) dC, Tensor(f!) dinitial) -> ()");
  m.def(
      "linear_scan(Tensor a, Tensor x, Tensor? initial, Tensor? reset, int sharing, bool complex, bool reverse, "
      "int slices, Tensor(a!) h, Tensor(b!) last) -> ()");
  m.def(
      "linear_scan_backward(Tensor dh, Tensor? dlast, Tensor h, Tensor a, Tensor? initial, Tensor? reset, int sharing, "
      "bool complex, bool reverse, int slices, Tensor(a!) da, Tensor(b!) dx, Tensor(c!) dinitial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssmvision_cpu, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&ssmvision::call_scan_forward));
  m.impl("selective_scan_backward", TORCH_BOX(&ssmvision::call_scan_backward));
  m.impl("exp2", TORCH_BOX(&ssmvision::call_exp2));
  m.impl("causal_conv1d", TORCH_BOX(&ssmvision::call_conv_forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&ssmvision::call_conv_backward));
  m.impl("ssd_scan", TORCH_BOX(&ssmvision::call_ssd_forward));
  m.impl("ssd_scan_backward", TORCH_BOX(&ssmvision::call_ssd_backward));
  m.impl("linear_scan", TORCH_BOX(&ssmvision::call_linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&ssmvision::call_linear_scan_backward));
}
