// A GPU for tests, on one thread of the host: runs the CUDA source that TVM writes, block after block. The threads of a block are fibers that
// take turns at barriers and at the instructions of a warp. Every launch is to be run twice: with threads from the first to the last and
// copies to shared memory as late as allowed, then the other way round. What depends on the order, or on a barrier that is missing, differs.

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>

using std::max;
using std::min;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
struct nv_bfloat16 { unsigned short bits; };
struct half { unsigned short bits; };
struct Place { int x, y, z; };

extern "C" void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);

namespace machine {
const int THREADS = 1024, STACK = 1 << 18, PENDING = 256, PAGE = 4096;
enum State { READY, AT_BARRIER, IN_WARP, DONE };
struct Copy { void* to; const void* from; bool really; int group; };
struct Fiber {
  jmp_buf where; ucontext_t start; char* stack; bool begun; State state; Place index; int number;
  Copy copies[PENDING]; int pending, groups;
};
struct Warp { int arrived, what; void* arguments[32]; };

static Fiber* fibers; static Warp warps[THREADS / 32];
static Fiber* current; static jmp_buf scheduler; static sigjmp_buf failed;
static Place block, grid, size; static int threads, waiting;
static bool backwards; static char* dynamic; static size_t alignment = 128; static char message[256];
static void (*body)();
static long reads, conflicts;   // of eight rows of a matrix; how many times a bank of 16 bytes is read again

static void fail(const char* what) {
  snprintf(message, sizeof message, "%s: block (%d, %d, %d), thread %d", what, block.x, block.y, block.z, current ? current->number : -1);
  siglongjmp(failed, 1);
}
static void yield(State state) {
  current->state = state;
  if (!_setjmp(current->where)) _longjmp(scheduler, 1);
}
static void enter() { for (;;) { body(); yield(DONE); } }
static void resume(Fiber* fiber) {
  current = fiber;
  if (_setjmp(scheduler)) return;
  if (fiber->begun) _longjmp(fiber->where, 1);
  fiber->begun = true;
  setcontext(&fiber->start);
}
static void barrier() {
  if (++waiting < threads) return yield(AT_BARRIER);
  waiting = 0;
  for (int i = 0; i < threads; ++i) if (fibers[i].state == AT_BARRIER) fibers[i].state = READY;
}
// All lanes of a warp come to the same instruction; the last one executes it for all.
static void together(int what, void* arguments, void (*execute)(void**)) {
  Warp& warp = warps[current->number / 32];
  if (warp.arrived && warp.what != what) fail("lanes of a warp are at different instructions");
  warp.what = what; warp.arguments[current->number % 32] = arguments;
  if (++warp.arrived < 32) return yield(IN_WARP);
  warp.arrived = 0;
  execute(warp.arguments);
  Fiber* first = fibers + current->number / 32 * 32;
  for (int i = 0; i < 32; ++i) if (first + i != current) first[i].state = READY;
}
static void copy_now(const Copy& copy) { copy.really ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16); }
static void aligned(const void* pointer, int bytes) { if ((uintptr_t)pointer % bytes) fail("an address that is not aligned"); }

static void run_block(int shared) {
  if (shared) memset(dynamic, 0xFF, shared);
  memset(warps, 0, sizeof warps); waiting = 0;
  for (int i = 0; i < threads; ++i) { fibers[i].state = READY; fibers[i].pending = fibers[i].groups = 0; }
  for (int left = threads; left;) {
    int before = left; bool moved = false;
    for (int i = 0; i < threads; ++i) {
      Fiber* fiber = fibers + (backwards ? threads - 1 - i : i);
      if (fiber->state != READY) continue;
      moved = true; resume(fiber);
      if (fiber->state == DONE) --left;
    }
    current = nullptr;
    if (!moved && left == before) fail("threads wait for others that have left, or that are at another barrier");
  }
}
static void broken(int, siginfo_t* info, void*) {
  char what[96]; snprintf(what, sizeof what, "reads or writes outside of its tensors, at %p", info->si_addr);
  fail(what);
}
static char* guarded(size_t bytes) {  // with a page that cannot be touched on either side, close to its end or to its beginning
  size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
  char* base = (char*)mmap(nullptr, whole + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(base + PAGE, whole, PROT_READ | PROT_WRITE);
  return base + PAGE + (backwards ? 0 : (whole - bytes) / alignment * alignment);
}
static int launch(Place blocks, int number, int shared, void (*kernel)()) {
  static char stacks_are_made;
  if (!stacks_are_made++) {
    fibers = new Fiber[THREADS]();
    for (int i = 0; i < THREADS; ++i) {
      Fiber& fiber = fibers[i];
      fiber.stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      fiber.number = i; fiber.index = Place{i, 0, 0};
    }
  }
  grid = blocks; threads = number; size = Place{number, 1, 1}; body = kernel; dynamic = guarded(shared ? shared : 1);
  for (int i = 0; i < number; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.start); fiber.begun = false;
    fiber.start.uc_stack.ss_sp = fiber.stack; fiber.start.uc_stack.ss_size = STACK; fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  struct sigaction action = {}, segv, bus;
  action.sa_sigaction = broken; action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv); sigaction(SIGBUS, &action, &bus);
  int wrong = sigsetjmp(failed, 0);
  if (!wrong) {
    long all = (long)grid.x * grid.y * grid.z;
    for (long i = 0; i < all; ++i) {
      long n = backwards ? all - 1 - i : i;
      block = Place{(int)(n % grid.x), (int)(n / grid.x % grid.y), (int)(n / grid.x / grid.y)};
      run_block(shared);
    }
  }
  sigaction(SIGSEGV, &segv, nullptr); sigaction(SIGBUS, &bus, nullptr);
  if (wrong) TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return wrong ? -1 : 0;
}
}  // namespace machine

extern "C" long matrix_reads() { return machine::reads; }
extern "C" long bank_conflicts() { return machine::conflicts; }
extern "C" void run_backwards(int yes) { machine::backwards = yes; }

#define __global__
#define __launch_bounds__(...)
#define __shared__
#define alignas(n) __attribute__((aligned(n)))
#define threadIdx (machine::current->index)
#define blockIdx machine::block
#define gridDim machine::grid
#define blockDim machine::size
#define __syncthreads machine::barrier
