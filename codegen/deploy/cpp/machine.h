// What this processor is, and whether a target's instructions run on it: asked of the processor and the kernel, never guessed from a name.
#pragma once
#include <string>
#include <vector>

namespace sparsify {
const char* architecture();
bool has_feature(const std::string& name);  // by LLVM's names
int processors();                            // that this process may use
}  // namespace sparsify
