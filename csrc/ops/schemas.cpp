// Every operator of swat_ext, as torch sees it. What they compute is said in swat_ext/functional.py and swat_ext/ops/library.py; a packed
// tensor is (values, mask), see swat_ext/ops/library.py. Padding is (top, bottom, left, right).
#include "library.h"

SWAT_LIBRARY(m) {
  m.def("kth_magnitude(Tensor input, int k) -> Tensor");
  m.def(
      "compress(Tensor input, Tensor threshold, *, SymInt? keep=None, SymInt? room=None) -> (Tensor values, Tensor "
      "mask)");
  m.def("select(Tensor input, Tensor(a!) threshold, Tensor(b!) state, SymInt? room) -> (Tensor values, Tensor mask)");
  m.def("take(Tensor input, Tensor mask, SymInt count) -> Tensor");
  m.def("whole_filters(Tensor mask, SymInt[] size) -> Tensor");
  m.def("decompress(Tensor values, Tensor mask, SymInt[] size, bool channels_last) -> Tensor");
  m.def(
      "decompress_part(Tensor values, Tensor mask, SymInt[] size, SymInt begin, SymInt end, bool channels_last) -> "
      "Tensor");
  m.def(
      "conv2d(Tensor input, Tensor weight_values, Tensor weight_mask, SymInt[4] weight_size, Tensor? bias, SymInt[2] "
      "stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool channels_last) -> Tensor");
  m.def(
      "conv2d_input_grad(Tensor grad_output, Tensor weight_values, Tensor weight_mask, SymInt[4] weight_size, "
      "SymInt[4] input_size, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool "
      "channels_last) "
      "-> Tensor");
  m.def(
      "conv2d_weight_grad(Tensor grad_output, Tensor input_values, Tensor input_mask, SymInt[4] input_size, "
      "SymInt[4] weight_size, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool "
      "channels_last=False) -> Tensor");
  m.def(
      "linear(Tensor input, Tensor weight_values, Tensor weight_mask, SymInt[2] weight_size, Tensor? bias) -> Tensor");
  m.def(
      "linear_input_grad(Tensor grad_output, Tensor weight_values, Tensor weight_mask, SymInt[2] weight_size) -> "
      "Tensor");
  m.def(
      "linear_weight_grad(Tensor grad_output, Tensor input_values, Tensor input_mask, SymInt[2] weight_size) -> "
      "Tensor");
  m.def("bias_grad(Tensor grad_output, int dim) -> Tensor");
  m.def("relu(Tensor input) -> (Tensor output, Tensor mask)");
  m.def("relu_(Tensor(a!) input) -> Tensor mask");
  m.def("relu_backward(Tensor grad_output, Tensor mask) -> Tensor");
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, float eps, str saved, Tensor? seed) -> (Tensor output, "
      "Tensor mean, Tensor invstd, Tensor variance, Tensor codes, Tensor scale)");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor saved, Tensor? scale, Tensor mean, Tensor invstd, Tensor? "
      "weight, str saved_as) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "max_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool "
      "ceil_mode) -> (Tensor output, Tensor positions)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor positions, SymInt[4] input_size, SymInt[2] kernel_size, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode) -> Tensor");
}
