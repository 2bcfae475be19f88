; x * 2 ** power, which is a whole number from -126 on: above 127 the factor is infinite, and so it is of a power that is no number, as x is none then.
define <16 x float> @scale2(<16 x float> %x, <16 x float> %power) alwaysinline {
  %below = fcmp olt <16 x float> %power, splat (float 128.0)
  %least = select <16 x i1> %below, <16 x float> %power, <16 x float> splat (float 128.0)
  %whole = fptosi <16 x float> %least to <16 x i32>
  %biased = add <16 x i32> %whole, splat (i32 127)
  %bits = shl <16 x i32> %biased, splat (i32 23)
  %factor = bitcast <16 x i32> %bits to <16 x float>
  %value = fmul <16 x float> %x, %factor
  ret <16 x float> %value
}
