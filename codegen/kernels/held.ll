; The same vector, and no load moves across: LLVM would load early what it has no registers for until it is multiplied. For AVX "x" is written for "w".
define <16 x float> @held(<16 x float> %x) alwaysinline {
  %same = call <16 x float> asm sideeffect "", "=w,0,~{memory}"(<16 x float> %x)
  ret <16 x float> %same
}
