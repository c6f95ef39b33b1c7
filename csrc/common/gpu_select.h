#pragma once
// Selection by the threads of one block together.
#include "common/gpu.h"

namespace ssd_ext::gpu {

__device__ inline int64_t warp_sum(int64_t x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// Sum of x over the lanes before this one.
__device__ inline int64_t sum_before(int64_t x, int lane) {
  int64_t sum = x;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = __shfl_up_sync(kFullMask, sum, offset);
    if (lane >= offset) sum += other;
  }
  return sum - x;
}

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// What the threads of a block tell each other.
template <class Key>
struct SelectShared {
  unsigned counts[kDigits];  // keys that begin with the prefix, by their next digit; 64-bit adds would spin
  Key prefix;                // the digits found so far of the k-th greatest key
  int64_t wanted;            // how many of the keys that begin so are among the k greatest
  int64_t found;             // how many begin so
};

template <class Key>
struct Cut {
  Key key;         // the k-th greatest
  int64_t wanted;  // of the keys equal to it, how many are among the k greatest
};

// Of key_at(0) .. key_at(n - 1), unsigned integers of kBits bits, at least k >= 1 of them above 0; n < 2^32.
// All threads of the block call it. With kDistinct no two keys above 0 are equal, and the result may be
// any key that divides the k greatest from the others: those at least as great are exactly k.
template <int kThreads, int kBits, bool kDistinct, class Key, class KeyAt>
__device__ Cut<Key> kth_greatest(const KeyAt& key_at, int64_t n, int64_t k, SelectShared<Key>& shared) {
  static_assert(kBits % kDigitBits == 0);
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  Cut<Key> cut{0, k};
#pragma unroll 1
  for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int d = thread; d < kDigits; d += kThreads) shared.counts[d] = 0;
    __syncthreads();  // counts are zero, and everybody has read the last prefix
#pragma unroll 1
    for (int64_t begin = 0; begin < n; begin += kThreads) {
      const int64_t i = begin + thread;
      const Key key = i < n ? key_at(i) : Key(0);
      const bool counted = ((key ^ cut.key) >> shift >> kDigitBits) == 0;
      const int digit = counted ? int(key >> shift) & (kDigits - 1) : -1;
      // Most keys share their first digit: one addition for all equal digits of the warp.
      const unsigned equal = __match_any_sync(kFullMask, digit);
      if (counted && (equal & ((1u << lane) - 1)) == 0) atomicAdd(&shared.counts[digit], unsigned(__popc(equal)));
    }
    __syncthreads();  // counts are complete
    if (warp == 0) {  // lane l looks at digits top, top - 1, ..., from the greatest down
      constexpr int kEach = kDigits / kWarp;
      const int top = kDigits - 1 - lane * kEach;
      int64_t sum = 0;
      for (int j = 0; j < kEach; ++j) sum += shared.counts[top - j];
      int64_t above = sum_before(sum, lane);
      if (above < cut.wanted && cut.wanted <= above + sum) {  // one lane: the k-th greatest is among its digits
        int digit = top;
        while (above + shared.counts[digit] < cut.wanted) above += shared.counts[digit--];
        shared.prefix = cut.key | Key(digit) << shift;
        shared.wanted = cut.wanted - above;
        shared.found = shared.counts[digit];
      }
    }
    __syncthreads();  // the prefix is written
    cut = {shared.prefix, shared.wanted};
    if (kDistinct && shared.found == cut.wanted) break;  // the same in every thread
  }
  return cut;
}

}  // namespace ssd_ext::gpu
