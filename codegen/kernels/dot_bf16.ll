; acc[i] += x[2i] * w[2i] + x[2i + 1] * w[2i + 1] for 16 lanes of two bfloat16 each (AVX512_BF16). By hand, because TVM lowers bfloat16 to
; uint16 before it calls an intrinsic. Intel SDM, VDPBF16PS: each product is exact, sums round to nearest even, denormals count as zero.
define <16 x float> @dot_bf16(<16 x float> %acc, <16 x i32> %x, <16 x i32> %w) alwaysinline {
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %sum
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
