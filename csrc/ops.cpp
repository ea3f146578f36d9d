// The schemas of the compiled kernels. They work on matrices, in place where marked; densenet_fast/ops gives them
// autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_fast, m) {
  m.def("cpu_capability() -> str");
  m.def("cpu_empty(Tensor like, int[] size, int[] strides, bool kept=False) -> Tensor");
  m.def("cpu_huge_pages(Tensor x) -> ()");
  m.def("cpu_statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var, Tensor(c!) rstd, float eps) -> ()");
  m.def("cpu_bn_relu(Tensor x, Tensor mean, Tensor scale, Tensor shift) -> Tensor");
  m.def(
      "cpu_bn_relu_conv1x1(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, "
      "Tensor(a!) out, Tensor(b!)? out_mean, Tensor(c!)? out_var, Tensor(d!)? out_rstd, float eps, "
      "Tensor? then_mean, Tensor? then_scale, Tensor? then_shift) -> ()");
  m.def(
      "cpu_bn_relu_conv1x1_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, "
      "Tensor(a!)? grad_x, bool need_weight, bool need_sums, Tensor? z, Tensor? z_mean, Tensor? p, Tensor? q, "
      "float count, Tensor? source) -> (Tensor, Tensor)");
  m.def("cpu_mask(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor(a!) out) -> Tensor");
  m.def(
      "cpu_bn_relu_pool_conv1x1(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, "
      "int[] grid, Tensor(a!)? out_mean, Tensor(b!)? out_var, Tensor(c!)? out_rstd, float eps) -> Tensor");
  m.def(
      "cpu_bn_relu_pool_conv1x1_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor "
      "weight, "
      "int[] grid, bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_bn_relu_conv3x3(Tensor x, Tensor? mean, Tensor? scale, Tensor? shift, Tensor weight, Tensor? bias, int[] "
      "grid, "
      "Tensor(a!) out) -> ()");
  m.def(
      "cpu_bn_relu_conv3x3_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, "
      "int[] grid, Tensor(a!)? out, Tensor(b!)? grad_weight, Tensor? source=None) -> Tensor");
  m.def(
      "cpu_bn_relu_maxpool(Tensor x, Tensor mean, Tensor scale, Tensor shift, int[] grid, Tensor(a!)? out_mean, "
      "Tensor(b!)? out_var, Tensor(c!)? out_rstd, float eps) -> (Tensor, Tensor)");
  m.def(
      "cpu_bn_relu_maxpool_backward(Tensor grad, Tensor argmax, Tensor x, Tensor mean, Tensor scale, Tensor shift, "
      "int[] grid) -> (Tensor, Tensor)");
  m.def(
      "cpu_bn_relu_maxpool_stage(Tensor x, Tensor? x_mean, Tensor? x_var, Tensor[] tensors, float eps, int[] grid, "
      "bool return_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_bn_relu_maxpool_stage_backward(Tensor grad, Tensor argmax, Tensor x, Tensor mean, Tensor var, "
      "Tensor[] tensors, float eps, int[] grid) -> (Tensor, Tensor[])");
  m.def("cpu_bn_relu_global_avgpool(Tensor x, Tensor mean, Tensor scale, Tensor shift, int images) -> Tensor");
  m.def(
      "cpu_bn_relu_global_avgpool_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift) "
      "-> (Tensor, Tensor)");
  m.def(
      "cpu_update_running_statistics(Tensor(a!)[] vectors, Tensor(b!)[] counters, float[] momenta, int[] starts, "
      "Tensor mean, Tensor var, float count) -> ()");
  m.def("cpu_dropout(Tensor(a!) x, Tensor mask, float scale) -> ()");
  m.def("cpu_finalise(Tensor grad, Tensor x, Tensor mean, Tensor p, Tensor q, float count, Tensor(a!) out) -> ()");
  m.def(
      "cpu_dense_block(Tensor(a!) features, int in_channels, Tensor[] tensors, float[] eps, int[] grid, "
      "Tensor(b!)[] bottlenecks, Tensor(c!) mean, Tensor(d!) var, bool return_statistics, bool "
      "prepend=False, Tensor? x=None, Tensor? x_mean=None, Tensor? x_var=None) -> ()");
  m.def(
      "cpu_dense_block_backward(Tensor grad, Tensor(e!) total, Tensor features, Tensor[] bottlenecks, Tensor mean, "
      "Tensor var, float count, Tensor[] tensors, float[] eps, int[] grid, Tensor(a!) grad_x, Tensor(b!)[] gradients, "
      "Tensor(c!) p, Tensor(d!) q, bool return_statistics, bool prepend=False) -> ()");
  m.def("cpu_convolution(Tensor images, Tensor weight, int stride, int padding) -> Tensor");
  m.def("cpu_convolution_grad_weight(Tensor grad, Tensor images, Tensor weight, int stride, int padding) -> Tensor");
  m.def(
      "cpu_dense_block_and_reader(Tensor x, Tensor? x_mean, Tensor? x_var, Tensor[] tensors, int[] places, "
      "float[] eps, int[] grid, int[] saved, bool prepend, Tensor[] read_tensors, float read_eps, "
      "bool return_statistics) -> (Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor, Tensor)");
  m.def(
      "cpu_dense_block_and_reader_backward(Tensor grad, Tensor features, Tensor mean, Tensor var, "
      "Tensor[] bottlenecks, int in_channels, Tensor[] tensors, int[] places, float[] eps, int[] grid, int[] saved, "
      "bool prepend, Tensor[] read_tensors, float read_eps) -> (Tensor, Tensor[], Tensor[])");
  m.def(
      "cpu_network(Tensor images, Tensor[] tensors, int[] places, float[] eps, int[] layers, int[] saved, int[] "
      "prepend, "
      "int stride, int padding, Tensor(a!)[] vectors, Tensor(b!)[] counters, float[] momenta, int[] starts, "
      "int[] tracked, float largest) -> (Tensor, Tensor[])");
  m.def(
      "cpu_network_backward(Tensor grad, Tensor images, Tensor[] kept, Tensor[] tensors, int[] places, float[] eps, "
      "int[] layers, int[] saved, int[] prepend, int stride, int padding) -> Tensor[]");
  m.def(
      "cpu_dense_block_inference(Tensor(a!) features, int in_channels, Tensor[] tensors, float[] eps, int[] grid, "
      "bool prepend=False) -> ()");
  m.def("cpu_bn_relu_pool_conv1x1_inference(Tensor x, Tensor[] tensors, float eps, int[] grid, Tensor(a!) out) -> ()");
  m.def("cpu_bn_relu_global_avgpool_inference(Tensor x, Tensor[] tensors, float eps, int images) -> Tensor");
  m.def(
      "cpu_stem_inference(Tensor images, Tensor weight, Tensor[] tensors, float eps, int stride, int padding, "
      "Tensor(a!) out) -> ()");
}
