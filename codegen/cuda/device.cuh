// What kernels call beside plain C++: the part that is the same for nvcc and for the emulator of the tests, which each define the
// instructions in another file (ptx.cuh here, tests/emulator/instructions.h there). Numbers of 16 bits are their bits.

#define CUDART_INF_F float_of_bits(0x7F800000u)  // TVM's names
#define CUDART_NAN_F float_of_bits(0x7FC00000u)

DEVICE float low_bf16(unsigned word) { return float_of_bits(word << 16); }
DEVICE float high_bf16(unsigned word) { return float_of_bits(word & 0xFFFF0000u); }
DEVICE float low_fp16(unsigned word) { return float_of_fp16((unsigned short)word); }
DEVICE float high_fp16(unsigned word) { return float_of_fp16((unsigned short)(word >> 16)); }

DEVICE float read_fp32(const void* from) { return *(const float*)from; }
DEVICE float read_bf16(const void* from) { return float_of_bits((unsigned)*(const unsigned short*)from << 16); }
DEVICE float read_fp16(const void* from) { return float_of_fp16(*(const unsigned short*)from); }
DEVICE void write_fp32(void* to, float value) { *(float*)to = value; }
DEVICE void write_bf16(void* to, float value) { *(unsigned short*)to = bf16_of_float(value); }
DEVICE void write_fp16(void* to, float value) { *(unsigned short*)to = fp16_of_float(value); }
// Two neighbours at once: `to` is aligned to both.
DEVICE unsigned pair_bf16(float low, float high) { return bf16_of_float(low) | (unsigned)bf16_of_float(high) << 16; }
DEVICE unsigned pair_fp16(float low, float high) { return fp16_of_float(low) | (unsigned)fp16_of_float(high) << 16; }
DEVICE void write_word(void* to, unsigned word) { *(unsigned*)to = word; }
DEVICE int read_word(const void* from) { return *(const int*)from; }
DEVICE int pair_of(int low, int high) { return (low & 0xFFFF) | high << 16; }
struct alignas(16) Sixteen { int words[4]; };
struct alignas(16) Four { float numbers[4]; };
DEVICE void store16(void* to, const float* numbers) { *(Four*)to = Four{{numbers[0], numbers[1], numbers[2], numbers[3]}}; }
DEVICE void write16(void* to, const int* words) { *(Sixteen*)to = Sixteen{{words[0], words[1], words[2], words[3]}}; }

// sums[i] += factor * numbers[i], for 16 bytes of numbers.
DEVICE void add_fp32(float* sums, const unsigned* words, float factor) {
  UNROLL for (int i = 0; i < 4; ++i) sums[i] = fused(factor, float_of_bits(words[i]), sums[i]);
}
DEVICE void add_bf16(float* sums, const unsigned* words, float factor) {
  UNROLL for (int i = 0; i < 4; ++i) {
    sums[2 * i] = fused(factor, low_bf16(words[i]), sums[2 * i]);
    sums[2 * i + 1] = fused(factor, high_bf16(words[i]), sums[2 * i + 1]);
  }
}
DEVICE void add_fp16(float* sums, const unsigned* words, float factor) {
  UNROLL for (int i = 0; i < 4; ++i) {
    sums[2 * i] = fused(factor, low_fp16(words[i]), sums[2 * i]);
    sums[2 * i + 1] = fused(factor, high_fp16(words[i]), sums[2 * i + 1]);
  }
}

// The sum over the lanes of a warp, in all of them; and over the lanes before this one and itself.
DEVICE float warp_sum(float value) {
  UNROLL for (int bit = 16; bit; bit >>= 1) value += shuffle_xor(value, bit);
  return value;
}
DEVICE int warp_scan(int value) {
  UNROLL for (int step = 1; step < 32; step <<= 1) { int before = shuffle_up(value, step); if (lane() >= step) value += before; }
  return value;
}
DEVICE float quad_sum(float value) { value += shuffle_xor(value, 1); return value + shuffle_xor(value, 2); }
// The larger of two, a NaN where one is.
DEVICE float larger(float a, float b) { return a != a ? a : (a > b ? a : b); }
DEVICE float quad_max(float value) { value = larger(value, shuffle_xor(value, 1)); return larger(value, shuffle_xor(value, 2)); }

// Is it selected: not |x - center| * scale < limit, so that a NaN is.
DEVICE bool selected(float x, float center, float scale, float limit) { return !(absolute(x - center) * scale < limit); }

// Activations of ops/select_ffn.py and of epilogues; a NaN stays one.
DEVICE float relu(float x) { return x < 0.f ? 0.f : x; }
DEVICE float clamped(float x, float low, float high) { x = x < low ? low : x; return x > high ? high : x; }
DEVICE float relu2(float x) { x = relu(x); return x * x; }
DEVICE float leaky_relu(float x, float slope) { return x < 0.f ? x * slope : x; }
DEVICE float hardsigmoid(float x) { return clamped(x + 3.f, 0.f, 6.f) * (1.f / 6.f); }
DEVICE float hardswish(float x) { return x * hardsigmoid(x); }
DEVICE float sigmoid(float x) { return 1.f / (1.f + exp2_of(x * -1.44269504f)); }
DEVICE float silu(float x) { return x * sigmoid(x); }
DEVICE float gelu(float x) { return 0.5f * x * (1.f + erf_of(x * 0.70710678f)); }
DEVICE float gelu_tanh(float x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }

// The numbers of a dtype, for templates: what one is stored as, and as a float.
struct Fp32 {
  typedef float Bits; DEVICE float value(float x) { return x; }
  DEVICE void add(float* sums, const unsigned* words, float factor) { add_fp32(sums, words, factor); }
};
#define SHORT_NUMBERS(NAME, TYPE) \
struct NAME { \
  typedef unsigned short Bits; DEVICE float value(unsigned short x) { return low_##TYPE(x); } \
  DEVICE float low(unsigned word) { return low_##TYPE(word); } \
  DEVICE float high(unsigned word) { return high_##TYPE(word); } \
  DEVICE void add(float* sums, const unsigned* words, float factor) { add_##TYPE(sums, words, factor); } \
};
SHORT_NUMBERS(Bf16, bf16)
SHORT_NUMBERS(Fp16, fp16)

// Eight neighbours of `Bits`, one or two loads of 16 bytes.
template <typename Bits> DEVICE void load_eight(Bits* to, const void* from) {
  UNROLL for (int i = 0; i < (int)sizeof(Bits) / 2; ++i) load16((unsigned*)to + 4 * i, (const char*)from + 16 * i);
}
// sums[m] += values[i] * x[m][columns[i]], for those of eight places that are `valid`.
template <typename Type, typename Index, int ROWS>
DEVICE void add_listed(float* sums, const void* values, const void* columns, const void* x, int stride, int valid) {
  alignas(16) typename Type::Bits value[8]; alignas(16) Index column[8];
  load_eight(value, values); load_eight(column, columns);
  UNROLL for (int i = 0; i < 8; ++i) if (i < valid)
    UNROLL for (int m = 0; m < ROWS; ++m)
      sums[m] = fused(Type::value(value[i]), Type::value(((const typename Type::Bits*)x)[m * stride + column[i]]), sums[m]);
}
// *sum += the eight kept of sixteen inputs, two of each four: their weights, their places, two bits each, and the inputs, all two to a word.
template <typename Type> DEVICE void add_kept(float* sum, const unsigned* values, unsigned places, const unsigned* inputs) {
  UNROLL for (int i = 0; i < 4; ++i) {
    unsigned two = places >> 4 * i, bytes = ((two & 3) | (two << 6 & 0x300)) * 0x22 + 0x1010;   // of both, low and high
    unsigned kept = bytes_of(inputs[2 * i], inputs[2 * i + 1], bytes);
    *sum = fused(Type::low(values[i]), Type::low(kept), *sum);
    *sum = fused(Type::high(values[i]), Type::high(kept), *sum);
  }
}
// sums[m][i] += factor[m] * row[i] for 16 bytes of rows of a weight, `count` of them listed: where each begins, in 16 bytes, then a factor for each m.
// Lanes take turns: this one's first is at `list`, number `mine`, and every BESIDE-th is its own. AHEAD of them are on their way at once.
template <typename Type, int ROWS, int AHEAD, int BESIDE>
DEVICE void add_rows(float* sums, const void* list, int count, int mine, const void* weight) {
  const int LANES = 16 / sizeof(typename Type::Bits), ENTRY = 1 + ROWS, STEP = AHEAD * BESIDE;
  const int* next = (const int*)list;
  unsigned words[AHEAD][4];
  for (; count >= STEP; count -= STEP, next += STEP * ENTRY) {
    UNROLL for (int j = 0; j < AHEAD; ++j) load16(words[j], (const char*)weight + (uint64_t)(unsigned)next[j * BESIDE * ENTRY] * 16);
    UNROLL for (int j = 0; j < AHEAD; ++j)
      UNROLL for (int m = 0; m < ROWS; ++m) Type::add(sums + m * LANES, words[j], float_of_bits(next[j * BESIDE * ENTRY + 1 + m]));
  }
  UNROLL for (int j = 0; j < AHEAD; ++j) {
    bool really = mine + j * BESIDE < count;
    load16_if(words[j], (const char*)weight + (really ? (uint64_t)(unsigned)next[j * BESIDE * ENTRY] * 16 : 0), really);
  }
  UNROLL for (int j = 0; j < AHEAD; ++j) if (mine + j * BESIDE < count)
    UNROLL for (int m = 0; m < ROWS; ++m) Type::add(sums + m * LANES, words[j], float_of_bits(next[j * BESIDE * ENTRY + 1 + m]));
}
// sum + the inner product of eight weights and eight numbers that several threads read.
template <typename Type, typename Other> DEVICE float dot_eight(const void* weights, const void* numbers, float sum) {
  alignas(16) typename Type::Bits weight[8]; alignas(16) typename Other::Bits number[8];
  load_eight(weight, weights);
  UNROLL for (int i = 0; i < (int)sizeof(typename Other::Bits) / 2; ++i)
    load16_shared_by_many((unsigned*)number + 4 * i, (const char*)numbers + 16 * i);
  UNROLL for (int i = 0; i < 8; ++i) sum = fused(Type::value(weight[i]), Other::value(number[i]), sum);
  return sum;
}
// Copy 16 bytes to shared memory, through registers.
DEVICE void stage16(void* to, const void* from) {
  unsigned words[4];
  load16_shared_by_many(words, from);
  UNROLL for (int i = 0; i < 4; ++i) ((unsigned*)to)[i] = words[i];
}
// sums [4][4] += four numbers by four, out of shared memory.
DEVICE void add_outer(float* sums, const void* rows, const void* columns) {
  float row[4], column[4];
  UNROLL for (int i = 0; i < 4; ++i) { row[i] = ((const float*)rows)[i]; column[i] = ((const float*)columns)[i]; }
  UNROLL for (int i = 0; i < 4; ++i)
    UNROLL for (int j = 0; j < 4; ++j) sums[4 * i + j] = fused(row[i], column[j], sums[4 * i + j]);
}
