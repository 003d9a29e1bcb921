// Tensors as the kernels see them, through torch's stable C ABI: a library built once loads in every later torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace ssmvision {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
inline float* floats(const Optional& t) { return t ? floats(*t) : nullptr; }

// An index outside the tokens would read or write foreign memory.
inline const int64_t* checked_order(const Optional& order, int64_t tokens) {
  if (!order) return nullptr;
  const int64_t* table = static_cast<const int64_t*>(order->data_ptr());
  bool inside = true;
  for (int64_t i = 0; i < order->numel(); ++i) inside &= uint64_t(table[i]) < uint64_t(tokens);
  if (!inside) throw std::runtime_error("routes hold an index out of range for " + std::to_string(tokens) + " tokens");
  return table;
}

// Sizes and strides of a tensor, among which dimensions can be put that its caller left out.
struct Axes {
  static constexpr int64_t MOST = 8;
  float* data;
  int64_t dims, size[MOST], stride[MOST];

  Axes(const Tensor& t) : data(floats(t)), dims(std::min(t.dim(), MOST)) {
    std::copy_n(t.sizes().data(), dims, size);
    std::copy_n(t.strides().data(), dims, stride);
  }
  Axes& put(int64_t at, int64_t count = 1) {
    if (at > dims || dims == MOST) return *this;
    std::copy_backward(size + at, size + dims, size + dims + 1);
    std::copy_backward(stride + at, stride + dims, stride + dims + 1);
    size[at] = count;
    stride[at] = 0;
    ++dims;
    return *this;
  }
  bool is(std::initializer_list<int64_t> shape) const {
    return std::equal(size, size + dims, shape.begin(), shape.end());
  }
};

// (b, k, c, ..., l) of any strides; a route dimension of size 1 is shared by all routes.
inline View view(const Axes& x) {
  return {x.data, x.stride[0], x.size[1] == 1 ? 0 : x.stride[1], x.stride[2], x.stride[x.dims - 1]};
}

// (b, k, g, n, l)
inline GroupedView grouped(const Axes& x) { return {view(x), x.stride[3], x.size[2]}; }

inline Tensor allocate_strided(const std::vector<int64_t>& size, const std::vector<int64_t>& stride, int32_t type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), stride.data(), type,
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Uninitialized floats; with `swap`, the last dimension but one is the one whose elements are adjacent.
inline Tensor allocate(std::vector<int64_t> size, bool swap = false) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size() - 1; i > 0; --i) stride[i - 1] = stride[i] * size[i];
  if (swap) {
    stride[size.size() - 2] = 1;
    stride.back() = size[size.size() - 2];
  }
  return allocate_strided(size, stride, aoti_torch_dtype_float32());
}

// Into how many channel slices a sample is cut so that every thread has work.
inline int64_t slice_count(int64_t batch, int64_t channels, int64_t elements) {
  constexpr int64_t LEAST = 1 << 20;  // elements of a task: about 0.3 ms of work, less is not worth waking a second thread
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, elements / LEAST));
  const int64_t wanted = (threads - 1) / std::max<int64_t>(1, batch) + 1;
  return std::max<int64_t>(1, std::min(wanted, (channels + 15) / 16));
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

}  // namespace
}  // namespace ssmvision
