// Files of an exported folder, mapped; their SHA-256.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace sparsify {

// A file in memory: private, so that nothing written reaches the file. Throws std::runtime_error.
class Mapped {
 public:
  explicit Mapped(const std::string& path);
  ~Mapped();
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

std::string sha256(const char* data, size_t size);  // in hexadecimal

}  // namespace sparsify
