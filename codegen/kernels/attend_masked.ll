; x * 2 ** power, which is a whole number.
define <16 x float> @scale2(<16 x float> %x, <16 x float> %power) alwaysinline {
  %value = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float> %x, <16 x float> %power, <16 x float> %x, i16 -1, i32 4)
  ret <16 x float> %value
}

; The same to 8e-5, for what becomes bfloat16: a polynomial on [0, 1] of what lies above the whole number below x (AVX512DQ).
define <16 x float> @exp2_rough(<16 x float> %x) alwaysinline {
  %far = fcmp olt <16 x float> %x, splat (float -125.0)
  %power = select <16 x i1> %far, <16 x float> splat (float -125.0), <16 x float> %x
  %rest = call <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(<16 x float> %power, i32 9, <16 x float> zeroinitializer, i16 -1, i32 4)
  %p2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %rest, <16 x float> splat (float 0x3FB3F96A40000000), <16 x float> splat (float 0x3FCCEFC4C0000000))
  %p1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p2, <16 x float> %rest, <16 x float> splat (float 0x3FE64444C0000000))
  %p0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p1, <16 x float> %rest, <16 x float> splat (float 0x3FEFFF6320000000))
  %value = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float> %p0, <16 x float> %power, <16 x float> %p0, i16 -1, i32 4)
  ret <16 x float> %value
}
declare <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(<16 x float>, i32, <16 x float>, i16, i32)
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float>, <16 x float>, <16 x float>, i16, i32)

; 32 bfloat16 with 0 for those that are infinite or no number; are there any?
define <16 x i32> @finite_halves(<16 x i32> %words) alwaysinline {
  %halves = bitcast <16 x i32> %words to <32 x i16>
  %exponent = and <32 x i16> %halves, splat (i16 32640)
  %bad = icmp eq <32 x i16> %exponent, splat (i16 32640)
  %clean = select <32 x i1> %bad, <32 x i16> zeroinitializer, <32 x i16> %halves
  %value = bitcast <32 x i16> %clean to <16 x i32>
  ret <16 x i32> %value
}
define i32 @bad_halves(<16 x i32> %words) alwaysinline {
  %halves = bitcast <16 x i32> %words to <32 x i16>
  %exponent = and <32 x i16> %halves, splat (i16 32640)
  %bad = icmp eq <32 x i16> %exponent, splat (i16 32640)
  %bits = bitcast <32 x i1> %bad to i32
  ret i32 %bits
}
