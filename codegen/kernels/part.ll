; Vectors of which only some lanes are in the tensor: the others are read as 0 and not written, and their memory is not touched.
define <16 x i1> @lanes_below(i32 %n) alwaysinline {
  %one = insertelement <16 x i32> poison, i32 %n, i32 0
  %all = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %mask = icmp sgt <16 x i32> %all, <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  ret <16 x i1> %mask
}
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
