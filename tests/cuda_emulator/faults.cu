// Small kernels, each with one fault, and the same without: a checker that does not tell them apart
// is broken. Every run has an input of 64 numbers and an output of 64, 64 threads a block.
#include <functional>
#include <utility>

#include "common/gpu.h"
#include "emulator.h"

namespace emulator {
namespace {

namespace gpu = ssd_ext::gpu;

constexpr int kCount = 64;

struct Memory {
  std::vector<int> in, out;
  Memory() : in(kCount), out(kCount) {
    for (int i = 0; i < kCount; ++i) in[i] = i;
    declare(in.data(), kCount * sizeof(int), Content::input);
    declare(out.data(), kCount * sizeof(int), Content::undefined);
  }
};

// ---- races ------------------------------------------------------------------------------------

// Each thread reads what the thread `kDistance` further on has written.
template <int kDistance, bool kBlockBarrier, bool kWarpBarrier>
__global__ void neighbour_kernel(const int* in, int* out) {
  __shared__ int values[kCount];
  const int i = threadIdx.x;
  values[i] = 0;
  __syncthreads();
  values[i] = in[i];
  if (kBlockBarrier) __syncthreads();
  if (kWarpBarrier) __syncwarp();
  out[i] = values[i ^ kDistance];
}

// Writes what was read before, with or without a barrier before the writing.
template <bool kBarrier>
__global__ void rotate_kernel(const int* in, int* out) {
  __shared__ int values[kCount];
  const int i = threadIdx.x;
  values[i] = in[i];
  __syncthreads();
  const int next = values[(i + 33) % kCount];
  if (kBarrier) __syncthreads();
  values[i] = next;
  out[i] = next;
}

template <bool kAtomic, bool kReadToo>
__global__ void count_kernel(const int* in, int* out) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (kAtomic) {
    atomicAdd(&sum, in[threadIdx.x]);
  } else {
    sum = 1;  // of all threads the same
  }
  if (!kReadToo) __syncthreads();
  out[threadIdx.x] = sum;
}

template <bool kOwn>
__global__ void blocks_kernel(const int* in, int* out) {
  const int half = kCount / 2, i = kOwn ? blockIdx.x * half + threadIdx.x % half : threadIdx.x;
  if (threadIdx.x < half) out[i] = in[i];
}

// ---- what a block knows of another's writes -----------------------------------------------------

enum class Fence { both, none_before, before_the_barrier, none_after, after_the_barrier };

// Each of two blocks writes a quarter of the output, by threads of both its warps; the last of them reads both.
template <Fence kFence, bool kBarrier, bool kPastL1>
__global__ void last_block_kernel(const int* in, int* out) {
  __shared__ bool is_last;
  const int quarter = kCount / 4, i = threadIdx.x, own = i - 24;
  if (0 <= own && own < quarter) out[blockIdx.x * quarter + own] = in[own];
  if (kFence == Fence::before_the_barrier) __threadfence();
  if (kBarrier) __syncthreads();
  if (i == 0) {
    if (kFence != Fence::none_before && kFence != Fence::before_the_barrier) __threadfence();
    is_last = atomicAdd(out + kCount - 1, 1) == 1;
    if (kFence != Fence::none_after && kFence != Fence::after_the_barrier) __threadfence();
  }
  __syncthreads();
  if (kFence == Fence::after_the_barrier && i == 0) __threadfence();
  if (!is_last || i >= quarter) return;
  const int *one = out + i, *other = out + quarter + i;
  out[2 * quarter + i] = kPastL1 ? __ldcg(one) + __ldcg(other) : *one + *other;
}

// Four blocks in two pairs, each with a ticket; the last of each pair takes a third ticket, and the last of those reads
// what all have written. kFenced: the last of a pair acquires what its partner has released.
template <bool kFenced>
__global__ void two_tickets_kernel(const int* in, int* out) {
  const int i = threadIdx.x;
  if (i > 0) return;
  int* const tickets = out + kCount - 3;
  out[blockIdx.x] = in[blockIdx.x];
  __threadfence();
  if (atomicAdd(&tickets[blockIdx.x / 2], 1) != 1) return;
  if (kFenced) __threadfence();
  if (atomicAdd(&tickets[2], 1) != 1) return;
  __threadfence();
  for (int b = 0; b < 4; ++b) out[4 + b] = __ldcg(out + b);
}

// ---- bounds -----------------------------------------------------------------------------------

enum class Place { global_input, global_output, static_shared, dynamic_shared };

template <Place kPlace, int kShift>
__global__ void bounds_kernel(const int* in, int* out) {
  __shared__ int fixed[kCount];
  gpu::Smem smem;
  int *carved = smem.take<int>(kCount), *behind = smem.take<int>(kCount);
  const int i = threadIdx.x, j = i + kShift;
  fixed[i] = carved[i] = behind[i] = 1;
  __syncthreads();
  if (kPlace == Place::static_shared) {
    out[i] = fixed[j];
  } else if (kPlace == Place::dynamic_shared) {
    out[i] = carved[j] + behind[i];
  } else {
    out[kPlace == Place::global_output ? j : i] = in[kPlace == Place::global_input ? j : i];
  }
}

template <bool kWrite>
__global__ void input_kernel(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (kWrite) const_cast<int*>(in)[threadIdx.x] = 1;
}

// ---- uninitialised memory ---------------------------------------------------------------------

template <bool kWritten>
__global__ void output_kernel(const int* in, int* out) {
  if (kWritten) out[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] += 1;
}

// With two blocks, the second finds in shared memory what the first has left there.
template <bool kWritten>
__global__ void shared_kernel(const int* in, int* out) {
  __shared__ int values[kCount];
  if (kWritten || blockIdx.x == 0) values[threadIdx.x] = in[threadIdx.x];
  if (blockIdx.x == 1) out[threadIdx.x] = values[threadIdx.x];
}

// ---- divergence -------------------------------------------------------------------------------

enum class Barrier { all, some, left, two };

template <Barrier kBarrier>
__global__ void barrier_kernel(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x];
  const bool first = threadIdx.x < 32;
  if (kBarrier == Barrier::left && first) return;
  if (kBarrier == Barrier::two) {
    if (first) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (kBarrier != Barrier::some || first) {
    __syncthreads();
  }
}

template <bool kAll>
__global__ void reduce_kernel(const int* in, int* out) {
  int value = in[threadIdx.x] - 32;
  if (kAll || threadIdx.x % 32 < 16) {
    value = __reduce_min_sync(gpu::kFullMask, value) + __reduce_max_sync(gpu::kFullMask, value);
  }
  out[threadIdx.x] = value;
}

enum class Lanes { all, some, left, outside, absent };

template <Lanes kLanes>
__global__ void warp_kernel(const int* in, int* out) {
  const int lane = threadIdx.x % 32;
  int value = in[threadIdx.x];
  if (kLanes == Lanes::left && lane == 31) return;
  if (kLanes == Lanes::outside) {
    value = int(__ballot_sync(0x7fffffffu, value));
  } else if (kLanes == Lanes::absent) {
    if (lane < 31) value = __shfl_sync(0x7fffffffu, value, 31);
  } else if (kLanes != Lanes::some || lane < 16) {
    value = __shfl_xor_sync(gpu::kFullMask, value, 1);
  }
  out[threadIdx.x] = value;
}

// ---- what only the sanitizers see -------------------------------------------------------------

template <int kShift>
__global__ void alignment_kernel(const int* in, int* out) {
  if (threadIdx.x < 8) out[threadIdx.x] = reinterpret_cast<const gpu::Four<int>*>(in + kShift)[threadIdx.x].v[0];
}

template <bool kOverflow>
__global__ void overflow_kernel(const int* in, int* out) {
  out[threadIdx.x] = (kOverflow ? 0x7fffffff : 0) + in[threadIdx.x];
}

using Kernel = void (*)(const int*, int*);

void go(Kernel kernel, unsigned blocks = 1, unsigned threads = kCount, size_t shared = 2 * kCount * sizeof(int),
        bool cleared = false) {
  Memory memory;
  if (cleared) gpu::clear(memory.out.data(), kCount * sizeof(int), nullptr);
  gpu::launch(kernel, dim3(blocks), dim3(threads), shared, nullptr, memory.in.data(), memory.out.data());
}

template <Fence kFence, bool kBarrier = true, bool kPastL1 = true>
void go_last_block(bool cleared = true) {
  go(last_block_kernel<kFence, kBarrier, kPastL1>, 2, kCount, 0, cleared);
}

// Named "checker: fault", or "none: ..." for a kernel that is right.
std::vector<std::pair<std::string, std::function<void()>>> faults() {
  return {
      {"none: barrier", [] { go(neighbour_kernel<32, true, false>); }},
      {"none: warp barrier", [] { go(neighbour_kernel<1, false, true>); }},
      {"race: no barrier", [] { go(neighbour_kernel<32, false, false>); }},
      {"race: no warp barrier", [] { go(neighbour_kernel<1, false, false>); }},
      {"race: warp barrier between warps", [] { go(neighbour_kernel<32, false, true>); }},
      {"none: barrier before writing", [] { go(rotate_kernel<true>); }},
      {"race: no barrier before writing", [] { go(rotate_kernel<false>); }},
      {"none: atomics", [] { go(count_kernel<true, false>); }},
      {"race: same value", [] { go(count_kernel<false, false>); }},
      {"race: plain read beside atomics", [] { go(count_kernel<true, true>); }},
      {"none: blocks apart", [] { go(blocks_kernel<true>, 2); }},
      {"race: between blocks", [] { go(blocks_kernel<false>, 2); }},
      {"none: last block", [] { go_last_block<Fence::both>(); }},
      {"race: no fence before the ticket", [] { go_last_block<Fence::none_before>(); }},
      {"race: fence before the barrier", [] { go_last_block<Fence::before_the_barrier>(); }},
      {"race: no barrier before the fence", [] { go_last_block<Fence::both, false>(); }},
      {"race: no fence after the ticket", [] { go_last_block<Fence::none_after>(); }},
      {"race: fence after the barrier", [] { go_last_block<Fence::after_the_barrier>(); }},
      {"read through L1: last block", [] { go_last_block<Fence::both, true, false>(); }},
      {"uninitialised read: ticket", [] { go_last_block<Fence::both>(false); }},
      {"none: two levels of tickets", [] { go(two_tickets_kernel<true>, 4, kCount, 0, true); }},
      {"race: no fence between two levels of tickets", [] { go(two_tickets_kernel<false>, 4, kCount, 0, true); }},
      {"none: within bounds", [] { go(bounds_kernel<Place::global_input, 0>); }},
      {"out of bounds: behind an input", [] { go(bounds_kernel<Place::global_input, 1>); }},
      {"out of bounds: before an input", [] { go(bounds_kernel<Place::global_input, -1>); }},
      {"out of bounds: behind an output", [] { go(bounds_kernel<Place::global_output, 1>); }},
      {"sanitizer: behind a shared array", [] { go(bounds_kernel<Place::static_shared, 1>); }},
      {"out of bounds: carved array", [] { go(bounds_kernel<Place::dynamic_shared, 1>); }},
      {"dynamic shared memory too small: launch", [] { go(bounds_kernel<Place::global_input, 0>, 1, kCount, kCount); }},
      {"none: cleared", [] { go(output_kernel<false>, 1, kCount, 0, true); }},
      {"out of bounds: clearing",
       [] {
         Memory m;
         gpu::clear(m.out.data(), (kCount + 1) * sizeof(int), nullptr);
       }},
      {"none: input read", [] { go(input_kernel<false>); }},
      {"write to an input: all", [] { go(input_kernel<true>); }},
      {"none: output written first", [] { go(output_kernel<true>); }},
      {"uninitialised read: output", [] { go(output_kernel<false>); }},
      {"none: shared memory written first", [] { go(shared_kernel<true>, 2); }},
      {"uninitialised read: another block's shared memory", [] { go(shared_kernel<false>, 2); }},
      {"none: all at the barrier", [] { go(barrier_kernel<Barrier::all>); }},
      {"divergent barrier: in a branch", [] { go(barrier_kernel<Barrier::some>); }},
      {"divergent barrier: threads have left", [] { go(barrier_kernel<Barrier::left>); }},
      {"divergent barrier: two barriers", [] { go(barrier_kernel<Barrier::two>); }},
      {"none: all lanes", [] { go(warp_kernel<Lanes::all>); }},
      {"warp operation with missing lanes: in a branch", [] { go(warp_kernel<Lanes::some>); }},
      {"warp operation with missing lanes: a lane has left", [] { go(warp_kernel<Lanes::left>); }},
      {"warp operation with missing lanes: half a warp", [] { go(warp_kernel<Lanes::all>, 1, 16); }},
      {"the calling lane is not in mask: lane 31", [] { go(warp_kernel<Lanes::outside>); }},
      {"a shuffle reads lane 31, which is not in mask: lane 31", [] { go(warp_kernel<Lanes::absent>); }},
      {"none: all lanes reduce", [] { go(reduce_kernel<true>); }},
      {"warp operation with missing lanes: half a warp reduces", [] { go(reduce_kernel<false>); }},
      {"invalid launch: too many threads", [] { go(input_kernel<false>, 1, 2048); }},
      {"invalid launch: too much shared memory", [] { go(input_kernel<false>, 1, kCount, 50 << 10); }},
      {"none: aligned", [] { go(alignment_kernel<0>); }},
      {"sanitizer: misaligned", [] { go(alignment_kernel<1>); }},
      {"none: no overflow", [] { go(overflow_kernel<false>); }},
      {"sanitizer: overflow", [] { go(overflow_kernel<true>); }},
  };
}

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const auto& [name, run] : faults()) names.push_back(name);
  return names;
}

void run_fault(const std::string& name) {
  for (const auto& [other, run] : faults())
    if (other == name) return run();
  throw std::invalid_argument("no such fault: " + name);
}

}  // namespace emulator
