#pragma once
// Selection by the threads of one block, which call these functions together.
#include "common/gpu.h"
#include "common/gpu_warp.h"

namespace ssd_ext::gpu {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// What the threads of a block tell each other in kth_greatest().
template <class Key>
struct SelectShared {
  unsigned counts[kDigits];  // keys that begin with the prefix, by their next digit; a 64-bit atomic add
                             // would compile to a retry loop
  Key prefix;                // the digits found so far of the k-th greatest key
  int64_t wanted;            // how many of the keys that begin so are among the k greatest
  int64_t found;             // how many begin so
};

template <int kThreads, class Key>
__device__ void clear_counts(SelectShared<Key>& shared) {
  for (int d = int(threadIdx.x); d < kDigits; d += kThreads) shared.counts[d] = 0;
  __syncthreads();  // counts are zero, and everybody has read the last prefix
}

// Counts the digit of a key that begins at bit `shift`, in each lane that says so. Most keys share their first
// digit: one addition for all equal digits of the warp.
template <class Key>
__device__ __forceinline__ void count_digit(Key key, bool counted, int shift, SelectShared<Key>& shared) {
  const int digit = counted ? int(key >> shift) & (kDigits - 1) : -1;
  const unsigned equal = __match_any_sync(kFullMask, digit), before = (1u << threadIdx.x % kWarp) - 1;
  if (counted && (equal & before) == 0) atomicAdd(&shared.counts[digit], unsigned(__popc(equal)));
}

// A key at which the k greatest of key_at(0) .. key_at(n - 1) end. Those are unsigned integers of kBits bits, and of
// the ones above 0, at least k >= 1, no two are equal; n < 2^32. All threads of the block call it, and each loads
// kAhead keys before it uses the first. `counted`: the first digits are counted, and a barrier has passed. With
// kRoughly the result may cut off fewer than k, but at least half of them.
template <int kThreads, int kBits, int kAhead = 1, bool kRoughly = false, class Key, class KeyAt>
__device__ Key kth_greatest(const KeyAt& key_at, int64_t n, int64_t k, SelectShared<Key>& shared,
                            bool counted = false) {
  static_assert(kBits % kDigitBits == 0);
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  struct {
    Key key;
    int64_t wanted, found;
  } kth{0, k, n};
#pragma unroll 1
  for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits, counted = false) {
    if (!counted) {
      clear_counts<kThreads>(shared);
#pragma unroll 1
      for (int64_t begin = 0; begin < n; begin += kAhead * kThreads) {
        Key keys[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int64_t i = begin + j * kThreads + thread;
          keys[j] = i < n ? key_at(i) : Key(0);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const bool inside = begin + j * kThreads + thread < n;
          count_digit(keys[j], inside && ((keys[j] ^ kth.key) >> shift >> kDigitBits) == 0, shift, shared);
        }
      }
      __syncthreads();  // counts are complete
    }
    if (warp == 0) {  // lane l looks at digits top, top - 1, ..., from the greatest down
      constexpr int kEach = kDigits / kWarp;
      const int top = kDigits - 1 - lane * kEach;
      int64_t sum = 0;
      for (int j = 0; j < kEach; ++j) sum += shared.counts[top - j];
      int64_t above = sum_before(sum, lane);
      if (above < kth.wanted && kth.wanted <= above + sum) {  // one lane: the k-th greatest is among its digits
        int digit = top;
        while (above + shared.counts[digit] < kth.wanted) above += shared.counts[digit--];
        shared.prefix = kth.key | Key(digit) << shift;
        shared.wanted = kth.wanted - above;
        shared.found = shared.counts[digit];
      }
    }
    __syncthreads();  // the prefix is written
    kth = {shared.prefix, shared.wanted, shared.found};
    if (kth.found == kth.wanted) break;                                       // the same in every thread
    if (kRoughly && k >= 2 * kth.wanted) return kth.key + (Key(1) << shift);  // those that begin so stay out
  }
  return kth.key;
}

// ---- the k largest of an image's negatives, for hard_negatives and multibox_loss ----------------

constexpr int kSelectThreads = 1024;  // of a block that calls what follows
constexpr int kSelectWarps = kSelectThreads / kWarp;

constexpr int kIgnoredKey = 0, kPositiveKey = 1;  // of what is no negative: less than the key of any loss

// The key of a prior, for `key` that of its loss.
template <class Key>
__device__ __forceinline__ Key key_of(int64_t label, Key key) {
  return label == 0 ? key : Key(label > 0 ? kPositiveKey : kIgnoredKey);
}

// Keys that a thread has in registers: those of the 8732 priors of SSD300 fit, in float32.
template <class Key>
constexpr int kKeysEach = 40 / int(sizeof(Key));
template <class Key>
bool are_held(int64_t n) {
  return n <= kKeysEach<Key> * kSelectThreads;
}

// The keys of an image's n priors. Thread t has those of priors t, t + kSelectThreads and so on: in registers if kHeld,
// which takes are_held(n), else made anew for each pass. make(i) makes the key of prior i < n of its loss and its
// label.
template <class Key_, bool kHeld, class Make>
class ImageKeys {
 public:
  using Key = Key_;
  static constexpr int kEach = kKeysEach<Key>;

  __device__ ImageKeys(const Make& make, int64_t n) : make_(make), n_(n) {
    if constexpr (kHeld) load(0, held_);
  }

  __device__ int64_t size() const { return n_; }
  static __device__ int place_of(int e) { return e * kSelectThreads + int(threadIdx.x); }

  // f(first, size, keys) for each batch of priors first, first + 1 ... first + size - 1: keys[e] is that of prior
  // first + place_of(e), kIgnoredKey beyond the last one.
  template <class F>
  __device__ __forceinline__ void for_each_batch(const F& f) const {
    if constexpr (kHeld) {
      f(int64_t(0), int(n_), held_);
    } else {
#pragma unroll 1
      for (int64_t first = 0; first < n_; first += kEach * kSelectThreads) {
        Key keys[kEach];
        load(first, keys);
        f(first, int(min_of<int64_t>(n_ - first, kEach * kSelectThreads)), keys);
      }
    }
  }

  // f(key, prior), likewise.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
    for_each_batch([&](int64_t first, int, const Key* keys) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) f(keys[e], first + place_of(e));
    });
  }

 private:
  __device__ __forceinline__ void load(int64_t first, Key* keys) const {
    const int left = int(min_of<int64_t>(n_ - first, kEach * kSelectThreads));
#pragma unroll
    for (int e = 0; e < kEach; ++e) keys[e] = place_of(e) < left ? make_(first + place_of(e)) : Key(kIgnoredKey);
  }

  Make make_;
  int64_t n_;
  Key held_[kHeld ? kEach : 1];
};

// What a warp knows of its keys.
template <class Key>
struct KeysOfWarp {
  unsigned positives, negatives;
  Key most, least;  // of the negatives; all other keys are less, so that `most` may be of all
};

// What the threads of a block tell each other in cut_negatives().
template <class Key>
struct Selection {
  KeysOfWarp<Key> keys[kSelectWarps];
  unsigned counts[kSelectThreads];  // values in each part of a range
  unsigned of_warps[kSelectWarps];  // and in all parts of a warp's threads
  unsigned part, above, found;      // which part has the k-th greatest value, how many values are above it, and in it
};

// The k largest negatives of an image: those whose key is above `key`, or equal to it before prior `end`.
template <class Key>
struct Cut {
  Key key;
  int64_t end;

  // The same of a batch, by the place in it.
  struct OfBatch {
    Key key;
    int end;
    __device__ bool takes(Key other, int place) const { return (other > key) | ((other == key) & (place < end)); }
  };
  __device__ OfBatch of_batch(int64_t first, int size) const {
    return {key, int(min_of<int64_t>(max_of<int64_t>(end - first, 0), size))};
  }
};

// Where the k greatest of some values end: they are those that are at least `value`, if `is_exact`. Else there are more
// of those, and `value` is the k-th greatest, of whose equals `missing` belong to the k.
template <class X>
struct KthValue {
  X value;
  bool is_exact;
  unsigned missing;
};

// Of the values from `low` to `high`, k >= 1 of them at least. for_each_value(f) calls f(value, is_one) for all that
// this thread has. Each round splits the range into as many parts as there are threads, counts the values in each and
// goes on with the one that has the k-th: mostly two or three rounds, as parts soon hold a single value, at most seven.
template <class X, class ForEachValue, class Key>
__device__ KthValue<X> kth_in_range(X low, X high, unsigned k, const ForEachValue& for_each_value,
                                    Selection<Key>& shared) {
  constexpr int kPartBits = 10;
  static_assert(1 << kPartBits == kSelectThreads);
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  for (;;) {
    const X range = high - low;
    const int bits = 64 - __clzll(int64_t(range)), shift = bits > kPartBits ? bits - kPartBits : 0;
    shared.counts[thread] = 0;
    __syncthreads();  // counts are zero, and everybody has read the last part
    for_each_value([&](X value, bool is_one) {
      const X below = high - value;
      if (is_one & (below <= range)) atomicAdd(&shared.counts[below >> shift], 1u);
    });
    __syncthreads();                               // the counts are complete
    const unsigned found = shared.counts[thread];  // the first part has the greatest values
    const unsigned of_warp = warp_sum(found);
    if (lane == 0) shared.of_warps[warp] = of_warp;
    __syncthreads();  // those of the warps are written
    const unsigned before = warp_sum(lane < warp ? shared.of_warps[lane] : 0);
    if (before < k && k <= before + of_warp) {  // one warp
      const unsigned above = before + sum_before(found, lane);
      if (above < k && k <= above + found) {
        shared.part = thread;
        shared.above = above;
        shared.found = found;
      }
    }
    __syncthreads();  // the part is known
    k -= shared.above;
    high -= X(shared.part) << shift;
    const X others = (X(1) << shift) - 1;  // than `high` in that part
    low = high - low > others ? high - others : low;
    if (shared.found == k || shift == 0) return {low, shared.found == k, k};
  }
}

// Cuts off the wanted(positives, negatives) largest of an image's negatives.
template <class Keys, class Key, class Wanted>
__device__ Cut<Key> cut_negatives(const Keys& keys, const Wanted& wanted, Selection<Key>& shared) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  KeysOfWarp<Key> own{0, 0, 0, ~Key(0)};
  keys.for_each([&](Key key, int64_t) {
    const bool is_negative = key > kPositiveKey;
    own.positives += key == kPositiveKey;
    own.negatives += is_negative;
    own.most = max_of(key, own.most);
    own.least = min_of(is_negative ? key : ~Key(0), own.least);
  });
  const auto join = [](const KeysOfWarp<Key>& k) {
    return KeysOfWarp<Key>{warp_sum(k.positives), warp_sum(k.negatives), warp_max(k.most),
                           Key(~warp_max(Key(~k.least)))};
  };
  own = join(own);
  if (lane == 0) shared.keys[warp] = own;
  __syncthreads();  // what each warp knows is written
  const KeysOfWarp<Key> all = join(shared.keys[lane]);
  const int64_t k = wanted(int64_t(all.positives), int64_t(all.negatives));
  if (k == 0) return {~Key(0), 0};  // the same in every thread
  if (k >= all.negatives) return {Key(kPositiveKey), 0};
  const auto by_key = [&](const auto& f) { keys.for_each([&](Key key, int64_t) { f(key, true); }); };
  const KthValue<Key> kth = kth_in_range(all.least, all.most, unsigned(k), by_key, shared);
  if (kth.is_exact) return {Key(kth.value - 1), 0};
  // Of the keys that are equal to the k-th greatest, those of the lowest priors are taken.
  const unsigned last = unsigned(keys.size() - 1);
  const auto by_prior = [&](const auto& f) {
    keys.for_each([&](Key key, int64_t i) { f(last - unsigned(i), key == kth.value); });
  };
  return {kth.value, int64_t(last - kth_in_range(0u, last, kth.missing, by_prior, shared).value) + 1};
}

}  // namespace ssd_ext::gpu
