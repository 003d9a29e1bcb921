// Registers what runs on pictures, as library.cpp does with the scans.
#include "tensors.h"

namespace ssmvision {
namespace {

// An uninitialized tensor of pictures (n, c, h, w), channels-last in memory.
Tensor allocate_frames(int64_t n, int64_t c, int64_t h, int64_t w, int32_t type = aoti_torch_dtype_float32()) {
  return allocate_strided({n, c, h, w}, {h * w * c, 1, w * c, c}, type);
}

void describe(FrameNorm& s, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
              int64_t activation) {
  s.pictures = x.size(0);
  s.channels = x.size(1);
  s.pixels = x.size(2) * x.size(3);
  s.groups = groups;
  s.eps = float(eps);
  s.weight = floats(weight);
  s.bias = floats(bias);
  s.activation = Activation(activation);
  s.x = floats(x);
}

// Calls task(n) for every picture; few pixels stay on one thread.
template <class Task>
void for_each_picture(int64_t pictures, int64_t elements, const Task& task) {
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, pictures, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) task(n);
  });
}

std::tuple<Tensor, Tensor, Tensor> call_norm_forward(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps,
                                                     int64_t activation) {
  FrameNorm s;
  describe(s, x, weight, bias, groups, eps, activation);
  Tensor y = allocate_frames(x.size(0), x.size(1), x.size(2), x.size(3));
  Tensor mean = allocate({s.pictures, s.channels}), inverse = allocate({s.pictures, s.channels});
  s.y = floats(y);
  s.mean = floats(mean);
  s.inverse = floats(inverse);
  for_each_picture(s.pictures, s.pixels * s.channels, [&](int64_t n) { norm_forward(s, n); });
  return {y, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> call_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean,
                                                      Tensor inverse, int64_t groups, int64_t activation) {
  FrameNormGrad s;
  describe(s, x, weight, bias, groups, 0, activation);
  Tensor dx = allocate_frames(x.size(0), x.size(1), x.size(2), x.size(3));
  Tensor dweight = allocate({s.pictures, s.channels}), dbias = allocate({s.pictures, s.channels});
  s.mean = floats(mean);
  s.inverse = floats(inverse);
  s.dy = floats(dy);
  s.dx = floats(dx);
  s.dweight = floats(dweight);
  s.dbias = floats(dbias);
  for_each_picture(s.pictures, s.pixels * s.channels, [&](int64_t n) { norm_backward(s, n); });
  return {dx, dweight, dbias};
}

void expect(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  if (Axes(t).is(shape) && t.dim() == int64_t(shape.size())) return;
  const auto text = [](const auto& sizes) {
    std::string out;
    for (const int64_t size : sizes) out += (out.empty() ? "" : ", ") + std::to_string(size);
    return "(" + out + ")";
  };
  const std::string found = text(t.sizes());
  throw std::runtime_error(std::string("convs5_step: ") + name + " has shape " + found + ", expected " + text(shape));
}

// The convolution of all pictures. Threads share rows, of about 10 us of work each.
void convolve(FrameConv& s, std::vector<float>& room) {
  room.resize(std::max<size_t>(room.size(), s.pictures * s.padded_height() * s.padded_width() * s.channels));
  s.padded = room.data();
  for_each_picture(s.pictures, s.height * s.width * s.channels, [&](int64_t n) { pad_frame(s, n); });
  const int64_t row = s.width * s.kernel_height * s.kernel_width * s.channels * s.out_channels;
  const int64_t grain = (1 << 18) / std::max<int64_t>(1, row) + 1;
  torch::stable::parallel_for(0, s.pictures * s.height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t n = i / s.height, y = i % s.height, y1 = std::min(s.height, y + end - i);
      convolve_rows(s, n, y, y1);
      i += y1 - y;
    }
  });
}

// The next convolution, with a weight (k, k, c, o), of pictures that the one before gave.
void next(FrameConv& s, const char* name, const Tensor& weight, int64_t out_channels, const float* x, float* y) {
  s.channels = s.out_channels;
  s.out_channels = out_channels;
  s.kernel_height = weight.size(0);
  s.kernel_width = weight.size(1);
  expect(name, weight, {s.kernel_height, s.kernel_width, s.channels, s.out_channels});
  if (weight.numel() == 0) throw std::runtime_error(std::string("convs5_step: ") + name + " holds nothing");
  s.weight = floats(weight);
  s.bias = s.plus = nullptr;
  s.norm.weight = nullptr;
  s.x = x;
  s.y = y;
}

std::tuple<Tensor, Tensor> call_convs5_step(
    Tensor u, Tensor state, Tensor A, Tensor B, Tensor C, Optional norm1_weight, Optional norm1_bias,
    Optional conv1_weight, Optional conv1_bias, Optional norm2_weight, Optional norm2_bias, Optional conv2_weight,
    Optional conv2_bias, int64_t groups, double eps, int64_t activation) {
  const int64_t n = u.size(0), dim = u.size(1), h = u.size(2), w = u.size(3), p = A.size(0);
  expect("state", state, {n, p, h, w});
  expect("A", A, {p});
  Tensor x = allocate_frames(n, p, h, w, aoti_torch_dtype_complex64()), y = allocate_frames(n, dim, h, w);
  decay_states(floats(state), floats(A), n * h * w, p, floats(x));
  std::vector<float> room;
  FrameConv s{.pictures = n, .height = h, .width = w, .out_channels = dim};
  next(s, "B", B, 2 * p, floats(u), floats(x));
  s.plus = s.y;
  convolve(s, room);
  next(s, "C", C, dim, floats(x), floats(y));
  convolve(s, room);
  if (!conv1_weight) return {y, x};
  if (!conv2_weight || groups < 1 || dim % groups)
    throw std::runtime_error("convs5_step: channels do not split into groups");

  Tensor inner = allocate_frames(n, dim, h, w), out = allocate_frames(n, dim, h, w);
  const auto block = [&](const char* name, const Tensor& weight, const Optional& bias, const Optional& norm_weight,
                         const Optional& norm_bias, const Tensor& from, const Tensor& to) {
    next(s, name, weight, dim, floats(from), floats(to));
    if (!bias || !norm_weight || !norm_bias) throw std::runtime_error("convs5_step: a feedthrough is eight tensors");
    for (const Optional& vector : {bias, norm_weight, norm_bias}) expect("a vector of the feedthrough", *vector, {dim});
    s.norm = {h * w, dim, groups, float(eps), floats(norm_weight), floats(norm_bias)};
    s.bias = floats(bias);
    s.before = Activation(activation);
  };
  block("conv1_weight", *conv1_weight, conv1_bias, norm1_weight, norm1_bias, y, inner);
  convolve(s, room);
  block("conv2_weight", *conv2_weight, conv2_bias, norm2_weight, norm2_bias, inner, out);
  s.plus = floats(y);
  s.after = Activation(activation);
  convolve(s, room);
  return {out, x};
}

}  // namespace
}  // namespace ssmvision

STABLE_TORCH_LIBRARY_FRAGMENT(ssmvision_cpu, m) {
  m.def(
      "frame_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, int activation) "
      "-> (Tensor y, Tensor mean, Tensor inverse)");
  m.def(
      "frame_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor inverse, int groups, "
      "int activation) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "convs5_step(Tensor u, Tensor state, Tensor A, Tensor B, Tensor C, Tensor? norm1_weight, Tensor? norm1_bias, "
      "Tensor? conv1_weight, Tensor? conv1_bias, Tensor? norm2_weight, Tensor? norm2_bias, Tensor? conv2_weight, "
      "Tensor? conv2_bias, int groups, float eps, int activation) -> (Tensor y, Tensor state)");
}

STABLE_TORCH_LIBRARY_IMPL(ssmvision_cpu, CPU, m) {
  m.impl("frame_norm", TORCH_BOX(&ssmvision::call_norm_forward));
  m.impl("frame_norm_backward", TORCH_BOX(&ssmvision::call_norm_backward));
  m.impl("convs5_step", TORCH_BOX(&ssmvision::call_convs5_step));
}
