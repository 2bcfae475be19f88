// Arrays in NumPy's file format, version 1, for the example program.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "sparsify.h"

namespace npy {

struct Kind { const char* descr; int bytes; };  // in the order of sparsify_dtype
const Kind KINDS[] = {{"<f4", 4}, {"<f8", 8}, {"<f2", 2}, {"<u2", 2}, {"<i8", 8}, {"<i4", 4}, {"<i2", 2}, {"|i1", 1}, {"|u1", 1}, {"|b1", 1}};

inline size_t bytes_of(const sparsify_tensor& tensor) {
  size_t size = KINDS[tensor.dtype].bytes;
  for (int i = 0; i < tensor.dimensions; ++i) size *= static_cast<size_t>(tensor.shape[i]);
  return size;
}

inline void* room(size_t size) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, size ? size : 64)) throw std::bad_alloc();
  memset(data, 0, size ? size : 64);
  return data;
}

inline sparsify_tensor read(const std::string& path) {
  FILE* file = fopen(path.c_str(), "rb");
  if (!file) throw std::runtime_error("cannot open " + path);
  unsigned char start[10];
  bool whole = fread(start, 1, 10, file) == 10 && !memcmp(start, "\x93NUMPY\x01", 7);
  std::string header(whole ? start[8] | start[9] << 8 : 0, ' ');
  whole = whole && fread(&header[0], 1, header.size(), file) == header.size() && header.find("'fortran_order': False") != std::string::npos;
  sparsify_tensor tensor{};
  tensor.dtype = -1;
  for (int i = 0; whole && i < 10; ++i)
    if (header.find(std::string("'") + KINDS[i].descr + "'") != std::string::npos) tensor.dtype = i;
  size_t open = header.find("'shape': (");
  if (!whole || tensor.dtype < 0 || open == std::string::npos) throw std::runtime_error(path + " is no array that can be read");
  for (const char* at = header.c_str() + open + 10; *at && *at != ')' && tensor.dimensions < SPARSIFY_DIMENSIONS;) {
    char* end;
    long long size = strtoll(at, &end, 10);
    if (end == at) { ++at; continue; }
    tensor.shape[tensor.dimensions++] = size;
    at = end;
  }
  tensor.data = room(bytes_of(tensor));
  whole = fread(tensor.data, 1, bytes_of(tensor), file) == bytes_of(tensor);
  fclose(file);
  if (!whole) throw std::runtime_error(path + " is cut off");
  return tensor;
}

inline void write(const std::string& path, const sparsify_tensor& tensor) {
  std::string header = std::string("{'descr': '") + KINDS[tensor.dtype].descr + "', 'fortran_order': False, 'shape': (";
  for (int i = 0; i < tensor.dimensions; ++i) header += std::to_string(tensor.shape[i]) + ",";
  header += "), }";
  while ((10 + header.size() + 1) % 64) header += ' ';
  header += '\n';
  FILE* file = fopen(path.c_str(), "wb");
  const unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<unsigned char>(header.size() & 255),
                                   static_cast<unsigned char>(header.size() >> 8)};
  bool whole = file && fwrite(start, 1, 10, file) == 10 && fwrite(header.data(), 1, header.size(), file) == header.size() &&
               fwrite(tensor.data, 1, bytes_of(tensor), file) == bytes_of(tensor);
  if (file && fclose(file)) whole = false;
  if (!whole) throw std::runtime_error("cannot write " + path);
}

}  // namespace npy
