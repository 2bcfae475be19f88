; 2 ** x of LANES numbers on any processor, 0 below -126, infinite above 127.99, NaN for NaN: a minimax polynomial on [-1/2, 1/2], relative error 9e-8.
; 1.5 * 2^23 + x has x, rounded, in its lowest bits: a conversion to integers that must not fail for NaN is made number by number on x86.
; In LLVM's words because TVM's simplifier would take minutes for the formula where it stands several times.
define <LANES x float> @exp2_LANES(<LANES x float> %x) alwaysinline {
  %low = fcmp olt <LANES x float> %x, splat (float -127.0)
  %above = select <LANES x i1> %low, <LANES x float> splat (float -127.0), <LANES x float> %x
  %high = fcmp ogt <LANES x float> %above, splat (float 128.0)
  %power = select <LANES x i1> %high, <LANES x float> splat (float 128.0), <LANES x float> %above
  %moved = fadd <LANES x float> %power, splat (float 12582912.0)
  %whole = fsub <LANES x float> %moved, splat (float 12582912.0)
  %rest = fsub <LANES x float> %power, %whole
  %p4 = call <LANES x float> @llvm.fma.vLANESf32(<LANES x float> %rest, <LANES x float> splat (float 0x3F55BBA140000000), <LANES x float> splat (float 0x3F83CEA880000000))
  %p3 = call <LANES x float> @llvm.fma.vLANESf32(<LANES x float> %p4, <LANES x float> %rest, <LANES x float> splat (float 0x3FAC6B7520000000))
  %p2 = call <LANES x float> @llvm.fma.vLANESf32(<LANES x float> %p3, <LANES x float> %rest, <LANES x float> splat (float 0x3FCEBF9BC0000000))
  %p1 = call <LANES x float> @llvm.fma.vLANESf32(<LANES x float> %p2, <LANES x float> %rest, <LANES x float> splat (float 0x3FE62E42A0000000))
  %p0 = call <LANES x float> @llvm.fma.vLANESf32(<LANES x float> %p1, <LANES x float> %rest, <LANES x float> splat (float 1.0))
  %number = bitcast <LANES x float> %moved to <LANES x i32>
  %biased = add <LANES x i32> %number, splat (i32 127)
  %bits = shl <LANES x i32> %biased, splat (i32 23)
  %scale = bitcast <LANES x i32> %bits to <LANES x float>
  %value = fmul <LANES x float> %p0, %scale
  ret <LANES x float> %value
}
declare <LANES x float> @llvm.fma.vLANESf32(<LANES x float>, <LANES x float>, <LANES x float>)

; The larger, lane by lane, x where that is NaN; the largest of all, NaN only where all are; the sum.
define <LANES x float> @larger_LANES(<LANES x float> %x, <LANES x float> %least) alwaysinline {
  %below = fcmp olt <LANES x float> %x, %least
  %value = select <LANES x i1> %below, <LANES x float> %least, <LANES x float> %x
  ret <LANES x float> %value
}
define float @largest_LANES(<LANES x float> %x) alwaysinline {
  %top = call float @llvm.vector.reduce.fmax.vLANESf32(<LANES x float> %x)
  ret float %top
}
declare float @llvm.vector.reduce.fmax.vLANESf32(<LANES x float>)
define float @sum_LANES(<LANES x float> %x) alwaysinline {
  %total = call reassoc float @llvm.vector.reduce.fadd.vLANESf32(float -0.0, <LANES x float> %x)
  ret float %total
}
declare float @llvm.vector.reduce.fadd.vLANESf32(float, <LANES x float>)
