// Run a function of an exported model on arrays in files:
//
//     sparsify_example FOLDER [--function NAME] [--input NAME=FILE.npy]... [--size SYMBOL=SIZE]... [--repeat N] [--output FOLDER]
//
// Inputs that are not given are zeros, of the sizes that are. Outputs go to NAME.npy. With --generate N a language model that was exported with its
// cache goes on from --input input_ids=FILE.npy, [1, n], by the N likeliest tokens.
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <vector>

#include "npy.h"
#include "sparsify.h"

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double, std::milli>(Clock::now() - start).count(); }

struct Options {
  std::string folder, function = "main", output;
  std::map<std::string, std::string> inputs, sizes;
  int repeat = 1, generate = 0;
};

Options read_options(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word.rfind("--", 0) != 0) { options.folder = word; continue; }
    if (++i == argc) throw std::runtime_error(word + " wants a value");
    std::string value = argv[i], name = value.substr(0, value.find('=')), rest = value.substr(std::min(value.size(), name.size() + 1));
    if (word == "--function") options.function = value;
    else if (word == "--output") options.output = value;
    else if (word == "--generate") options.generate = atoi(value.c_str());
    else if (word == "--repeat") options.repeat = std::max(1, atoi(value.c_str()));
    else if (word == "--input") options.inputs[name] = rest;
    else if (word == "--size") options.sizes[name] = rest;
    else throw std::runtime_error("unknown option " + word);
  }
  if (options.folder.empty()) throw std::runtime_error("usage: sparsify_example FOLDER [--function NAME] [--input NAME=FILE.npy] [--size SYMBOL=SIZE] ...");
  return options;
}

std::runtime_error failed() { return std::runtime_error(sparsify_last_error()); }

sparsify_tensor zeros(sparsify_model* model, const Options& options, int number) {
  sparsify_tensor tensor;
  const char* function = options.generate ? "prefill" : options.function.c_str();
  if (!sparsify_input(model, function, number, &tensor)) throw failed();
  for (int i = 0; i < tensor.dimensions; ++i)
    if (tensor.shape[i] < 0) {
      auto size = options.sizes.find(sparsify_symbol(model, function, number, i));
      tensor.shape[i] = size == options.sizes.end() ? 1 : atoll(size->second.c_str());
    }
  tensor.data = npy::room(npy::bytes_of(tensor));
  return tensor;
}

// Tokens [1, n] and the caches, which functions change in place; each step reads one token and says which comes next.
void generate(sparsify_model* model, const Options& options, double loaded) {
  auto given = options.inputs.find("input_ids");
  sparsify_tensor ids = given == options.inputs.end() ? zeros(model, options, 0) : npy::read(given->second);
  int64_t past = 0, token = 0, prompt = ids.shape[1];
  std::vector<const char*> names;
  std::vector<sparsify_tensor> inputs;
  for (int i = 0; i < sparsify_inputs(model, "prefill"); ++i) {
    sparsify_tensor input;
    names.push_back(sparsify_input(model, "prefill", i, &input));
    if (i == 0) input = ids;
    if (i == 1) input.data = &past;
    if (i > 1) {  // a cache [batch, groups, capacity, width]
      input.shape[0] = 1, input.shape[2] = prompt + options.generate;
      input.data = npy::room(npy::bytes_of(input));
    }
    inputs.push_back(input);
  }
  double first = 0;
  auto start = Clock::now();
  std::string text;
  for (int i = 0; i < options.generate; ++i) {
    sparsify_tensor logits{};
    if (sparsify_run(model, i ? "decode" : "prefill", names.data(), inputs.data(), static_cast<int>(inputs.size()), &logits, 1)) throw failed();
    const float* numbers = static_cast<const float*>(logits.data);
    token = std::max_element(numbers, numbers + logits.shape[1]) - numbers;
    sparsify_release(&logits, 1);
    text += (i ? " " : "") + std::to_string(token);
    past += inputs[0].shape[1];
    inputs[0].data = &token, inputs[0].shape[1] = 1;
    if (i == 0) first = since(start);
  }
  printf("loaded in %.1f ms, prompt of %lld tokens %.1f ms, then %.1f tokens/s\n%s\n", loaded, static_cast<long long>(prompt), first,
         options.generate > 1 ? (options.generate - 1) * 1e3 / (since(start) - first) : 0, text.c_str());
  free(ids.data);
  for (size_t i = 2; i < inputs.size(); ++i) free(inputs[i].data);
  sparsify_free(model);
}

void run(const Options& options) {
  auto start = Clock::now();
  sparsify_model* model = sparsify_load(options.folder.c_str(), nullptr);
  if (!model) throw failed();
  double loaded = since(start);
  if (options.generate > 0) return generate(model, options, loaded);
  const char* function = options.function.c_str();
  const int input_count = sparsify_inputs(model, function), output_count = sparsify_outputs(model, function);
  if (input_count < 0) throw failed();
  std::vector<const char*> names;
  std::vector<sparsify_tensor> inputs, outputs(output_count);
  for (int i = 0; i < input_count; ++i) {
    names.push_back(sparsify_input(model, function, i, nullptr));
    auto given = options.inputs.find(names.back());
    inputs.push_back(given == options.inputs.end() ? zeros(model, options, i) : npy::read(given->second));
  }
  for (const auto& one : options.inputs)
    if (std::find(names.begin(), names.end(), one.first) == names.end()) throw std::runtime_error(options.function + " has no input " + one.first);
  std::vector<double> times;
  for (int i = 0; i < options.repeat; ++i) {
    sparsify_release(outputs.data(), i ? output_count : 0);
    start = Clock::now();
    if (sparsify_run(model, function, names.data(), inputs.data(), input_count, outputs.data(), output_count)) throw failed();
    times.push_back(since(start));
  }
  double first = times[0];
  std::sort(times.begin(), times.end());
  printf("loaded in %.1f ms, first run %.2f ms, median %.3f ms\n", loaded, first, times[times.size() / 2]);
  for (int i = 0; i < output_count; ++i) {
    const char* name = sparsify_output(model, function, i, nullptr);
    printf("%s:", name);
    for (int d = 0; d < outputs[i].dimensions; ++d) printf(" %lld", static_cast<long long>(outputs[i].shape[d]));
    printf("\n");
    if (!options.output.empty()) {
      mkdir(options.output.c_str(), 0777);
      npy::write(options.output + "/" + name + ".npy", outputs[i]);
    }
  }
  sparsify_release(outputs.data(), output_count);
  for (sparsify_tensor& one : inputs) free(one.data);
  sparsify_free(model);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(read_options(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "sparsify_example: %s\n", error.what());
    return 1;
  }
}
