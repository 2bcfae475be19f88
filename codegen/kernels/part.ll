; Vectors of which only some lanes are in the tensor: the others are read as 0 and not written, and their memory is not touched.
define <16 x i1> @lanes_below(i32 %n) alwaysinline {
  %one = insertelement <16 x i32> poison, i32 %n, i32 0
  %all = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %mask = icmp sgt <16 x i32> %all, <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  ret <16 x i1> %mask
}
