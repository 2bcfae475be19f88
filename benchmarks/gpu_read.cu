// How fast memory of a GPU is read by a kernel that does nothing else, by the number of bytes: what a kernel that must read so much can reach at best.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cudart static benchmarks/gpu_read.cu -o gpu_read && ./gpu_read
//
// Each launch reads other bytes than those before ("cold"), or the same ("hot"); launches follow each other in a graph, as those of a model do.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <vector>

#define CHECK(call) do { cudaError_t error = (call); if (error) { printf("%s, line %d\n", cudaGetErrorString(error), __LINE__); exit(1); } } while (0)
constexpr int THREADS = 512, UNROLL = 8, APART = 2 << 20;
constexpr size_t POOL = 6ul << 30;

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

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  char* pool; unsigned* out; cudaStream_t stream; cudaEvent_t begin, end;
  CHECK(cudaMalloc(&pool, POOL)); CHECK(cudaMalloc(&out, 4)); CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&begin)); CHECK(cudaEventCreate(&end));
  fill<<<2000, 256, 0, stream>>>((unsigned*)pool, POOL / 4);
  printf("%s\n", device.name);
  for (bool hot : {false, true}) for (double megabytes : {4.5, 9., 18., 45., 90., 235.}) {
    size_t bytes = (size_t)(megabytes * 1e6) / 256 * 256;
    int places = hot ? 1 : std::clamp((int)std::ceil(300e6 / bytes), 2, 40), launches = (12 + places - 1) / places * places;
    cudaGraph_t graph; cudaGraphExec_t ready;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < launches; ++i) {
      cudaLaunchAttribute early; early.id = cudaLaunchAttributeProgrammaticStreamSerialization; early.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t how = {};
      how.gridDim = dim3(4 * device.multiProcessorCount); how.blockDim = dim3(THREADS); how.stream = stream; how.attrs = &early; how.numAttrs = 1;
      CHECK(cudaLaunchKernelEx(&how, read, (const uint4*)(pool + (i % places) * (bytes + APART)), bytes / 16, out));
    }
    CHECK(cudaStreamEndCapture(stream, &graph)); CHECK(cudaGraphInstantiate(&ready, graph, 0));
    std::vector<float> times;
    for (int round = 0; round < 12; ++round) {
      CHECK(cudaEventRecord(begin, stream)); CHECK(cudaGraphLaunch(ready, stream)); CHECK(cudaEventRecord(end, stream));
      CHECK(cudaStreamSynchronize(stream));
      float milliseconds; CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
      if (round > 2) times.push_back(milliseconds * 1e3f / launches);
    }
    std::sort(times.begin(), times.end());
    float median = times[times.size() / 2];
    printf("%5.1f MB %s: %6.2f us, %4.0f GB/s\n", megabytes, hot ? "hot" : "cold", median, bytes / median / 1e3);
    CHECK(cudaGraphExecDestroy(ready)); CHECK(cudaGraphDestroy(graph));
  }
}
