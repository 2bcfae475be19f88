// A GPU for tests, on one thread of the host: runs the CUDA source that TVM writes, block after block. The threads of a block are fibers that
// take turns at barriers and at the instructions of a warp; the blocks of a cluster run at once. Every launch is to be run twice: with threads from
// the first to the last and copies to shared memory as late as allowed, then the other way round. What depends on the order, or on a barrier that is
// missing, differs.

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
const int THREADS = 1024, CLUSTER = 8, FIBERS = CLUSTER * THREADS, STACK = 1 << 18, PENDING = 256, PAGE = 4096;
enum State { READY, AT_BARRIER, IN_WARP, AT_CLUSTER, DONE };
struct Copy { void* to; const void* from; bool really; int group; };
struct Warp { int arrived, what; void* arguments[32]; };
struct Block { Place at; int waiting, left; char* dynamic; Warp warps[THREADS / 32]; };
struct Fiber {
  jmp_buf where; ucontext_t start; char* stack; bool begun; State state; Place index; int number; Block* of;
  Copy copies[PENDING]; int pending, groups;
  int arrivals, waits;  // at barriers of the cluster
};

static Fiber* fibers; static int fibers_made; static Block blocks[CLUSTER];
static Fiber* current; static jmp_buf scheduler; static sigjmp_buf failed;
static Place grid, size; static int threads, cluster = 1, arrived, phase;    // blocks of a cluster, one above the other; how many came to its barrier
static bool backwards; static size_t alignment = 128; static char message[256];
static void (*body)();
static long reads, conflicts;   // of eight rows of a matrix; how many times a bank of 16 bytes is read again

static void fail(const char* what) {
  Place at = current ? current->of->at : blocks[0].at;
  snprintf(message, sizeof message, "%s: block (%d, %d, %d), thread %d", what, at.x, at.y, at.z, current ? current->number : -1);
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
  Block* own = current->of;
  if (++own->waiting < threads) return yield(AT_BARRIER);
  own->waiting = 0;
  for (int i = 0; i < threads * cluster; ++i) if (fibers[i].of == own && fibers[i].state == AT_BARRIER) fibers[i].state = READY;
}
static void cluster_arrive() {
  if (current->arrivals++ != current->waits) fail("arrives at the cluster's barrier twice");
  if (++arrived < threads * cluster) return;
  arrived = 0; ++phase;
  for (int i = 0; i < threads * cluster; ++i) if (fibers[i].state == AT_CLUSTER) fibers[i].state = READY;
}
static void cluster_wait() {
  if (current->arrivals != ++current->waits) fail("waits at the cluster's barrier without having arrived");
  if (phase < current->waits) yield(AT_CLUSTER);
}
// The same place in another block's shared memory, once that block is known to have begun, and while it cannot have left.
static char* place_of(const void* own, int rank) {
  if (rank < 0 || rank >= cluster) fail("no such block in the cluster");
  if (!current->waits) fail("writes to a block that may not have begun");
  if (blocks[rank].left < threads) fail("writes to a block that may have left");
  return blocks[rank].dynamic + ((const char*)own - current->of->dynamic);
}
// All lanes of a warp come to the same instruction; the last one executes it for all.
static void together(int what, void* arguments, void (*execute)(void**)) {
  Warp& warp = current->of->warps[current->number / 32];
  if (warp.arrived && warp.what != what) fail("lanes of a warp are at different instructions");
  warp.what = what; warp.arguments[current->number % 32] = arguments;
  if (++warp.arrived < 32) return yield(IN_WARP);
  warp.arrived = 0;
  execute(warp.arguments);
  Fiber* first = current - current->number % 32;
  for (int i = 0; i < 32; ++i) if (first + i != current) first[i].state = READY;
}
static void copy_now(const Copy& copy) { copy.really ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16); }
static void aligned(const void* pointer, int bytes) { if ((uintptr_t)pointer % bytes) fail("an address that is not aligned"); }

static void run_cluster(int shared) {
  int all = threads * cluster;
  for (int i = 0; i < cluster; ++i) {
    if (shared) memset(blocks[i].dynamic, 0xFF, shared);
    memset(blocks[i].warps, 0, sizeof blocks[i].warps); blocks[i].waiting = 0; blocks[i].left = threads;
  }
  arrived = phase = 0;
  for (int i = 0; i < all; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = READY; fiber.pending = fiber.groups = fiber.arrivals = fiber.waits = 0;
  }
  for (int left = all; left;) {
    int before = left; bool moved = false;
    for (int i = 0; i < all; ++i) {
      Fiber* fiber = fibers + (backwards ? all - 1 - i : i);
      if (fiber->state != READY) continue;
      moved = true; resume(fiber);
      if (fiber->state == DONE) --left, --fiber->of->left;
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
static int launch(Place extent, int number, int shared, void (*kernel)()) {
  if (!fibers) fibers = new Fiber[FIBERS]();
  grid = extent; threads = number; size = Place{number, 1, 1}; body = kernel;
  if (grid.y % cluster || cluster > CLUSTER || number > THREADS) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a grid of no whole clusters");
    return -1;
  }
  for (int i = 0; i < cluster; ++i) blocks[i].dynamic = guarded(shared ? shared : 1);
  for (int i = 0; i < number * cluster; ++i) {
    Fiber& fiber = fibers[i];
    if (i >= fibers_made) fiber.stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fibers_made = max(fibers_made, i + 1);
    fiber.number = i % number; fiber.index = Place{fiber.number, 0, 0}; fiber.of = blocks + i / number;
    getcontext(&fiber.start); fiber.begun = false;
    fiber.start.uc_stack.ss_sp = fiber.stack; fiber.start.uc_stack.ss_size = STACK; fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  struct sigaction action = {}, segv, bus;
  action.sa_sigaction = broken; action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv); sigaction(SIGBUS, &action, &bus);
  int wrong = sigsetjmp(failed, 0);
  if (!wrong) {
    long high = grid.y / cluster, all = grid.x * high * grid.z;
    for (long i = 0; i < all; ++i) {
      long n = backwards ? all - 1 - i : i;
      for (int j = 0; j < cluster; ++j) blocks[j].at = Place{(int)(n % grid.x), (int)(n / grid.x % high) * cluster + j, (int)(n / grid.x / high)};
      run_cluster(shared);
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
#define blockIdx (machine::current->of->at)
#define gridDim machine::grid
#define blockDim machine::size
#define __syncthreads machine::barrier
