; What an x86 processor and its operating system tell: a word of cpuid (0 to 3: eax, ebx, ecx, edx), and which registers the system keeps.
define i64 @cpuid(i32 %leaf, i32 %part, i32 %which) {
  %all = call { i32, i32, i32, i32 } asm sideeffect "cpuid", "={ax},={bx},={cx},={dx},{ax},{cx},~{dirflag},~{fpsr},~{flags}"(i32 %leaf, i32 %part)
  %a = extractvalue { i32, i32, i32, i32 } %all, 0
  %b = extractvalue { i32, i32, i32, i32 } %all, 1
  %c = extractvalue { i32, i32, i32, i32 } %all, 2
  %d = extractvalue { i32, i32, i32, i32 } %all, 3
  %first = icmp eq i32 %which, 0
  %second = icmp eq i32 %which, 1
  %third = icmp eq i32 %which, 2
  %cd = select i1 %third, i32 %c, i32 %d
  %bcd = select i1 %second, i32 %b, i32 %cd
  %word = select i1 %first, i32 %a, i32 %bcd
  %wide = zext i32 %word to i64
  ret i64 %wide
}
define i64 @kept_registers() {
  %word = call i64 @cpuid(i32 1, i32 0, i32 2)
  %bit = and i64 %word, 134217728
  %told = icmp ne i64 %bit, 0
  br i1 %told, label %ask, label %none
ask:
  %both = call { i32, i32 } asm sideeffect "xgetbv", "={ax},={dx},{cx},~{dirflag},~{fpsr},~{flags}"(i32 0)
  %low = extractvalue { i32, i32 } %both, 0
  %wide = zext i32 %low to i64
  ret i64 %wide
none:
  ret i64 0
}
