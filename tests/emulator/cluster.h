// The device functions of codegen/cuda/cluster.cuh in plain C++.
DEVICE void cluster_arrive() { machine::cluster_arrive(); }
DEVICE void cluster_wait() { machine::cluster_wait(); }
DEVICE void push16(void* to, int block, const float* numbers) { machine::aligned(to, 16); memcpy(machine::place_of(to, block), numbers, 16); }
