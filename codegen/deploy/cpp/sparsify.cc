// The C interface over model.h: nothing is thrown through it.
#include "sparsify.h"

#include <exception>

#include "model.h"

struct sparsify_model {
  sparsify::Model model;
};

namespace {

thread_local std::string last_error;

template <typename Body, typename Result>
Result guarded(Body body, Result failed) {
  try {
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an error without a message";
  }
  return failed;
}

void describe(const sparsify::Tensor& tensor, sparsify_tensor* what) {
  *what = {nullptr, tensor.dtype, static_cast<int32_t>(tensor.shape.size()), {}, nullptr};
  for (size_t i = 0; i < tensor.shape.size(); ++i) what->shape[i] = tensor.shape[i].size;
}

const char* described(const std::vector<sparsify::Tensor>& tensors, int number, sparsify_tensor* what) {
  if (number < 0 || number >= static_cast<int>(tensors.size())) return nullptr;
  if (what) describe(tensors[number], what);
  return tensors[number].name.c_str();
}

}  // namespace

extern "C" {

const char* sparsify_last_error(void) { return last_error.c_str(); }

sparsify_model* sparsify_load(const char* folder, const sparsify_options* options) {
  return guarded([&] { return new sparsify_model{{folder ? folder : "", options ? *options : sparsify_options{}}}; }, static_cast<sparsify_model*>(nullptr));
}

void sparsify_free(sparsify_model* model) { delete model; }

const char* sparsify_function(const sparsify_model* model, int number) {
  for (const auto& one : model->model.functions)
    if (number-- == 0) return one.first.c_str();
  return nullptr;
}

int sparsify_inputs(const sparsify_model* model, const char* function) {
  return guarded([&] { return static_cast<int>(model->model.function(function).inputs.size()); }, -1);
}

int sparsify_outputs(const sparsify_model* model, const char* function) {
  return guarded([&] { return static_cast<int>(model->model.function(function).outputs.size()); }, -1);
}

const char* sparsify_input(const sparsify_model* model, const char* function, int number, sparsify_tensor* what) {
  return guarded([&] { return described(model->model.function(function).inputs, number, what); }, static_cast<const char*>(nullptr));
}

const char* sparsify_output(const sparsify_model* model, const char* function, int number, sparsify_tensor* what) {
  return guarded([&] { return described(model->model.function(function).outputs, number, what); }, static_cast<const char*>(nullptr));
}

const char* sparsify_symbol(const sparsify_model* model, const char* function, int input, int dimension) {
  return guarded([&]() -> const char* {
    const std::string& symbol = model->model.function(function).inputs.at(input).shape.at(dimension).symbol;
    return symbol.empty() ? nullptr : symbol.c_str();
  }, static_cast<const char*>(nullptr));
}

int sparsify_run(sparsify_model* model, const char* function, const char* const* names, const sparsify_tensor* inputs, int input_count,
                 sparsify_tensor* outputs, int output_count) {
  return guarded([&] {
    const sparsify::Function& found = model->model.function(function);
    if (output_count != static_cast<int>(found.outputs.size()))
      throw std::runtime_error("there are " + std::to_string(found.outputs.size()) + " outputs, asked for " + std::to_string(output_count));
    std::vector<tvm::ffi::Tensor> results = model->model.run(function, names, inputs, input_count);
    for (int i = 0; i < output_count; ++i) {
      const DLTensor* tensor = results[i].GetDLTensorPtr();
      outputs[i] = {static_cast<char*>(tensor->data) + tensor->byte_offset, sparsify::dtype_of(tensor->dtype), tensor->ndim, {}, nullptr};
      for (int d = 0; d < tensor->ndim; ++d) outputs[i].shape[d] = tensor->shape[d];
      outputs[i].owner = new tvm::ffi::Tensor(results[i]);
    }
    return 0;
  }, -1);
}

void sparsify_release(sparsify_tensor* outputs, int count) {
  for (int i = 0; i < count; ++i) {
    delete static_cast<tvm::ffi::Tensor*>(outputs[i].owner);
    outputs[i].owner = nullptr;
  }
}

}  // extern "C"
