define <16 x float> @load_part(ptr %from, i32 %n) alwaysinline {
  %mask = call <16 x i1> @lanes_below(i32 %n)
  %value = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %from, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  ret <16 x float> %value
}
define <16 x float> @load_between(ptr %from, i32 %first, i32 %end) alwaysinline {
  %before = call <16 x i1> @lanes_below(i32 %first)
  %below = call <16 x i1> @lanes_below(i32 %end)
  %from.on = xor <16 x i1> %before, splat (i1 true)
  %mask = and <16 x i1> %below, %from.on
  %value = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %from, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  ret <16 x float> %value
}
define i32 @store_part(ptr %to, <16 x float> %value, i32 %n) alwaysinline {
  %mask = call <16 x i1> @lanes_below(i32 %n)
  call void @llvm.masked.store.v16f32.p0(<16 x float> %value, ptr %to, i32 4, <16 x i1> %mask)
  ret i32 0
}
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
