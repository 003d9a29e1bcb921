// Registers the native kernels with torch through its stable C ABI: built once, loads in every later torch.
#include "tensors.h"

namespace ssmvision {
namespace {

void describe(Scan& s, const Axes& u, const Axes& delta, const Axes& A, const Axes& B, const Axes& C,
              const Optional& D, const Optional& bias, const Optional& projection, const Optional& reset,
              const Optional& order, bool softplus, bool merge, const Optional& checkpoints, int64_t slices) {
  s.batch = u.size[0];
  s.routes = A.size[0];
  s.channels = A.size[1];
  s.states = A.size[2];
  s.tokens = u.size[3];
  s.steps = order ? order->size(1) : s.tokens;
  s.rank = projection ? projection->size(projection->dim() - 1) : 0;
  s.softplus = softplus;
  s.merge = merge;
  s.shared_u = u.size[1] == 1;
  s.u = view(u);
  s.delta = view(delta);
  s.B = grouped(B);
  s.C = grouped(C);
  s.A = A.data;
  s.D = floats(D);
  s.bias = floats(bias);
  s.projection = floats(projection);
  s.reset = reset ? static_cast<const uint8_t*>(reset->data_ptr()) : nullptr;
  s.reset_b = reset ? reset->stride(0) : 0;
  s.reset_k = reset && reset->dim() == 3 && reset->size(1) > 1 ? reset->stride(1) : 0;
  s.order = checked_order(order, s.tokens);
  s.checkpoints = floats(checkpoints);
  s.slices = slices;
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

using Direct = std::tuple<Optional, Optional, Optional>;  // outputs; nothing if the arguments are not for this path

bool hold(ScalarType type, std::initializer_list<Optional> tensors) {
  for (const Optional& t : tensors)
    if (t && t->scalar_type() != type) return false;
  return true;
}

void to_rows(Optional& t) {
  if (t && !t->is_contiguous()) t = torch::stable::contiguous(*t);
}

// The operator as users call it: a single scan has no route dimension. The gate z is only checked, and multiplied with by
// the caller.
Direct call_scan_direct(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z, Optional bias,
                        bool softplus, Optional projection, Optional initial, Optional reset, Optional order, bool merge,
                        bool save) {
  if (!hold(ScalarType::Float, {u, delta, A, B, C, D, z, bias, projection, initial}) ||
      !hold(ScalarType::Bool, {reset}) || !hold(ScalarType::Long, {order}) || u.dim() < 3 || (z && !merge) ||
      (projection && projection->dim() < 2))
    return {};
  Optional rows = A;
  for (Optional* t : {&rows, &D, &bias, &projection, &initial, &reset, &order}) to_rows(*t);
  const bool routed = A.dim() == 3;
  const auto tokens = [&](const Tensor& t) { return routed ? Axes(t) : Axes(t).put(1); };
  const auto parameter = [&](const Tensor& t) { return routed ? Axes(t) : Axes(t).put(0); };
  const auto coefficients = [&](const Tensor& t) {  // (b, k, g, n, l)
    if (t.dim() == 2 + routed) return parameter(t).put(0, u.size(0)).put(4, u.size(u.dim() - 1));  // per channel
    const Axes x = tokens(t);
    return x.dims == 4 ? Axes(x).put(2) : x;
  };
  const auto is = [](const Optional& t, const auto& axes, std::initializer_list<int64_t> shape) {
    return !t || axes(*t).is(shape);
  };
  const Axes x = u.dim() == 3 ? Axes(u).put(1) : Axes(u), dt = tokens(delta), a = parameter(*rows);
  const Axes b = coefficients(B), c = coefficients(C);
  if (x.dims != 4 || a.dims != 3 || b.dims != 5 || c.dims != 5) return {};
  const int64_t batch = x.size[0], k = a.size[0], d = a.size[1], n = a.size[2], l = x.size[3];
  const int64_t rank = projection ? projection->size(projection->dim() - 1) : d, groups = b.size[2] * c.size[2];
  if (!(batch * d * n * l && x.is({batch, x.size[1] == 1 ? 1 : k, d, l}) && dt.is({batch, k, rank, l}) &&
        b.is({batch, k, b.size[2], n, l}) && c.is({batch, k, c.size[2], n, l}) && groups && d % b.size[2] == 0 &&
        d % c.size[2] == 0 && is(D, parameter, {k, d}) && is(bias, parameter, {k, d}) &&
        is(projection, parameter, {k, d, rank}) && is(initial, tokens, {batch, k, d, n}) &&
        (!z || Axes(*z).is({batch, d, l}))))
    return {};
  if (reset && !Axes(*reset).is({batch, l}) && !Axes(*reset).is({batch, 1, l}) && !Axes(*reset).is({batch, k, l})) return {};
  if (order && !(order->dim() == 2 && order->size(0) == k)) return {};

  Scan s;
  const int64_t steps = order ? order->size(1) : l;
  Optional checkpoints;
  if (save) checkpoints = allocate({batch, k, (steps + CHUNK - 1) / CHUNK, n, d});
  describe(s, x, dt, a, b, c, D, bias, projection, reset, order, softplus, merge, checkpoints,
           slice_count(batch, d, batch * k * d * n * l));
  const bool per_route = routed && !merge, channels_last = x.stride[2] == 1;
  Tensor y = per_route ? allocate({batch, k, d, l}, channels_last) : allocate({batch, d, l}, channels_last);
  Tensor last = routed ? allocate({batch, k, d, n}, true) : allocate({batch, d, n}, true);
  if (steps != l) std::fill_n(floats(y), y.numel(), 0.f);
  s.y = per_route ? view(y) : view(Axes(y).put(1));
  s.initial = floats(initial);
  s.last = floats(last);
  for_each_task(s, [&](int64_t ib, int64_t, int64_t d0, int64_t d1) { scan_forward(s, ib, d0, d1); });
  return {y, last, checkpoints};
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
      "selective_scan_direct(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
      "bool softplus, Tensor? projection, Tensor? initial, Tensor? reset, Tensor? order, bool merge, bool save) "
      "-> (Tensor? y, Tensor? last, Tensor? checkpoints)");
  m.def(
      "selective_scan_backward(Tensor dy, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? bias, Tensor? reset, Tensor? order, bool softplus, bool merge, int slices, "
      "Tensor checkpoints, Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, "
      "Tensor(f!)? dD, Tensor(g!)? dbias, Tensor(h!) dinitial) -> ()");
  m.def("slices(int batch, int channels, int elements) -> int");
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
  m.impl("selective_scan_direct", TORCH_BOX(&ssmvision::call_scan_direct));
  m.impl("selective_scan_backward", TORCH_BOX(&ssmvision::call_scan_backward));
  m.impl("exp2", TORCH_BOX(&ssmvision::call_exp2));
  m.impl("causal_conv1d", TORCH_BOX(&ssmvision::call_conv_forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&ssmvision::call_conv_backward));
  m.impl("ssd_scan", TORCH_BOX(&ssmvision::call_ssd_forward));
  m.impl("ssd_scan_backward", TORCH_BOX(&ssmvision::call_ssd_backward));
  m.impl("linear_scan", TORCH_BOX(&ssmvision::call_linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&ssmvision::call_linear_scan_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ssmvision_cpu, CompositeExplicitAutograd, m) {
  m.impl("slices", TORCH_BOX(&ssmvision::slice_count));
}
