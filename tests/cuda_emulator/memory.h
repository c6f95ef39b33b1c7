#pragma once
// Every access of a kernel to memory, checked: bounds, uninitialised reads and races.
#include <cstddef>

namespace emulator::memory {

enum class Kind { read, read_past_l1, write, atomic };

// Lasts as long as the threads of a launch run. Its arguments are the only memory of the host's that they may read.
struct Launch {
  Launch(const void* arguments, size_t bytes, size_t shared_bytes);
  ~Launch();
};

void begin_block(unsigned warps, unsigned seed);  // shared memory is garbage, which depends on the seed
void block_barrier();                             // all threads of the block have passed one
void warp_barrier(unsigned warp);

// By the running thread, from the instruction before `code`. Only a build with checks gets to know
// of plain accesses.
void access(const void* address, size_t bytes, Kind kind, const void* code);

// By the host, between launches: what cudaMemset does.
void clear(void* begin, size_t bytes);

}  // namespace emulator::memory
