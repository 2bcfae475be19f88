// How fast memory of a GPU is read by a kernel that does nothing else, by the number of bytes: what a kernel that must read so much can reach at best.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cudart static benchmarks/gpu_read.cu -o gpu_read && ./gpu_read
//
// Each launch reads other bytes than those before ("cold"), or the same ("hot"); launches follow each other in a graph, as those of a model do.
// Then the same for one row of W [inputs, outputs] of every two or ten, as kernels for selected inputs have to, without selecting or adding anything:
// blocks of so many threads each read so many times 16 bytes of a row, and some blocks share the rows.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <vector>

#define CHECK(call) do { cudaError_t error = (call); if (error) { printf("%s, line %d\n", cudaGetErrorString(error), __LINE__); exit(1); } } while (0)
constexpr int THREADS = 512, UNROLL = 8, APART = 2 << 20;
constexpr size_t POOL = 6ul << 30, COLD = 270ul << 20;

__global__ void fill(unsigned* to, size_t count) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) to[i] = (unsigned)i * 2654435761u;
}

__global__ void __launch_bounds__(THREADS) read(const uint4* from, size_t count, unsigned* out) {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
  unsigned sum = 0;
  size_t step = (size_t)gridDim.x * THREADS;
  for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < count; i += step * UNROLL) {
    uint4 words[UNROLL] = {};
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * step < count)
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[u].x), "=r"(words[u].y), "=r"(words[u].z), "=r"(words[u].w) : "l"(from + i + u * step));
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) sum ^= words[u].x ^ words[u].y ^ words[u].z ^ words[u].w;
  }
  if (sum == 0x12345u) *out = sum;
}

template <int SIZE> __global__ void __launch_bounds__(SIZE) read_rows(const uint4* W, int count, int row, int across, int every, unsigned* out) {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
  int own = blockIdx.x * across + threadIdx.x % across, step = SIZE / across * gridDim.y;
  unsigned sum = 0;
  if (own >= row) return;
  for (int i = threadIdx.x / across * gridDim.y + blockIdx.y; i < count; i += step * UNROLL) {
    uint4 words[UNROLL] = {};
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      int at = i + u * step;
      if (at < count)
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[u].x), "=r"(words[u].y), "=r"(words[u].z), "=r"(words[u].w)
                     : "l"(W + (size_t)(at * every + (at * 2654435761u >> 16) % every) * row + own));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) sum ^= words[u].x ^ words[u].y ^ words[u].z ^ words[u].w;
  }
  if (sum == 0x12345u) *out = sum;
}

char* pool; unsigned* out; cudaStream_t stream; cudaEvent_t begin, end;

// Microseconds of a launch, of so many that follow each other; launch(how, i) is one of them.
template <typename Launch> float microseconds(int launches, Launch launch) {
  cudaGraph_t graph; cudaGraphExec_t ready;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < launches; ++i) {
    cudaLaunchAttribute early; early.id = cudaLaunchAttributeProgrammaticStreamSerialization; early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t how = {};
    how.stream = stream; how.attrs = &early; how.numAttrs = 1;
    launch(how, i);
  }
  CHECK(cudaStreamEndCapture(stream, &graph)); CHECK(cudaGraphInstantiate(&ready, graph, 0));
  std::vector<float> times;
  for (int round = 0; round < 12; ++round) {
    CHECK(cudaEventRecord(begin, stream)); CHECK(cudaGraphLaunch(ready, stream)); CHECK(cudaEventRecord(end, stream));
    CHECK(cudaStreamSynchronize(stream));
    float milliseconds; CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (round > 2) times.push_back(milliseconds * 1e3f / launches);
  }
  CHECK(cudaGraphExecDestroy(ready)); CHECK(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <int SIZE> void rows(int inputs, int outputs, int every, int across, int share) {
  size_t bytes = (size_t)inputs * outputs * 2, read = bytes / every;
  int places = std::clamp((int)(COLD / read) + 1, 1, (int)(POOL / bytes)), row = outputs / 8;
  float median = microseconds((12 + places - 1) / places * places, [&](cudaLaunchConfig_t& how, int i) {
    how.gridDim = dim3((row + across - 1) / across, share); how.blockDim = dim3(SIZE);
    CHECK(cudaLaunchKernelEx(&how, read_rows<SIZE>, (const uint4*)(pool + i % places * bytes), inputs / every, row, across, every, out));
  });
  printf("%d x %d, a row of %2d; %4d threads, %3d x 16 bytes, %2d share: %6.2f us, %4.0f GB/s\n", inputs, outputs, every, SIZE, across, share, median,
         read / median / 1e3);
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  CHECK(cudaMalloc(&pool, POOL)); CHECK(cudaMalloc(&out, 4)); CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&begin)); CHECK(cudaEventCreate(&end));
  fill<<<2000, 256, 0, stream>>>((unsigned*)pool, POOL / 4);
  printf("%s\n", device.name);
  for (bool hot : {false, true}) for (double megabytes : {4.5, 9., 18., 45., 90., 235.}) {
    size_t bytes = (size_t)(megabytes * 1e6) / 256 * 256;
    int places = hot ? 1 : std::clamp((int)std::ceil(300e6 / bytes), 2, 40), launches = (12 + places - 1) / places * places;
    float median = microseconds(launches, [&](cudaLaunchConfig_t& how, int i) {
      how.gridDim = dim3(4 * device.multiProcessorCount); how.blockDim = dim3(THREADS);
      CHECK(cudaLaunchKernelEx(&how, read, (const uint4*)(pool + (i % places) * (bytes + APART)), bytes / 16, out));
    });
    printf("%5.1f MB %s: %6.2f us, %4.0f GB/s\n", megabytes, hot ? "hot" : "cold", median, bytes / median / 1e3);
  }
  for (int every : {2, 10}) for (int large : {0, 1}) {
    int inputs = large ? 8192 : 4096, outputs = large ? 28672 : 11008;
    rows<512>(inputs, outputs, every, 8, 1); rows<512>(inputs, outputs, every, 8, 2); rows<256>(inputs, outputs, every, 32, 8);
    rows<512>(inputs, outputs, every, 32, 8); rows<256>(inputs, outputs, every, 32, 16); rows<128>(inputs, outputs, every, 32, 32);
  }
}
