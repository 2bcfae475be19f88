; acc[i] += x[2i] * w[2i] + x[2i + 1] * w[2i + 1] for 4 lanes of two bfloat16 each, or with w[2L] and w[2L + 1] for the L-th two of w (FEAT_BF16). By hand, because TVM lowers
; bfloat16 to uint16 before it calls an intrinsic, and as an instruction, because of the intrinsic LLVM copies the lane of w first. Arm ARM, BFDOT
; (by element): sums are rounded to odd, denormals count as zero.
define <4 x float> @dot_bf16(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w) alwaysinline {
  %sum = call <4 x float> asm "bfdot $0.4s, $2.8h, $3.8h", "=w,0,w,w"(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w)
  ret <4 x float> %sum
}
define <4 x float> @dot_bf16_0(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w) alwaysinline {
  %sum = call <4 x float> asm "bfdot $0.4s, $2.8h, $3.2h[0]", "=w,0,w,w"(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w)
  ret <4 x float> %sum
}
define <4 x float> @dot_bf16_1(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w) alwaysinline {
  %sum = call <4 x float> asm "bfdot $0.4s, $2.8h, $3.2h[1]", "=w,0,w,w"(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w)
  ret <4 x float> %sum
}
define <4 x float> @dot_bf16_2(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w) alwaysinline {
  %sum = call <4 x float> asm "bfdot $0.4s, $2.8h, $3.2h[2]", "=w,0,w,w"(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w)
  ret <4 x float> %sum
}
define <4 x float> @dot_bf16_3(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w) alwaysinline {
  %sum = call <4 x float> asm "bfdot $0.4s, $2.8h, $3.2h[3]", "=w,0,w,w"(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w)
  ret <4 x float> %sum
}
