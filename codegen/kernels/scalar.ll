; The number itself, in a register of its own: LLVM would gather the places of several loads into a vector, to take them out of it again one by one
; on the ports that multiply.
define i32 @scalar(i32 %x) alwaysinline {
  %same = call i32 asm "", "=r,0"(i32 %x)
  ret i32 %same
}
define i64 @scalar_index(i64 %x) alwaysinline {
  %same = call i64 asm "", "=r,0"(i64 %x)
  ret i64 %same
}
