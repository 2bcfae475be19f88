// An exported model in memory: its manifest, its weights, its functions. Everything throws std::runtime_error with a sentence for the user.
#pragma once
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "files.h"
#include "sparsify.h"

namespace sparsify {

struct Dimension {
  int64_t size = -1;   // where it does not vary
  std::string symbol;  // where it does
};

struct Tensor {
  std::string name;
  int32_t dtype = 0;
  std::vector<Dimension> shape;
  bool updated = false;  // the function writes into it
};

struct Limits {
  int64_t low = 0;
  std::optional<int64_t> high;
};

struct Function {
  std::vector<Tensor> inputs, outputs;
  tvm::ffi::Function code;
  tvm::ffi::Array<tvm::ffi::Tensor> bound;  // the parameters' tensors
};

class Model {
 public:
  Model(const std::string& folder, const sparsify_options& options);
  const Function& function(const std::string& name) const;
  std::vector<tvm::ffi::Tensor> run(const std::string& name, const char* const* names, const sparsify_tensor* inputs, int count) const;

  std::map<std::string, Function> functions;
  std::map<std::string, Limits> symbols;
  std::vector<std::pair<std::vector<std::string>, int64_t>> products;  // what sizes of symbols, multiplied, are at most

 private:
  tvm::ffi::Tensor checked(const Tensor& wanted, const sparsify_tensor& given, std::map<std::string, int64_t>* sizes) const;

  std::shared_ptr<Mapped> weights_;
  std::optional<tvm::ffi::Module> library_, machine_;
};

// sparsify_dtype by numpy's name of it and by DLPack's.
int32_t dtype_of(const std::string& name);
int32_t dtype_of(const DLDataType& dtype);
DLDataType dlpack(int32_t dtype);
const char* name_of(int32_t dtype);

}  // namespace sparsify
