// The device functions of codegen/cuda/group.cuh in plain C++. A thread works out its own sums. Products are carried out when they are asked for,
// or as late as they may be: when somebody waits for them.
#include <functional>
#include <vector>

struct Operand { const char* part; int leading, stride; };
static Operand operands[1 << 12];
static unsigned operands_made;
struct Products { std::vector<std::pair<int, std::function<void()>>> pending; int groups = 0; };
static Products products[machine::FIBERS];

DEVICE uint64_t operand(const void* part, int leading, int stride) {
  machine::aligned(part, 16);
  unsigned number = operands_made++ % (1 << 12);
  operands[number] = Operand{(const char*)part, leading, stride};
  return number;
}
DEVICE void copies_for_group() {}
DEVICE void group_begin() {}
DEVICE void group_end() { ++products[machine::current - machine::fibers].groups; }
template <int OPEN> DEVICE void group_wait() {
  Products& own = products[machine::current - machine::fibers];
  std::vector<std::pair<int, std::function<void()>>> left;
  for (auto& one : own.pending) if (one.first < own.groups - OPEN) one.second(); else left.push_back(one);
  own.pending.swap(left);
}
static void asked(std::function<void()> work) {
  Products& own = products[machine::current - machine::fibers];
  if (machine::backwards) own.pending.emplace_back(own.groups, work); else work();
}
// The number of an operand at its place along outputs (or rows of x) and along inputs.
static unsigned short number_of(const Operand& from, bool turned, int place, int input) {
  uintptr_t at = (uintptr_t)from.part;
  at += turned ? place / 64 * from.leading + input / 8 * from.stride + input % 8 * 128 + place % 64 * 2
               : place / 8 * from.stride + place % 8 * 128 + input * 2;
  at ^= (at >> 7 & 7) << 4;
  return *(const unsigned short*)at;
}
template <Read read, int N, typename A> static void group(float* sums, A a, Operand b, bool turned, int depth, int warp, int lane) {
  for (int i = 0; i < N / 2; ++i) {
    int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = sums[i];
    for (int k = 0; k < depth; ++k) { float left; if (a(row, k, left)) sum += (double)left * read(number_of(b, turned, column, k)); }
    sums[i] = (float)sum;
  }
}
#define GROUP_OF(TYPE) \
template <int N, int A_TURNED, int B_TURNED> DEVICE void group_product_##TYPE(float* sums, uint64_t a, uint64_t b) { \
  Operand first = operands[a], second = operands[b]; int warp = machine::current->number / 32 % 4, own = lane(); \
  asked([=] { group<float_of_##TYPE, N>(sums, [=](int row, int k, float& left) { \
    left = float_of_##TYPE(number_of(first, A_TURNED, row, k)); return true; }, second, B_TURNED, 16, warp, own); }); \
} \
template <int N, int B_TURNED> DEVICE void group_product_own_##TYPE(float* sums, const unsigned* a, uint64_t b) { \
  float rows[16][16]; own_rows<float_of_##TYPE>(a, rows); \
  Operand second = operands[b]; int warp = machine::current->number / 32 % 4, own = lane(); \
  std::vector<float> kept(&rows[0][0], &rows[0][0] + 256); \
  asked([=] { group<float_of_##TYPE, N>(sums, [=](int row, int k, float& left) { left = kept[row % 16 * 16 + k]; return true; }, \
    second, B_TURNED, 16, warp, own); }); \
} \
template <int N, int B_TURNED> DEVICE void group_product_sparse_##TYPE(float* sums, uint64_t a, uint64_t b, unsigned places) { \
  unsigned told[8][2]; own_places(places, told); \
  Operand first = operands[a], second = operands[b]; int warp = machine::current->number / 32 % 4, own = lane(); \
  std::vector<unsigned> kept(&told[0][0], &told[0][0] + 16); \
  asked([=] { group<float_of_##TYPE, N>(sums, [=](int row, int k, float& left) { \
    for (int i = k / 4 * 2; i < k / 4 * 2 + 2; ++i) if ((kept[row % 8 * 2 + i / 8] >> (row / 8 % 2 * 16 + i % 8 * 2) & 3) == k % 4) { \
      left = float_of_##TYPE(number_of(first, false, row, i)); return true; } \
    return false; }, second, B_TURNED, 32, warp, own); }); \
}
struct Own { const unsigned* a; float (*rows)[16]; };
template <Read read> static void own_rows(const unsigned* a, float (*rows)[16]) {
  Own own{a, rows};
  WARP(30, &own, for (int l = 0; l < 32; ++l) for (int i = 0; i < 8; ++i) for (int to = 0; to < 32; ++to)
    ((Own*)lanes[to])->rows[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = of_pair(read, ((Own*)lanes[l])->a, i);)
}
struct Told { unsigned places; unsigned (*told)[2]; };
static void own_places(unsigned places, unsigned (*told)[2]) {
  Told own{places, told};
  WARP(31, &own, for (int l = 0; l < 32; ++l) if (l % 4 < 2) for (int to = 0; to < 32; ++to)
    ((Told*)lanes[to])->told[l / 4][l % 4] = ((Told*)lanes[l])->places;)
}
GROUP_OF(bf16)
GROUP_OF(fp16)
