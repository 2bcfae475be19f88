
; Which of 16 neighbours are selected, and writing those next to each other. A score that is no number is selected.
; What is selected moves together in a register, and all 16 places are written: a store under a mask does both, and takes a Zen 4 twice as long for all of the selecting.
define i32 @selected(<16 x float> %score, float %limit) alwaysinline {
  %one = insertelement <16 x float> poison, float %limit, i32 0
  %limits = shufflevector <16 x float> %one, <16 x float> poison, <16 x i32> zeroinitializer
  %kept = fcmp uge <16 x float> %score, %limits
  %bits = bitcast <16 x i1> %kept to i16
  %word = zext i16 %bits to i32
  ret i32 %word
}
define <16 x float> @only(<16 x float> %value, i32 %mask) alwaysinline {
  %bits = trunc i32 %mask to i16
  %kept = bitcast i16 %bits to <16 x i1>
  %rest = select <16 x i1> %kept, <16 x float> %value, <16 x float> zeroinitializer
  ret <16 x float> %rest
}
define i32 @compress_values(ptr %to, <16 x float> %value, i32 %mask) alwaysinline {
  %bits = trunc i32 %mask to i16
  %kept = bitcast i16 %bits to <16 x i1>
  %together = call <16 x float> @llvm.experimental.vector.compress.v16f32(<16 x float> %value, <16 x i1> %kept, <16 x float> poison)
  store <16 x float> %together, ptr %to, align 4
  ret i32 0
}
define i32 @compress_places(ptr %to, i32 %first, i32 %mask) alwaysinline {
  %bits = trunc i32 %mask to i16
  %kept = bitcast i16 %bits to <16 x i1>
  %one = insertelement <16 x i32> poison, i32 %first, i32 0
  %base = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %places = add <16 x i32> %base, <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %together = call <16 x i32> @llvm.experimental.vector.compress.v16i32(<16 x i32> %places, <16 x i1> %kept, <16 x i32> poison)
  store <16 x i32> %together, ptr %to, align 4
  %count = call i32 @llvm.ctpop.i32(i32 %mask)
  ret i32 %count
}
declare <16 x float> @llvm.experimental.vector.compress.v16f32(<16 x float>, <16 x i1>, <16 x float>)
declare <16 x i32> @llvm.experimental.vector.compress.v16i32(<16 x i32>, <16 x i1>, <16 x i32>)
declare i32 @llvm.ctpop.i32(i32)
