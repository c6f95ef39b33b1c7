#pragma once
// What the running block may know of the writes of earlier blocks of its launch, by CUDA's memory model: a fence, then
// an atomic operation, release what came before the fence; an atomic operation on the same word, then a fence, acquire
// it for the thread, and a barrier hands it on to the others.
#include <cstdint>

namespace emulator::visibility {

// A point in the program of a thread of some block.
struct Moment {
  uint32_t epoch;       // of the barriers of its block
  uint32_t warp_epoch;  // of those of its warp
  uint16_t thread;
  uint32_t fences;  // that the thread has passed in this block

  bool operator==(const Moment& other) const { return thread == other.thread && fences == other.fences; }
};

void begin_launch();
void begin_block(uint32_t epoch);
void block_barrier();
void fence(const Moment& now);                            // `now.fences` counts this one
void atomic(const void* address, const Moment& now);      // on global memory
bool is_visible(const Moment& write, const Moment& now);  // to the running thread; `write` is of an earlier block

}  // namespace emulator::visibility
