// The device functions of codegen/cuda/ptx.cuh in plain C++, as the PTX ISA describes the instructions behind them: sections "Matrix Fragments
// for mma.m16n8k16", "Matrix Fragments for sparse mma.m16n8k32", "ldmatrix", "cp.async", "shfl.sync".

#define DEVICE static inline
#define UNROLL
#define WARP(what, given, ...) machine::together(what, given, [](void** lanes) { __VA_ARGS__ });

DEVICE int lane() { return machine::current->number % 32; }
DEVICE float float_of_bits(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
DEVICE unsigned bits_of_float(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float absolute(float x) { return fabsf(x); }
DEVICE float exp2_of(float x) { return exp2f(x); }
DEVICE float log2_of(float x) { return log2f(x); }
DEVICE float erf_of(float x) { return erff(x); }
DEVICE float float_of_fp16(unsigned short h) {
  int exponent = h >> 10 & 31, fraction = h & 1023;
  float size = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  return h & 0x8000 ? -size : size;
}
DEVICE unsigned short fp16_of_float(float x) {
  unsigned sign = bits_of_float(x) >> 16 & 0x8000;
  if (x != x) return 0x7FFF;
  float size = fabsf(x);
  if (size >= 65520.f) return sign | 0x7C00;
  int exponent = -99; if (size) frexpf(size, &exponent);
  int step = exponent - 11 < -24 ? -24 : exponent - 11;   // the distance of neighbours, as a power of two
  return sign | (unsigned)(nearbyintf(ldexpf(size, -step)) + (step + 24) * 1024);
}
DEVICE unsigned short bf16_of_float(float x) {
  unsigned bits = bits_of_float(x);
  return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

DEVICE unsigned bytes_of(unsigned low, unsigned high, unsigned places) {
  uint64_t both = (uint64_t)high << 32 | low; unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= (unsigned)(both >> (places >> 4 * i & 7) * 8 & 255) << 8 * i;
  return found;
}
struct Shuffle { float value, found; int whole, got, other; };
DEVICE float shuffle_xor(float value, int bits) {
  Shuffle own{value, 0, 0, 0, lane() ^ bits};
  WARP(1, &own, for (int i = 0; i < 32; ++i) { Shuffle* s = (Shuffle*)lanes[i]; s->found = ((Shuffle*)lanes[s->other])->value; })
  return own.found;
}
DEVICE int shuffle_from(int value, int other) {
  Shuffle own{0, 0, value, 0, other & 31};
  WARP(2, &own, for (int i = 0; i < 32; ++i) { Shuffle* s = (Shuffle*)lanes[i]; s->got = ((Shuffle*)lanes[s->other])->whole; })
  return own.got;
}
DEVICE unsigned votes(bool yes) {
  Shuffle own{0, 0, yes, 0, 0};
  WARP(6, &own, int found = 0; for (int i = 0; i < 32; ++i) found |= ((Shuffle*)lanes[i])->whole << i;
    for (int i = 0; i < 32; ++i) ((Shuffle*)lanes[i])->got = found;)
  return own.got;
}
DEVICE int bits_in(unsigned word) { return __builtin_popcount(word); }
DEVICE int shuffle_up(int value, int steps) { return shuffle_from(value, lane() >= steps ? lane() - steps : lane()); }

DEVICE void load16(unsigned* to, const void* from) { machine::aligned(from, 16); memcpy(to, from, 16); }
DEVICE void load16_if(unsigned* to, const void* from, bool really) { if (really) load16(to, from); else memset(to, 0, 16); }
DEVICE float load_now(const void* from) { return *(const float*)from; }
DEVICE void load16_shared_by_many(unsigned* to, const void* from) { load16(to, from); }

DEVICE void copy16(void* to, const void* from, bool really) {
  machine::aligned(to, 16);
  if (really) machine::aligned(from, 16);
  machine::Fiber* own = machine::current;
  machine::Copy copy{to, from, really, own->groups};
  if (machine::backwards) return machine::copy_now(copy);
  if (own->pending == machine::PENDING) machine::fail("too many copies under way");
  own->copies[own->pending++] = copy;
}
DEVICE void copies_end_group() { ++machine::current->groups; }
DEVICE void copies_wait(int open) {
  machine::Fiber* own = machine::current;
  int left = 0;
  for (int i = 0; i < own->pending; ++i) {
    if (own->copies[i].group < own->groups - open) machine::copy_now(own->copies[i]);
    else own->copies[left++] = own->copies[i];
  }
  own->pending = left;
}

struct Matrices { unsigned* to; const unsigned short* row; };
// Eight rows are read at once, where they lie in different eighths of a line of 128 bytes.
static void count_conflicts(void** lanes) {
  for (int m = 0; m < 4; ++m) {
    int most = 0, times[8] = {};
    for (int i = 0; i < 8; ++i) {
      uintptr_t place = (uintptr_t)((Matrices*)lanes[8 * m + i])->row;
      int again = 0;
      for (int j = 0; j < i; ++j) again |= (uintptr_t)((Matrices*)lanes[8 * m + j])->row == place;
      if (!again) most = max(most, ++times[place / 16 % 8]);
    }
    ++machine::reads; machine::conflicts += most - 1;
  }
}
DEVICE void matrices(unsigned* to, const void* row) {
  machine::aligned(row, 16);
  Matrices own{to, (const unsigned short*)row};
  WARP(3, &own, count_conflicts(lanes); for (int l = 0; l < 32; ++l) for (int m = 0; m < 4; ++m)
    memcpy(((Matrices*)lanes[l])->to + m, ((Matrices*)lanes[8 * m + l / 4])->row + l % 4 * 2, 4);)
}
DEVICE void matrices_turned(unsigned* to, const void* row) {
  machine::aligned(row, 16);
  Matrices own{to, (const unsigned short*)row};
  WARP(4, &own, count_conflicts(lanes); for (int l = 0; l < 32; ++l) for (int m = 0; m < 4; ++m) {
    unsigned low = ((Matrices*)lanes[8 * m + l % 4 * 2])->row[l / 4], high = ((Matrices*)lanes[8 * m + l % 4 * 2 + 1])->row[l / 4];
    ((Matrices*)lanes[l])->to[m] = low | high << 16;
  })
}

typedef float (*Read)(unsigned short);
DEVICE float float_of_bf16(unsigned short bits) { return float_of_bits((unsigned)bits << 16); }
struct Product { float* sums; const unsigned *a, *b; unsigned places; };
DEVICE float of_pair(Read read, const unsigned* words, int i) { return read(words[i / 2] >> i % 2 * 16 & 0xFFFF); }
// a [16, 16]: registers 0 to 3 are rows g, g + 8, g, g + 8 (g = lane / 4) of columns 0 to 7 and then 8 to 15; b [k, 8]: column g, rows by eights;
// the sums [16, 8]: rows g and then g + 8. Each holds numbers 2 (lane % 4) and the next.
template <Read read> static void multiply(void** lanes, bool sparse) {
  float a[16][32] = {}, b[32][8]; int depth = sparse ? 32 : 16;
  for (int l = 0; l < 32; ++l) {
    Product* p = (Product*)lanes[l];
    for (int i = 0; i < 8; ++i) {
      int row = l / 4 + i / 2 % 2 * 8, column = l % 4 * 2 + i % 2 + i / 4 * 8;
      if (sparse) {  // two of each four are kept; 2 bits of each tell which, 16 of a row in the lanes of a quad with even or odd numbers
        Product* told = (Product*)lanes[l / 4 * 4 + column / 8];
        column = column / 2 * 4 + (told->places >> (row / 8 * 16 + column % 8 * 2) & 3);
      }
      a[row][column] = of_pair(read, p->a, i);
    }
    for (int i = 0; i < depth / 4; ++i) b[i / 2 * 8 + l % 4 * 2 + i % 2][l / 4] = of_pair(read, p->b, i);
  }
  for (int l = 0; l < 32; ++l) for (int i = 0; i < 4; ++i) {
    double sum = ((Product*)lanes[l])->sums[i];
    for (int k = 0; k < depth; ++k) if (!sparse || a[l / 4 + i / 2 * 8][k] != 0) sum += (double)a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
    ((Product*)lanes[l])->sums[i] = (float)sum;
  }
}
#define MULTIPLY_OF(TYPE, CODE) \
DEVICE void multiply_##TYPE(float* sums, const unsigned* a, const unsigned* b) { \
  Product own{sums, a, b, 0}; WARP(CODE, &own, multiply<float_of_##TYPE>(lanes, false);) \
} \
DEVICE void multiply_sparse_##TYPE(float* sums, const unsigned* a, const unsigned* b, unsigned places) { \
  Product own{sums, a, b, places}; WARP(CODE + 1, &own, multiply<float_of_##TYPE>(lanes, true);) \
}
MULTIPLY_OF(bf16, 10)
MULTIPLY_OF(fp16, 20)

DEVICE void let_next_begin() {}
DEVICE void after_previous() {}
DEVICE void publish() {}
DEVICE int take_number(int* counter, int parts) { int before = *counter; *counter = before >= parts - 1 ? 0 : before + 1; return before; }
DEVICE void warp_barrier() { int none = 0; WARP(5, &none, ) }
