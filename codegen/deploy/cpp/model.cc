#include "model.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/extra/json.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "machine.h"

namespace ffi = tvm::ffi;

namespace sparsify {
namespace {

constexpr size_t ALIGNED = 64;  // compiled code may rely on it

struct Dtype { const char* name; const char* stored; DLDataType dlpack; };  // in the order of sparsify_dtype; `stored` is safetensors' name
const Dtype DTYPES[] = {{"float32", "F32", {kDLFloat, 32, 1}}, {"float64", "F64", {kDLFloat, 64, 1}}, {"float16", "F16", {kDLFloat, 16, 1}},
                        {"bfloat16", "BF16", {kDLBfloat, 16, 1}}, {"int64", "I64", {kDLInt, 64, 1}}, {"int32", "I32", {kDLInt, 32, 1}},
                        {"int16", "I16", {kDLInt, 16, 1}}, {"int8", "I8", {kDLInt, 8, 1}}, {"uint8", "U8", {kDLUInt, 8, 1}},
                        {"bool", "BOOL", {kDLBool, 8, 1}}};

struct Owned {  // memory of its own
  void AllocData(DLTensor* t) {
    size_t size = (ffi::GetDataSize(*t) + ALIGNED - 1) / ALIGNED * ALIGNED;
    if (posix_memalign(&t->data, ALIGNED, std::max(size, ALIGNED))) throw std::bad_alloc();
  }
  void FreeData(DLTensor* t) { free(t->data); }
};

struct Borrowed {  // memory of somebody else, who may be kept alive
  void AllocData(DLTensor* t) { t->data = data; }
  void FreeData(DLTensor*) {}
  void* data;
  std::shared_ptr<void> owner;
};

ffi::Tensor tensor(void* data, ffi::ShapeView shape, DLDataType dtype, std::shared_ptr<void> owner) {
  const DLDevice cpu{kDLCPU, 0};
  if (reinterpret_cast<uintptr_t>(data) % ALIGNED == 0) return ffi::Tensor::FromNDAlloc(Borrowed{data, std::move(owner)}, shape, dtype, cpu);
  ffi::Tensor copy = ffi::Tensor::FromNDAlloc(Owned(), shape, dtype, cpu);
  if (size_t size = ffi::GetDataSize(*copy.GetDLTensorPtr())) memcpy(copy.data_ptr(), data, size);
  return copy;
}

using Object = ffi::json::Object;
using List = ffi::json::Array;

ffi::Any at(const Object& object, const char* key) {
  auto found = object.find(ffi::String(key));
  if (found == object.end()) throw std::runtime_error(std::string("the manifest has no ") + key);
  return (*found).second;
}

std::string text(const ffi::Any& value) { return value.cast<ffi::String>(); }

Object parsed(const std::string& what, const std::string& path) {
  ffi::String wrong;
  ffi::Any value = ffi::json::Parse(ffi::String(what), &wrong);
  if (wrong.size() || !value.as<Object>()) throw std::runtime_error(path + " is damaged: " + std::string(wrong));
  return value.cast<Object>();
}

std::vector<Tensor> tensors(const ffi::Any& described) {
  std::vector<Tensor> found;
  for (const ffi::Any& one : described.cast<List>()) {
    Object facts = one.cast<Object>();
    Tensor tensor{text(at(facts, "name")), dtype_of(text(at(facts, "dtype"))), {}, facts.find(ffi::String("updated")) != facts.end()};
    for (const ffi::Any& size : at(facts, "shape").cast<List>()) {
      Dimension dimension;
      if (auto fixed = size.as<int64_t>()) dimension.size = *fixed;
      else dimension.symbol = text(size);
      tensor.shape.push_back(dimension);
    }
    if (tensor.shape.size() > SPARSIFY_DIMENSIONS) throw std::runtime_error(tensor.name + " has too many dimensions");
    found.push_back(std::move(tensor));
  }
  return found;
}

void check_machine(const Object& target) {
  std::string name = text(at(target, "name")), arch = text(at(target, "arch")), missing;
  if (arch != architecture())
    throw std::runtime_error("made for " + name + " (" + arch + "), this machine is " + architecture() + ": export the model for it");
  for (const ffi::Any& feature : at(target, "features").cast<List>())
    if (!has_feature(text(feature))) missing += (missing.empty() ? "" : ", ") + text(feature);
  if (!missing.empty())
    throw std::runtime_error("made for " + name + "; this machine lacks " + missing + ": export the model for a target without");
}

void load_runtime(const std::string& folder, const Object& target, const sparsify_options& options) {
  int threads = options.threads ? options.threads : std::min<int>(processors(), static_cast<int>(at(target, "cores").cast<int64_t>()));
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), options.threads != 0);
  // By default a thread stays on one processor and yields it until there is work: whoever else wants it then has it for milliseconds, at every kernel.
  for (const char* name : {"TVM_BIND_THREADS", "TVM_THREAD_POOL_SPIN_COUNT"}) setenv(name, "0", 0);
  const std::string name = "libtvm_runtime.so", beside = folder + "/" + name;
  std::string path = options.runtime ? options.runtime : access(beside.c_str(), R_OK) == 0 ? beside : name;
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL))
    throw std::runtime_error(std::string(dlerror()) + ": put " + name + " into the folder, or its own folder into LD_LIBRARY_PATH");
}

std::map<std::string, ffi::Tensor> read_weights(const std::shared_ptr<Mapped>& file, const std::string& path) {
  uint64_t length = 0;
  if (file->size() >= 8) memcpy(&length, file->data(), 8);
  if (file->size() < 8 || length > file->size() - 8) throw std::runtime_error(path + " is damaged: copy the whole folder again");
  char* start = file->data() + 8 + length;
  const int64_t room = static_cast<int64_t>(file->size() - 8 - length);
  std::map<std::string, ffi::Tensor> found;
  for (const auto& [name, described] : parsed(std::string(file->data() + 8, length), path)) {
    if (text(name) == "__metadata__") continue;
    Object facts = described.cast<Object>();
    std::string kind = text(at(facts, "dtype"));
    const Dtype* dtype = std::find_if(std::begin(DTYPES), std::end(DTYPES), [&](const Dtype& one) { return kind == one.stored; });
    std::vector<int64_t> shape;
    int64_t elements = 1;
    for (const ffi::Any& size : at(facts, "shape").cast<List>()) shape.push_back(size.cast<int64_t>()), elements *= shape.back();
    List offsets = at(facts, "data_offsets").cast<List>();
    int64_t first = offsets[0].cast<int64_t>(), end = offsets[1].cast<int64_t>();
    if (dtype == std::end(DTYPES) || first < 0 || first > end || end > room || elements * dtype->dlpack.bits / 8 != end - first)
      throw std::runtime_error(path + " is damaged at " + text(name) + ": copy the whole folder again");
    found.emplace(text(name), tensor(start + first, ffi::ShapeView(shape.data(), shape.size()), dtype->dlpack, file));
  }
  return found;
}

}  // namespace

int32_t dtype_of(const std::string& name) {
  for (size_t i = 0; i < std::size(DTYPES); ++i)
    if (name == DTYPES[i].name) return static_cast<int32_t>(i);
  throw std::runtime_error("unknown dtype " + name);
}

int32_t dtype_of(const DLDataType& dtype) {
  for (size_t i = 0; i < std::size(DTYPES); ++i)
    if (dtype.code == DTYPES[i].dlpack.code && dtype.bits == DTYPES[i].dlpack.bits) return static_cast<int32_t>(i);
  throw std::runtime_error("an output has a dtype without a name");
}

const char* name_of(int32_t dtype) { return dtype >= 0 && dtype < static_cast<int32_t>(std::size(DTYPES)) ? DTYPES[dtype].name : "unknown"; }

DLDataType dlpack(int32_t dtype) { return DTYPES[dtype].dlpack; }

Model::Model(const std::string& folder, const sparsify_options& options) {
  Mapped file(folder + "/manifest.json");
  Object manifest = parsed(std::string(file.data(), file.size()), folder + "/manifest.json");
  if (text(at(manifest, "kind")) != "library" || at(manifest, "format").cast<int64_t>() != 1)
    throw std::runtime_error(folder + " is no exported library of format 1");
  Object target = at(manifest, "target").cast<Object>();
  check_machine(target);
  for (const auto& [name, hash] : at(manifest, "files").cast<Object>()) {
    std::string path = folder + "/" + text(name);
    Mapped content(path);
    if (!options.skip_hashes && sha256(content.data(), content.size()) != text(hash))
      throw std::runtime_error(path + " is damaged or was changed: copy the whole folder again, or export the model again");
  }
  load_runtime(folder, target, options);
  for (const auto& [name, limits] : at(manifest, "symbols").cast<Object>()) {
    List both = limits.cast<List>();
    symbols[text(name)] = {both[0].cast<int64_t>(), both[1].as<int64_t>()};
  }
  auto limits = manifest.find(ffi::String("limits"));
  for (const ffi::Any& limit : limits == manifest.end() ? List() : (*limits).second.cast<List>()) {
    Object facts = limit.cast<Object>();
    products.push_back({{}, at(facts, "product").cast<int64_t>()});
    for (const ffi::Any& name : at(facts, "symbols").cast<List>()) products.back().first.push_back(text(name));
  }
  weights_ = std::make_shared<Mapped>(folder + "/weights.safetensors");
  std::map<std::string, ffi::Tensor> weights = read_weights(weights_, folder + "/weights.safetensors");
  // dlopen gives what it loaded before under the same name: every code has a spelling of the path of its own.
  std::string spelled = folder;
  for (char digit : text(at(at(manifest, "files").cast<Object>(), "model.so")).substr(0, 8))
    for (int bit = 8, value = digit <= '9' ? digit - '0' : digit - 'a' + 10; bit; bit /= 2) spelled += value & bit ? "/." : "/";
  library_ = ffi::Module::LoadFromFile(spelled + "/model.so");
  machine_ = (*library_.value()->GetFunction("vm_load_executable", true))().cast<ffi::Module>();
  (*machine_.value()->GetFunction("vm_initialization", true))(static_cast<int>(kDLCPU), 0, 2);  // the CPU, its only device, pooled memory
  for (const auto& [name, described] : at(manifest, "functions").cast<Object>()) {
    Object facts = described.cast<Object>();
    Function function{tensors(at(facts, "inputs")), tensors(at(facts, "outputs")), *machine_.value()->GetFunction(ffi::String(text(name)), true), {}};
    for (const ffi::Any& one : at(facts, "parameters").cast<List>()) {
      auto found = weights.find(text(one));
      if (found == weights.end()) throw std::runtime_error(folder + "/weights.safetensors lacks " + text(one) + ": copy the whole folder again");
      function.bound.push_back(found->second);
    }
    functions.emplace(text(name), std::move(function));
  }
}

const Function& Model::function(const std::string& name) const {
  auto found = functions.find(name);
  if (found == functions.end()) {
    std::string known;
    for (const auto& one : functions) known += " " + one.first;
    throw std::runtime_error("there is no function " + name + "; there are:" + known);
  }
  return found->second;
}

ffi::Tensor Model::checked(const Tensor& wanted, const sparsify_tensor& given, std::map<std::string, int64_t>* sizes) const {
  if (given.dtype != wanted.dtype)
    throw std::runtime_error(wanted.name + " has dtype " + name_of(given.dtype) + ", expected " + name_of(wanted.dtype));
  if (given.dimensions != static_cast<int32_t>(wanted.shape.size()))
    throw std::runtime_error(wanted.name + " has " + std::to_string(given.dimensions) + " dimensions, expected " + std::to_string(wanted.shape.size()));
  for (int32_t i = 0; i < given.dimensions; ++i) {
    const Dimension& dimension = wanted.shape[i];
    const int64_t size = given.shape[i];
    auto limits = symbols.find(dimension.symbol);
    bool fits = dimension.symbol.empty() ? size == dimension.size : sizes->emplace(dimension.symbol, size).first->second == size;
    if (limits != symbols.end()) fits = fits && size >= limits->second.low && size <= limits->second.high.value_or(size);
    if (fits && size >= 0) continue;
    std::string expected = dimension.symbol.empty() ? std::to_string(dimension.size) : dimension.symbol;
    if (limits != symbols.end() && limits->second.high)
      expected += " (from " + std::to_string(limits->second.low) + " to " + std::to_string(*limits->second.high) + ")";
    throw std::runtime_error("dimension " + std::to_string(i) + " of " + wanted.name + " is " + std::to_string(size) + ", expected " + expected);
  }
  if (wanted.updated && reinterpret_cast<uintptr_t>(given.data) % ALIGNED)
    throw std::runtime_error(wanted.name + " is changed in place: it must start at a multiple of 64 bytes");
  return tensor(given.data, ffi::ShapeView(given.shape, given.dimensions), dlpack(given.dtype), nullptr);
}

std::vector<ffi::Tensor> Model::run(const std::string& name, const char* const* names, const sparsify_tensor* inputs, int count) const {
  const Function& found = function(name);
  std::map<std::string, const sparsify_tensor*> given;
  for (int i = 0; i < count; ++i) given[names[i]] = &inputs[i];
  std::map<std::string, int64_t> sizes;
  std::vector<ffi::AnyView> arguments;
  std::vector<ffi::Tensor> kept;
  for (const Tensor& wanted : found.inputs) {
    auto one = given.find(wanted.name);
    if (one == given.end()) throw std::runtime_error("input " + wanted.name + " is missing");
    kept.push_back(checked(wanted, *one->second, &sizes));
  }
  if (given.size() != found.inputs.size() || count != static_cast<int>(given.size()))
    throw std::runtime_error("there are " + std::to_string(found.inputs.size()) + " inputs, got " + std::to_string(count));
  for (const auto& [symbols_of, most] : products) {
    double product = 1;
    std::string what;
    for (const std::string& symbol : symbols_of) {
      auto size = sizes.find(symbol);
      product *= size == sizes.end() ? 1 : static_cast<double>(size->second);
      what += (what.empty() ? "" : " times ") + symbol;
    }
    if (product > static_cast<double>(most)) throw std::runtime_error(what + " is more than " + std::to_string(most) + ": split the batch");
  }
  if (auto capacity = sizes.find("capacity"); capacity != sizes.end() && kept.size() > 1 && found.inputs[1].name == "past") {
    const int64_t past = *static_cast<const int64_t*>(kept[1].data_ptr()), room = capacity->second - kept[0].shape().back();
    if (past < 0 || past > room)
      throw std::runtime_error("past is " + std::to_string(past) + ", but caches of " + std::to_string(capacity->second) +
                               " have room for these tokens after 0 to " + std::to_string(room));
  }
  for (const ffi::Tensor& one : kept) arguments.emplace_back(one);
  arguments.emplace_back(found.bound);
  ffi::Any result;
  found.code.CallPacked(arguments.data(), static_cast<int>(arguments.size()), &result);
  if (auto single = result.as<ffi::Tensor>()) return {*single};
  std::vector<ffi::Tensor> outputs;
  for (const ffi::Tensor& one : result.cast<ffi::Array<ffi::Tensor>>()) outputs.push_back(one);
  return outputs;
}

}  // namespace sparsify
