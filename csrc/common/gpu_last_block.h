#pragma once
// How the last block to finish goes on with what the others have written.
//
// Each block takes a ticket once its writes are done; the block that takes the last one may read them. By CUDA's memory
// model that needs two things: that taking the ticket releases the writes, which with those of the block's other
// threads come before it by the barrier, and that it acquires what all tickets before it released. And the reads must
// not be made by the path for data that no kernel writes meanwhile (ld.global.nc), which load_written() sees to.
#include <type_traits>

#include "common/gpu.h"

namespace ssd_ext::gpu {

// For one thread of a block, which has made or seen all of its writes.
__device__ __forceinline__ bool takes_last_ticket(unsigned* ticket, unsigned blocks) {
  unsigned before;
#if defined(SSD_EXT_EMULATE)
  __threadfence();
  before = atomicAdd(ticket, 1u);
  __threadfence();
#else  // in one: those fences are sequentially consistent, which is slow and more than is needed
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
#endif
  return before == blocks - 1;
}

// Whether this block is the last of `blocks` that take the ticket, in all its threads, which call this together.
// *ticket is 0 before the launch: gpu::clear() or an earlier kernel sees to that.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  __syncthreads();  // all threads have written what they had to
  return __syncthreads_or(threadIdx.x == 0 && takes_last_ticket(ticket, blocks));
}

// The same for one warp alone of each block, whose first lane has made or seen all writes. A single block needs no
// ticket.
__device__ __forceinline__ bool is_last_warp(unsigned* ticket, unsigned blocks) {
  const bool is_last =
      blocks == 1 || __any_sync(kFullMask, threadIdx.x % kWarp == 0 && takes_last_ticket(ticket, blocks));
  __syncwarp();  // what the first lane has seen, all may read
  return is_last;
}

// Reads what another block of the same launch has written, after is_last_block(); in one access, so that T is
// aligned to its size, at most 16 bytes.
template <class T>
__device__ __forceinline__ T load_written(const T* p) {
  static_assert(alignof(T) == sizeof(T) && std::is_trivially_copyable_v<T>);
#if defined(SSD_EXT_EMULATE)
  return __ldcg(p);
#else
  using Word = std::conditional_t<sizeof(T) == 16, uint4,
                                  std::conditional_t<sizeof(T) == 8, unsigned long long,
                                                     std::conditional_t<sizeof(T) == 4, unsigned, unsigned char> > >;
  return bit_cast<T>(__ldcg(reinterpret_cast<const Word*>(p)));
#endif
}

}  // namespace ssd_ext::gpu
