; x * 2 ** power, which is a whole number from -126 on: above 127 the factor is infinite. A power that is no number counts as 0.
define <16 x float> @scale2(<16 x float> %x, <16 x float> %power) alwaysinline {
  %whole = call <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float> %power)
  %over = icmp sgt <16 x i32> %whole, splat (i32 128)
  %least = select <16 x i1> %over, <16 x i32> splat (i32 128), <16 x i32> %whole
  %biased = add <16 x i32> %least, splat (i32 127)
  %bits = shl <16 x i32> %biased, splat (i32 23)
  %factor = bitcast <16 x i32> %bits to <16 x float>
  %value = fmul <16 x float> %x, %factor
  ret <16 x float> %value
}
declare <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float>)
