// Products of a warpgroup, four warps, on Hopper (PTX ISA 9.0, "Asynchronous warpgroup level matrix instructions"): operands lie in shared memory
// and are read there while threads go on. Included where the target has them only; tests/emulator/group.h says the same in plain C++.
//
// An operand is made of parts of rows of 128 bytes that begin at multiples of 1024 bytes, chunks of 16 bytes exchanged by an exclusive or with the
// row's number, as tiles.py has them. Straight: a row is 64 inputs of one output (or of one row of x), `stride` bytes lie between eights of rows.
// Turned: a row is 64 outputs of one input, `stride` bytes lie between eights of inputs and `leading` between parts of 64 outputs.
DEVICE uint64_t operand(const void* part, int leading, int stride) {
  return (uint64_t)((shared_address(part) & 0x3FFFF) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}
// What this thread copied to shared memory is seen by the products that follow.
DEVICE void copies_for_group() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Sums and operands in registers are as threads left them; products from here on; the products so far are one more under way.
DEVICE void group_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void group_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int OPEN> DEVICE void group_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(OPEN) : "memory"); }

// sums [64, N] += a [64, 16] b [16, N]: those of warp w are rows 16 w to 16 w + 15, laid over its lanes as those of multiply_ for each eight columns.
#define S8(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), "+f"(sums[i + 6]), \
  "+f"(sums[i + 7])
#define S32(i) S8(i), S8(i + 8), S8(i + 16), S8(i + 24)
#define S64(i) S32(i), S32(i + 32)
#define S128(i) S64(i), S64(i + 64)
#define R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R128 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define GROUP(TYPE, NAME) \
template <int N, int A_TURNED, int B_TURNED> DEVICE void group_product_##TYPE(float* sums, uint64_t a, uint64_t b) { \
  if constexpr (N == 64) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" R32 "}, %32, %33, p, 1, 1, %34, %35;}" \
    : S32(0) : "l"(a), "l"(b), "n"(A_TURNED), "n"(B_TURNED)); \
  if constexpr (N == 128) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" R64 "}, %64, %65, p, 1, 1, %66, %67;}" \
    : S64(0) : "l"(a), "l"(b), "n"(A_TURNED), "n"(B_TURNED)); \
  if constexpr (N == 256) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {" R128 "}, %128, %129, p, 1, 1, %130, %131;}" \
    : S128(0) : "l"(a), "l"(b), "n"(A_TURNED), "n"(B_TURNED)); \
} \
/* The same with a [64, 16] in registers, as multiply_ has its own: rows of this warp. */ \
template <int N, int B_TURNED> DEVICE void group_product_own_##TYPE(float* sums, const unsigned* a, uint64_t b) { \
  if constexpr (N == 64) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" R32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %37;}" \
    : S32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B_TURNED)); \
  if constexpr (N == 128) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" R64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %69;}" \
    : S64(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B_TURNED)); \
  if constexpr (N == 256) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {" R128 "}, {%128, %129, %130, %131}, %132, p, 1, 1, %133;}" \
    : S128(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B_TURNED)); \
} \
/* a [64, 32] of 2:4 sparsity: its kept numbers, straight, and their places as multiply_sparse_ has them. */ \
template <int N, int B_TURNED> DEVICE void group_product_sparse_##TYPE(float* sums, uint64_t a, uint64_t b, unsigned places) { \
  if constexpr (N == 64) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sp.sync.aligned.m64n64k32.f32." NAME "." NAME " {" R32 "}, %32, %33, %34, 0, p, 1, 1, 0, %35;}" \
    : S32(0) : "l"(a), "l"(b), "r"(places), "n"(B_TURNED)); \
  if constexpr (N == 128) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32." NAME "." NAME " {" R64 "}, %64, %65, %66, 0, p, 1, 1, 0, %67;}" \
    : S64(0) : "l"(a), "l"(b), "r"(places), "n"(B_TURNED)); \
  if constexpr (N == 256) asm volatile( \
    "{.reg .pred p; setp.ne.b32 p, 1, 0; " \
    "wgmma.mma_async.sp.sync.aligned.m64n256k32.f32." NAME "." NAME " {" R128 "}, %128, %129, %130, 0, p, 1, 1, 0, %131;}" \
    : S128(0) : "l"(a), "l"(b), "r"(places), "n"(B_TURNED)); \
}
GROUP(bf16, "bf16")
GROUP(fp16, "f16")
