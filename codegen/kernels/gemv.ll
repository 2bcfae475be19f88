; base[index[i]] for 16 lanes (vgatherdps).
define <16 x float> @gather(ptr %base, <16 x i32> %index) alwaysinline {
  %places = getelementptr float, ptr %base, <16 x i32> %index
  %value = call <16 x float> @llvm.masked.gather.v16f32.v16p0(<16 x ptr> %places, i32 4, <16 x i1> splat (i1 true), <16 x float> poison)
  ret <16 x float> %value
}
declare <16 x float> @llvm.masked.gather.v16f32.v16p0(<16 x ptr>, i32, <16 x i1>, <16 x float>)

; base[columns[i]] for 16 lanes, by single loads: four columns come as one word, of which shifts make addresses.
define <4 x float> @pick_four(ptr %base, ptr %columns) alwaysinline {
  %word = load i64, ptr %columns, align 2
  %a = and i64 %word, 65535
  %b.high = lshr i64 %word, 16
  %b = and i64 %b.high, 65535
  %c.high = lshr i64 %word, 32
  %c = and i64 %c.high, 65535
  %d = lshr i64 %word, 48
  %a.at = getelementptr float, ptr %base, i64 %a
  %b.at = getelementptr float, ptr %base, i64 %b
  %c.at = getelementptr float, ptr %base, i64 %c
  %d.at = getelementptr float, ptr %base, i64 %d
  %a.value = load float, ptr %a.at, align 4
  %b.value = load float, ptr %b.at, align 4
  %c.value = load float, ptr %c.at, align 4
  %d.value = load float, ptr %d.at, align 4
  %one = insertelement <4 x float> poison, float %a.value, i32 0
  %two = insertelement <4 x float> %one, float %b.value, i32 1
  %three = insertelement <4 x float> %two, float %c.value, i32 2
  %four = insertelement <4 x float> %three, float %d.value, i32 3
  ret <4 x float> %four
}
define <16 x float> @pick(ptr %base, ptr %columns) alwaysinline {
  %second = getelementptr i8, ptr %columns, i64 8
  %third = getelementptr i8, ptr %columns, i64 16
  %last = getelementptr i8, ptr %columns, i64 24
  %a = call <4 x float> @pick_four(ptr %base, ptr %columns)
  %b = call <4 x float> @pick_four(ptr %base, ptr %second)
  %c = call <4 x float> @pick_four(ptr %base, ptr %third)
  %d = call <4 x float> @pick_four(ptr %base, ptr %last)
  %low = shufflevector <4 x float> %a, <4 x float> %b, <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %high = shufflevector <4 x float> %c, <4 x float> %d, <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %all = shufflevector <8 x float> %low, <8 x float> %high, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  ret <16 x float> %all
}
