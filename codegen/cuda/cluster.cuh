// Clusters of blocks on Hopper (PTX ISA 9.0, "barrier.cluster", "mapa"): they run at once, and write to each other's shared memory. tests/emulator/cluster.h
// says the same in plain C++.
//
// All threads of all blocks have come as far as where they arrived, and see what the others wrote before.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Four floats to the same place of a block's shared memory: once it has begun (a barrier), and before it leaves (another).
DEVICE void push16(void* to, int block, const float* numbers) {
  unsigned place;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(to)), "r"(block));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" :: "r"(place), "f"(numbers[0]), "f"(numbers[1]), "f"(numbers[2]), "f"(numbers[3])
               : "memory");
}
