// Tensors as the images that kernels of every device take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../kernels/image.h"
#include "checks.h"

namespace swat {

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// [N, C, H, W].
template <typename T>
ImageView<T> image(const Tensor& tensor, T* data) {
  return {data,
          tensor.size(0),
          tensor.size(1),
          tensor.size(2),
          tensor.size(3),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3)};
}

// A tensor as an image whose channels are dimension `dim`: the other dimensions, joined where they lie evenly, are its batch, height
// and width in their order. A copy of the tensor where more than `most_axes` are left.
class ChannelImage {
 public:
  ChannelImage(const Tensor& tensor, int64_t dim, size_t most_axes) : tensor_(tensor), dim_(dim) {
    find_axes();
    if (axes_.size() <= most_axes) return;
    tensor_ = torch::stable::contiguous(tensor_);
    find_axes();
  }

  int64_t pixels() const { return tensor_.numel() / tensor_.size(dim_); }

  template <typename T>
  ImageView<const T> read() const {
    return view(swat::read<T>(tensor_));
  }
  template <typename T>
  ImageView<T> write() const {
    return view(swat::write<T>(tensor_));
  }

 private:
  struct Axis {
    int64_t size, stride;
  };

  void find_axes() {
    axes_.clear();
    for (int64_t i = 0; i < tensor_.dim(); ++i) {
      const Axis axis{tensor_.size(i), tensor_.stride(i)};
      if (i == dim_ || axis.size == 1) continue;
      if (!axes_.empty() && axes_.back().stride == axis.size * axis.stride) {
        axes_.back() = {axes_.back().size * axis.size, axis.stride};
      } else {
        axes_.push_back(axis);
      }
    }
  }

  template <typename T>
  ImageView<T> view(T* data) const {
    std::vector<Axis> all = axes_;
    while (all.size() < 3) all.insert(all.begin(), {1, all.empty() ? 1 : all[0].size * all[0].stride});
    return {data,          all[0].size,          tensor_.size(dim_), all[1].size,  all[2].size,
            all[0].stride, tensor_.stride(dim_), all[1].stride,      all[2].stride};
  }

  Tensor tensor_;
  int64_t dim_;
  std::vector<Axis> axes_;
};

}  // namespace swat
