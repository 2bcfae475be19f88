#include "machine.h"

#include <sched.h>
#include <unistd.h>

#include <map>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace sparsify {

int processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
}

#if defined(__x86_64__)

const char* architecture() { return "x86_64"; }

namespace {
struct Bit { unsigned leaf, sub; int word; int bit; unsigned state; };  // word: 0 eax ... 3 edx; state: what the system must save (XCR0)
constexpr unsigned AVX = 0x6, AVX512 = 0xe6, AMX = 0x60000;
const std::map<std::string, Bit> BITS = {
    {"avx2", {7, 0, 1, 5, AVX}},          {"fma", {1, 0, 2, 12, AVX}},           {"f16c", {1, 0, 2, 29, AVX}},
    {"avx512f", {7, 0, 1, 16, AVX512}},   {"avx512bw", {7, 0, 1, 30, AVX512}},   {"avx512vl", {7, 0, 1, 31, AVX512}},
    {"avx512dq", {7, 0, 1, 17, AVX512}},  {"avx512vnni", {7, 0, 2, 11, AVX512}}, {"avx512bf16", {7, 1, 0, 5, AVX512}},
    {"amx-tile", {7, 0, 3, 24, AMX}},     {"amx-bf16", {7, 0, 3, 22, AMX}},      {"amx-int8", {7, 0, 3, 25, AMX}},
};
}  // namespace

bool has_feature(const std::string& name) {
  auto found = BITS.find(name);
  if (found == BITS.end()) return false;
  unsigned words[4];
  if (!__get_cpuid_count(1, 0, &words[0], &words[1], &words[2], &words[3]) || !(words[2] >> 27 & 1)) return false;  // no OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const Bit& bit = found->second;
  if ((low & bit.state) != bit.state) return false;
  return __get_cpuid_count(bit.leaf, bit.sub, &words[0], &words[1], &words[2], &words[3]) && (words[bit.word] >> bit.bit & 1);
}

#elif defined(__aarch64__)

const char* architecture() { return "aarch64"; }

bool has_feature(const std::string& name) {
  static const std::map<std::string, std::pair<unsigned long, int>> bits = {
      {"neon", {AT_HWCAP, 1}}, {"fullfp16", {AT_HWCAP, 10}}, {"dotprod", {AT_HWCAP, 20}}, {"sve", {AT_HWCAP, 22}},
      {"sve2", {AT_HWCAP2, 1}}, {"i8mm", {AT_HWCAP2, 13}},   {"bf16", {AT_HWCAP2, 14}},
  };
  auto found = bits.find(name);
  return found != bits.end() && (getauxval(found->second.first) >> found->second.second & 1);
}

#else
#error "exported models run on x86-64 and on aarch64"
#endif

}  // namespace sparsify
