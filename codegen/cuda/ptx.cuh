// The instructions of an NVIDIA GPU that kernels call by name, as inline PTX (PTX ISA 9.0; sm_80 and later). TVM's own names of the
// two 16-bit types are opaque here: no arithmetic of theirs is used.

#define DEVICE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
struct __align__(2) nv_bfloat16 { unsigned short bits; };
struct __align__(2) half { unsigned short bits; };

DEVICE int lane() { return threadIdx.x & 31; }
DEVICE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float absolute(float x) { return fabsf(x); }
DEVICE float exp2_of(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float log2_of(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float erf_of(float x) { return erff(x); }
DEVICE float float_of_fp16(unsigned short bits) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits)); return y; }
DEVICE unsigned short fp16_of_float(float x) { unsigned short y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
DEVICE unsigned short bf16_of_float(float x) { unsigned short y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }

// Four of the eight bytes of two words, as four hexadecimal digits tell.
DEVICE unsigned bytes_of(unsigned low, unsigned high, unsigned places) { return __byte_perm(low, high, places); }
DEVICE float shuffle_xor(float value, int bits) { return __shfl_xor_sync(0xFFFFFFFFu, value, bits); }
DEVICE int shuffle_up(int value, int steps) { return __shfl_up_sync(0xFFFFFFFFu, value, steps); }
DEVICE unsigned votes(bool yes) { return __ballot_sync(0xFFFFFFFFu, yes); }
DEVICE int bits_in(unsigned word) { return __popc(word); }
DEVICE int shuffle_from(int value, int other) { return __shfl_sync(0xFFFFFFFFu, value, other); }

// 16 bytes from global memory that nobody writes meanwhile and that are read once.
DEVICE void load16(unsigned* to, const void* from) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
// The same where `really`, zeros else.
DEVICE void load16_if(unsigned* to, const void* from, bool really) {
  asm("{.reg .pred p; setp.ne.b32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; "
      "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3]) : "l"(from), "r"((int)really));
}
// A number that is needed later: the compiler does not wait with it.
DEVICE float load_now(const void* from) { float x; asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from)); return x; }
// 16 bytes that neighbours read again.
DEVICE void load16_shared_by_many(unsigned* to, const void* from) {
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}

DEVICE unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }
// 16 bytes from global to shared memory, behind the thread's back; zeros where not `really`, and then nothing is read.
DEVICE void copy16(void* to, const void* from, bool really) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(really ? 16 : 0) : "memory");
}
DEVICE void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `open` of the groups are not there yet: a constant.
DEVICE void copies_wait(int open) {
  if (open == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (open == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (open == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (open == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
  if (open == 4) asm volatile("cp.async.wait_group 4;" ::: "memory");
  if (open == 5) asm volatile("cp.async.wait_group 5;" ::: "memory");
}

// Four 8x8 matrices of 16 bits: lane i gives the address of row i % 8 of matrix i / 8; lane l gets numbers 2 (l % 4) and the next of row l / 4
// of each, or of column l / 4 by the second.
DEVICE void matrices(unsigned* to, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void matrices_turned(unsigned* to, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// sums [16, 8] += a [16, 16] b [16, 8], and a of 2:4 sparsity with k = 32: fragments as the PTX ISA lays them out over the lanes.
#define MULTIPLY(TYPE, NAME) \
DEVICE void multiply_##TYPE(float* sums, const unsigned* a, const unsigned* b) { \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
} \
DEVICE void multiply_sparse_##TYPE(float* sums, const unsigned* a, const unsigned* b, unsigned places) { \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." NAME "." NAME ".f32 " \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places)); \
}
MULTIPLY(bf16, "bf16")
MULTIPLY(fp16, "f16")

// The next kernel of the stream may be launched from now on; what the kernels before wrote is there from now on. Where a generation has no such
// launches, each kernel begins after the last one's end.
#if __CUDA_ARCH__ >= 900
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void after_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
DEVICE void let_next_begin() {}
DEVICE void after_previous() {}
#endif

// What this thread wrote is seen by all before what it writes next.
DEVICE void publish() { __threadfence(); }
// How many came before, of `parts`; the last one sets it back.
DEVICE int take_number(int* counter, int parts) { return (int)atomicInc((unsigned*)counter, (unsigned)(parts - 1)); }
// All lanes of the warp have come this far, and see what the others wrote.
DEVICE void warp_barrier() { __syncwarp(); }
