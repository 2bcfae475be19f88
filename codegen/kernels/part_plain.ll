; Where a masked load is as many branches as there are lanes, whole vectors are told apart first.
define <16 x float> @load_part(ptr %from, i32 %n) alwaysinline {
  %whole = icmp sge i32 %n, 16
  br i1 %whole, label %all, label %some
all:
  %whole.value = load <16 x float>, ptr %from, align 4
  br label %done
some:
  %mask = call <16 x i1> @lanes_below(i32 %n)
  %part.value = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %from, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  br label %done
done:
  %value = phi <16 x float> [%whole.value, %all], [%part.value, %some]
  ret <16 x float> %value
}
define <16 x float> @load_between(ptr %from, i32 %first, i32 %end) alwaysinline {
  %begun = icmp sle i32 %first, 0
  %open = icmp sge i32 %end, 16
  %whole = and i1 %begun, %open
  br i1 %whole, label %all, label %some
all:
  %whole.value = load <16 x float>, ptr %from, align 4
  br label %done
some:
  %before = call <16 x i1> @lanes_below(i32 %first)
  %below = call <16 x i1> @lanes_below(i32 %end)
  %from.on = xor <16 x i1> %before, splat (i1 true)
  %mask = and <16 x i1> %below, %from.on
  %part.value = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %from, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  br label %done
done:
  %value = phi <16 x float> [%whole.value, %all], [%part.value, %some]
  ret <16 x float> %value
}
define i32 @store_part(ptr %to, <16 x float> %value, i32 %n) alwaysinline {
  %whole = icmp sge i32 %n, 16
  br i1 %whole, label %all, label %some
all:
  store <16 x float> %value, ptr %to, align 4
  br label %done
some:
  %mask = call <16 x i1> @lanes_below(i32 %n)
  call void @llvm.masked.store.v16f32.p0(<16 x float> %value, ptr %to, i32 4, <16 x i1> %mask)
  br label %done
done:
  ret i32 0
}
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
