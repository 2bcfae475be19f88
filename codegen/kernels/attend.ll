; What the kernels of attend_blocks do that TVM has no words for, or whose formulas its simplifier would take minutes for.
define i32 @next_task(ptr %counter) alwaysinline {
  %task = atomicrmw add ptr %counter, i32 1 monotonic
  ret i32 %task
}

; 2 ** x, at least 2 ** -126, NaN for NaN: a minimax polynomial on [-1/2, 1/2], relative error 9e-8. Denormal results would take 100 times as long.
define <16 x float> @exp2(<16 x float> %x) alwaysinline {
  %far = fcmp olt <16 x float> %x, splat (float -126.0)
  %power = select <16 x i1> %far, <16 x float> splat (float -126.0), <16 x float> %x
  %whole = call <16 x float> @llvm.rint.v16f32(<16 x float> %power)
  %rest = fsub <16 x float> %power, %whole
  %p4 = call <16 x float> @llvm.fma.v16f32(<16 x float> %rest, <16 x float> splat (float 0x3F55BBA140000000), <16 x float> splat (float 0x3F83CEA880000000))
  %p3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p4, <16 x float> %rest, <16 x float> splat (float 0x3FAC6B7520000000))
  %p2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p3, <16 x float> %rest, <16 x float> splat (float 0x3FCEBF9BC0000000))
  %p1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p2, <16 x float> %rest, <16 x float> splat (float 0x3FE62E42A0000000))
  %p0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p1, <16 x float> %rest, <16 x float> splat (float 1.0))
  %value = call <16 x float> @scale2(<16 x float> %p0, <16 x float> %whole)
  ret <16 x float> %value
}

declare <16 x float> @llvm.rint.v16f32(<16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)

; The larger, lane by lane; x where that is NaN.
define <16 x float> @larger(<16 x float> %x, <16 x float> %least) alwaysinline {
  %below = fcmp olt <16 x float> %x, %least
  %value = select <16 x i1> %below, <16 x float> %least, <16 x float> %x
  ret <16 x float> %value
}

; The largest of 16; NaN only where all are.
define float @largest(<16 x float> %x) alwaysinline {
  %top = call float @llvm.vector.reduce.fmax.v16f32(<16 x float> %x)
  ret float %top
}
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
define float @sum(<16 x float> %x) alwaysinline {
  %total = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %x)
  ret float %total
}
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)

; The first n of 32 halves, zeros behind them, as words of two; and the same written.
define <16 x i32> @load_halves(ptr %from, i32 %n) alwaysinline {
  %mask = call <32 x i1> @halves_below(i32 %n)
  %value = call <32 x i16> @llvm.masked.load.v32i16.p0(ptr %from, i32 2, <32 x i1> %mask, <32 x i16> zeroinitializer)
  %words = bitcast <32 x i16> %value to <16 x i32>
  ret <16 x i32> %words
}
define i32 @store_halves(ptr %to, <16 x i32> %words, i32 %n) alwaysinline {
  %mask = call <32 x i1> @halves_below(i32 %n)
  %value = bitcast <16 x i32> %words to <32 x i16>
  call void @llvm.masked.store.v32i16.p0(<32 x i16> %value, ptr %to, i32 2, <32 x i1> %mask)
  ret i32 0
}
define <32 x i1> @halves_below(i32 %n) alwaysinline {
  %some = icmp slt i32 %n, 32
  %few = select i1 %some, i32 %n, i32 32
  %count = trunc i32 %few to i16
  %one = insertelement <32 x i16> poison, i16 %count, i32 0
  %all = shufflevector <32 x i16> %one, <32 x i16> poison, <32 x i32> zeroinitializer
  %mask = icmp sgt <32 x i16> %all, <i16 0, i16 1, i16 2, i16 3, i16 4, i16 5, i16 6, i16 7, i16 8, i16 9, i16 10, i16 11, i16 12, i16 13, i16 14, i16 15, i16 16, i16 17, i16 18, i16 19, i16 20, i16 21, i16 22, i16 23, i16 24, i16 25, i16 26, i16 27, i16 28, i16 29, i16 30, i16 31>
  ret <32 x i1> %mask
}
declare <32 x i16> @llvm.masked.load.v32i16.p0(ptr, i32, <32 x i1>, <32 x i16>)
declare void @llvm.masked.store.v32i16.p0(<32 x i16>, ptr, i32, <32 x i1>)

; Which of 16 are infinite or no number?
define i32 @bad_words(<16 x float> %x) alwaysinline {
  %words = bitcast <16 x float> %x to <16 x i32>
  %exponent = and <16 x i32> %words, splat (i32 2139095040)
  %bad = icmp eq <16 x i32> %exponent, splat (i32 2139095040)
  %bits = bitcast <16 x i1> %bad to i16
  %word = zext i16 %bits to i32
  ret i32 %word
}

; Is any of 16 above the limit?
define i32 @any_above(<16 x float> %x, float %limit) alwaysinline {
  %one = insertelement <16 x float> poison, float %limit, i32 0
  %limits = shufflevector <16 x float> %one, <16 x float> poison, <16 x i32> zeroinitializer
  %above = fcmp ogt <16 x float> %x, %limits
  %bits = bitcast <16 x i1> %above to i16
  %word = zext i16 %bits to i32
  ret i32 %word
}

; y, or NaN where x is. By hand: TVM takes x == x for true.
define <16 x float> @unless_nan(<16 x float> %x, <16 x float> %y) alwaysinline {
  %number = fcmp ord <16 x float> %x, %x
  %value = select <16 x i1> %number, <16 x float> %y, <16 x float> %x
  ret <16 x float> %value
}

; 16 flags of a byte each, as words.
define <16 x i32> @flags(ptr %from) alwaysinline {
  %bytes = load <16 x i8>, ptr %from, align 1
  %words = zext <16 x i8> %bytes to <16 x i32>
  ret <16 x i32> %words
}

; The first n of 16 numbers, `step` bytes apart, float32 (size 4) or bfloat16, times a factor; zeros behind them. Finite ones stay below the limit.
define <16 x float> @load_bias(i64 %address, i64 %step, i32 %size, float %factor, float %limit, i32 %n) {
  %from = inttoptr i64 %address to ptr
  %mask = call <16 x i1> @lanes_below(i32 %n)
  %width = zext i32 %size to i64
  %dense = icmp eq i64 %step, %width
  %single = icmp eq i32 %size, 4
  %step1 = insertelement <16 x i64> poison, i64 %step, i32 0
  %steps = shufflevector <16 x i64> %step1, <16 x i64> poison, <16 x i32> zeroinitializer
  %apart = mul <16 x i64> %steps, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7, i64 8, i64 9, i64 10, i64 11, i64 12, i64 13, i64 14, i64 15>
  %places = getelementptr i8, ptr %from, <16 x i64> %apart
  br i1 %single, label %words, label %halves
words:
  br i1 %dense, label %words_dense, label %words_apart
words_dense:
  %w0 = call <16 x float> @load_part(ptr %from, i32 %n)
  br label %found
words_apart:
  %w1 = call <16 x float> @llvm.masked.gather.v16f32.v16p0(<16 x ptr> %places, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  br label %found
halves:
  br i1 %dense, label %halves_dense, label %halves_apart
halves_dense:
  %h0 = call <16 x i16> @llvm.masked.load.v16i16.p0(ptr %from, i32 2, <16 x i1> %mask, <16 x i16> zeroinitializer)
  br label %widen
halves_apart:
  %h1 = call <16 x i16> @llvm.masked.gather.v16i16.v16p0(<16 x ptr> %places, i32 2, <16 x i1> %mask, <16 x i16> zeroinitializer)
  br label %widen
widen:
  %h = phi <16 x i16> [%h0, %halves_dense], [%h1, %halves_apart]
  %hw = zext <16 x i16> %h to <16 x i32>
  %hs = shl <16 x i32> %hw, splat (i32 16)
  %hf = bitcast <16 x i32> %hs to <16 x float>
  br label %found
found:
  %x = phi <16 x float> [%w0, %words_dense], [%w1, %words_apart], [%hf, %widen]
  %f1 = insertelement <16 x float> poison, float %factor, i32 0
  %f = shufflevector <16 x float> %f1, <16 x float> poison, <16 x i32> zeroinitializer
  %scaled = fmul <16 x float> %x, %f
  %l1 = insertelement <16 x float> poison, float %limit, i32 0
  %most = shufflevector <16 x float> %l1, <16 x float> poison, <16 x i32> zeroinitializer
  %least = fneg <16 x float> %most
  %high = fcmp ogt <16 x float> %scaled, %most
  %capped = select <16 x i1> %high, <16 x float> %most, <16 x float> %scaled
  %low = fcmp olt <16 x float> %capped, %least
  %held = select <16 x i1> %low, <16 x float> %least, <16 x float> %capped
  %size_of = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x)
  %endless = fcmp oeq <16 x float> %size_of, splat (float 0x7FF0000000000000)
  %value = select <16 x i1> %endless, <16 x float> %x, <16 x float> %held
  ret <16 x float> %value
}
declare <16 x float> @llvm.masked.gather.v16f32.v16p0(<16 x ptr>, i32, <16 x i1>, <16 x float>)
declare <16 x i16> @llvm.masked.load.v16i16.p0(ptr, i32, <16 x i1>, <16 x i16>)
declare <16 x i16> @llvm.masked.gather.v16i16.v16p0(<16 x ptr>, i32, <16 x i1>, <16 x i16>)
declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
