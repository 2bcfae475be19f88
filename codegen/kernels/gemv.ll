; base[index[i]] for 16 lanes (vgatherdps).
define <16 x float> @gather(ptr %base, <16 x i32> %index) alwaysinline {
  %places = getelementptr float, ptr %base, <16 x i32> %index
  %value = call <16 x float> @llvm.masked.gather.v16f32.v16p0(<16 x ptr> %places, i32 4, <16 x i1> splat (i1 true), <16 x float> poison)
  ret <16 x float> %value
}
declare <16 x float> @llvm.masked.gather.v16f32.v16p0(<16 x ptr>, i32, <16 x i1>, <16 x float>)
