; What the kernels of attend_blocks do that TVM has no words for, or whose formulas its simplifier would take minutes for.
define i32 @next_task(ptr %counter) alwaysinline {
  %task = atomicrmw add ptr %counter, i32 1 monotonic
  ret i32 %task
}

; The same number, in a register of its own (see scalar.ll).
define i64 @scalar_index(i64 %x) alwaysinline {
  %same = call i64 asm "", "=r,0"(i64 %x)
  ret i64 %same
}

; 2 ** x, 0 below -150, NaN for NaN: a minimax polynomial on [-1/2, 1/2], relative error 9e-8.
define <16 x float> @exp2(<16 x float> %x) alwaysinline {
  %far = fcmp olt <16 x float> %x, splat (float -150.0)
  %power = select <16 x i1> %far, <16 x float> splat (float -150.0), <16 x float> %x
  %whole = call <16 x float> @llvm.rint.v16f32(<16 x float> %power)
  %rest = fsub <16 x float> %power, %whole
  %p4 = call <16 x float> @llvm.fma.v16f32(<16 x float> %rest, <16 x float> splat (float 0x3F55BBA140000000), <16 x float> splat (float 0x3F83CEA880000000))
  %p3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p4, <16 x float> %rest, <16 x float> splat (float 0x3FAC6B7520000000))
  %p2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p3, <16 x float> %rest, <16 x float> splat (float 0x3FCEBF9BC0000000))
  %p1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p2, <16 x float> %rest, <16 x float> splat (float 0x3FE62E42A0000000))
  %p0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p1, <16 x float> %rest, <16 x float> splat (float 1.0))
  %value = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float> %p0, <16 x float> %whole, <16 x float> %p0, i16 -1, i32 4)
  ret <16 x float> %value
}

; The same to 3e-6: for what becomes bfloat16.
define <16 x float> @exp2_rough(<16 x float> %x) alwaysinline {
  %far = fcmp olt <16 x float> %x, splat (float -150.0)
  %power = select <16 x i1> %far, <16 x float> splat (float -150.0), <16 x float> %x
  %whole = call <16 x float> @llvm.rint.v16f32(<16 x float> %power)
  %rest = fsub <16 x float> %power, %whole
  %p3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %rest, <16 x float> splat (float 0x3F83A02CC0000000), <16 x float> splat (float 0x3FAC9FC460000000))
  %p2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p3, <16 x float> %rest, <16 x float> splat (float 0x3FCEC03780000000))
  %p1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p2, <16 x float> %rest, <16 x float> splat (float 0x3FE62E12C0000000))
  %p0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p1, <16 x float> %rest, <16 x float> splat (float 1.0))
  %value = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float> %p0, <16 x float> %whole, <16 x float> %p0, i16 -1, i32 4)
  ret <16 x float> %value
}
declare <16 x float> @llvm.rint.v16f32(<16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float>, <16 x float>, <16 x float>, i16, i32)

; The larger, lane by lane; x where that is NaN.
define <16 x float> @larger(<16 x float> %x, <16 x float> %least) alwaysinline {
  %below = fcmp olt <16 x float> %x, %least
  %value = select <16 x i1> %below, <16 x float> %least, <16 x float> %x
  ret <16 x float> %value
}
