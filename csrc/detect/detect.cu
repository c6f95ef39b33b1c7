// Logits to detections, in two launches after a memset of the counters. One pass over the logits appends every
// candidate to its image's list, in any order: keys order them. A list has room for all candidates that can count,
// topk_per_class of each class. Where more than that pass the threshold, the list is lost and made anew from the best
// of each class.
//   collect_kernel   a quarter of a warp looks through a row of logits, half a warp takes one with candidates to the
//                    lists
//   finish_kernel    one block an image visits its candidates, kChunk at a time; where the list is lost, several
//                    blocks make it anew, and the last of them to finish visits it
//
// Ladder: microseconds for SSD300, C = 81, a trained network (300 candidates an image), at B = 32 and 1; then of an
// untrained one, whose lists are lost, at B = 8. Of an H200 where measured, else predicted from the instructions of
// sm_90.
//   65-78, 25; 230  predicted: four launches; a sort with 45 barriers, tiles of 64 boxes with 3 each; the rank in its
//                   class of each candidate by a loop over all; an atomic operation for every 16 classes of a row
//   63, 20; 193     measured: candidates are sorted by class, so that ranks are differences of positions and NMS within
//                   32 candidates is the affair of a warp; two boxes are tested without a quotient. collect_kernel (48,
//                   6; 36) issues 96 instructions a row, most of them for 64-bit indices; finish_kernel (15, 13; 157)
//                   waits at barriers for the four warps that sort, and for its own code
//   50, 18; 195     measured, of 40, 15; 180 predicted: 27 instructions a row to tell that it has no candidate; rows
//                   of a warp lie far apart, as candidates lie close together and their rows take longer
//                   (collect_kernel: 36, 5.6; 38). All warps sort, one key a lane, and warps without rivals test no
//                   boxes (finish_kernel: 13.4, 11.8; 156)
// What binds it: in collect_kernel instructions (three of five clocks issue one) and the rows with candidates; in
// finish_kernel the latency of one block: of 26,000 clocks the keys take 4,500, the sort 6,900, the boxes 2,000, NMS
// 6,200 and the order of what is kept 4,500. With lost lists the instructions of radix selection.
#include "detect/detect.h"

#include "common/gpu_last_block.h"
#include "common/gpu_select.h"
#include "common/gpu_sort.h"
#include "common/gpu_tile.h"

namespace ssd_ext::detect {
namespace {

constexpr int kCollectThreads = 128;
constexpr unsigned kStaged = 2 * gpu::kWarp;  // candidates that a warp collects before it writes them
constexpr int64_t kFewRows = 1 << 14;         // of logits, for which a warp looks through one set of rows only
constexpr int kRowLanes = 8;                  // that look through a row
constexpr int kRowsAtOnce = gpu::kWarp / kRowLanes;
constexpr int kLogitsAhead = 10;  // of a row, that a lane loads before it uses the first
constexpr int kStatsAhead = 3;    // the same, of a row that has a candidate
static_assert(kSumLanes == gpu::kWarp / 2);

constexpr int kChunk = 512;       // candidates that are visited together
constexpr int kThreads = kChunk;  // of a block of finish_kernel
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr int kAhead = 4;                       // values that a thread loads before it uses them
constexpr int kKeptInShared = 256;              // boxes; where max_detections is larger, they lie in global memory
constexpr size_t kMostCachedBytes = 40 * 1024;  // of the scores of a class in shared memory
constexpr int64_t kFinishBlocks = 256;          // of finish_kernel, where there are few images

template <class C>
constexpr int kKeyBits = 8 * sizeof(C) + 32;

// Classes that can be detected, from the first one on.
SSD_EXT_HD int64_t first_class(const Params& params) { return params.sigmoid ? 0 : 1; }
SSD_EXT_HD int64_t classes_of(const Inputs& in) {
  const int64_t n = in.sizes.classes - first_class(in.params);
  return n > 0 ? n : 0;
}
SSD_EXT_HD int64_t best_of_class(const Inputs& in) { return min_of(in.params.topk_per_class, in.sizes.priors); }
SSD_EXT_HD int64_t list_size(const Inputs& in) { return classes_of(in) * best_of_class(in); }

// What softmax needs of a row beside the logit: score = exp(x - greatest) / sum. Infinite sum: no candidate.
template <class C>
struct alignas(2 * sizeof(C)) RowStats {
  C greatest, sum;
};

// Of an image; 0 before collect_kernel.
struct Counters {
  unsigned found;   // candidates, of which the list may hold but a part
  unsigned listed;  // keys in a list that was made anew
  unsigned ticket;  // of the blocks that make it
};

template <class C>
struct Workspace {
  Key<C>* lists;         // [images, list_size]
  C* kept_boxes;         // [images, K, 4], if K > kKeptInShared
  RowStats<C>* rows;     // [images, priors], with softmax
  Counters* counters;    // [images]
  int32_t* kept_labels;  // [images, K], if K > kKeptInShared
  unsigned* visited;     // [images, classes] candidates of each class in earlier chunks, if there can be several
  size_t bytes;

  Workspace(void* base, const Inputs& in) {
    gpu::Scratch scratch{base};
    const Sizes& n = in.sizes;
    const int64_t kept = in.params.max_detections > kKeptInShared ? n.images * in.params.max_detections : 0;
    kept_boxes = scratch.take<C>(kept * 4);
    lists = scratch.take<Key<C>>(n.images * list_size(in));
    rows = scratch.take<RowStats<C>>(in.params.sigmoid ? 0 : n.images * n.priors);
    counters = scratch.take<Counters>(n.images);
    kept_labels = scratch.take<int32_t>(kept);
    visited = scratch.take<unsigned>(list_size(in) > kChunk ? n.images * n.classes : 0);
    bytes = scratch.bytes;
  }
};

// An element of a tensor whose dtype is T.
template <class T, class C>
__device__ __forceinline__ C at(const Strided& t, int64_t image, int64_t row, int64_t column) {
  return gpu::widened<C>(static_cast<const T*>(t.data)[image * t.image + row * t.row + column * t.column]);
}

template <class C>
__device__ __forceinline__ CenterBox<C> four_at(const Strided& t, int64_t image, int64_t row) {
  CenterBox<C> four;
  gpu::dispatch_held<C>(t.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    four = {at<T, C>(t, image, row, 0), at<T, C>(t, image, row, 1), at<T, C>(t, image, row, 2),
            at<T, C>(t, image, row, 3)};
  });
  return four;
}

// Sum over kSumLanes lanes, in all of them, by halves.
template <class C>
__device__ __forceinline__ C sum_of_lanes(C x) {
#pragma unroll
  for (int d = kSumLanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(gpu::kFullMask, x, d);
  return x;
}
template <class C>
__device__ __forceinline__ C max_of_lanes(C x) {
#pragma unroll
  for (int d = kSumLanes / 2; d > 0; d /= 2) x = max_of(x, __shfl_xor_sync(gpu::kFullMask, x, d));
  return x;
}

// Blocks that collect_kernel has for an image, whose warps each have kSets sets of kRowsAtOnce priors.
template <int kSets>
SSD_EXT_HD unsigned collecting_blocks(int64_t priors) {
  constexpr unsigned kRows = kSets * kRowsAtOnce * (kCollectThreads / gpu::kWarp);
  return (unsigned(priors) + kRows - 1) / kRows;
}

// ---- candidates to the lists ---------------------------------------------------------------------

// A warp's candidates on their way to the list of their image: up to kStaged of them cost one atomic operation.
template <class C>
struct Stage {
  Key<C>* keys;  // [kStaged], of this warp, in shared memory
  unsigned* found;
  Key<C>* list;
  unsigned size;  // of the list
  unsigned count = 0;
  bool is_lost = false;  // the list is, as *found shows

  // Takes the keys of those lanes that have a candidate. All lanes call it.
  __device__ void add(bool is_candidate, Key<C> key) {
    const unsigned passed = __ballot_sync(gpu::kFullMask, is_candidate);
    if (passed == 0) return;
    if (count + __popc(passed) > kStaged) flush();
    const int lane = int(threadIdx.x) % gpu::kWarp;
    if (is_candidate) keys[count + gpu::count_before(passed, lane)] = key;
    count += __popc(passed);
  }

  __device__ void flush() {
    const int lane = int(threadIdx.x) % gpu::kWarp;
    unsigned slot = 0;
    if (lane == 0 && count > 0) slot = atomicAdd(found, count);
    slot = __shfl_sync(gpu::kFullMask, slot, 0);
    __syncwarp();  // the keys are written
#pragma unroll 1
    for (unsigned i = lane; i < count; i += gpu::kWarp) {
      if (slot + i < size) list[slot + i] = keys[i];
    }
    __syncwarp();  // and read
    is_lost = slot + count > size;
    count = 0;
  }
};

// The greatest of a row's logits from class `first` on, told to the kRowLanes lanes that look through it. Most rows
// have no candidate, once the network is trained: this reads them at the rate of the memory. A NaN is passed over.
template <class C, class T>
__device__ __forceinline__ C greatest_of_row(const T* row, int64_t stride, unsigned first, unsigned classes) {
  C most = -std::numeric_limits<C>::infinity();
  const T nothing = T(-std::numeric_limits<gpu::Compute<T>>::infinity());
  const unsigned lane = threadIdx.x % kRowLanes;
  row += (first + lane) * stride;
#pragma unroll 1
  for (unsigned begin = first; begin < classes; begin += kRowLanes * kLogitsAhead) {
    T x[kLogitsAhead];
#pragma unroll
    for (unsigned j = 0; j < kLogitsAhead; ++j, row += kRowLanes * stride) {
      x[j] = begin + lane + j * kRowLanes < classes ? *row : nothing;
    }
#pragma unroll
    for (unsigned j = 0; j < kLogitsAhead; ++j) most = gpu::greatest_of(gpu::widened<C>(x[j]), most);
  }
#pragma unroll
  for (int d = kRowLanes / 2; d > 0; d /= 2) {
    most = gpu::greatest_of(most, __shfl_xor_sync(gpu::kFullMask, most, d));
  }
  return most;
}

// The maximum and the sum of a row, by half a warp, which reads the row only if `is_wanted`.
template <class C, class Logit>
__device__ RowStats<C> stats_of_row(const Logit& logit, int classes, bool is_wanted) {
  constexpr C kNothing = -std::numeric_limits<C>::infinity();  // of a missing class: its exponential is 0
  const auto for_each = [&](const auto& f) {
    const int end = is_wanted ? classes : 0;
#pragma unroll 1
    for (int begin = 0; begin < end; begin += kSumLanes * kStatsAhead) {
      C x[kStatsAhead];
      const int c = begin + int(threadIdx.x) % kSumLanes;
#pragma unroll
      for (int j = 0; j < kStatsAhead; ++j) x[j] = c + j * kSumLanes < end ? logit(c + j * kSumLanes) : kNothing;
#pragma unroll
      for (int j = 0; j < kStatsAhead; ++j) f(x[j]);
    }
  };
  C greatest = kNothing, sum = 0;
  for_each([&](C x) { greatest = max_of(x, greatest); });
  greatest = max_of_lanes(greatest);
  for_each([&](C x) { sum += exp(x - greatest); });
  return {greatest, sum_of_lanes(sum)};
}

// A warp for kSets sets of kRowsAtOnce priors of an image. T: the type of the logits.
template <class T, class C, int kSets>
__global__ void __launch_bounds__(kCollectThreads, 40 / sizeof(C)) collect_kernel(Inputs in, Workspace<C> w, C bound) {
  constexpr unsigned kWarpsOfBlock = kCollectThreads / gpu::kWarp;
  __shared__ Key<C> staged[kWarpsOfBlock][kStaged];
  const bool is_sigmoid = in.params.sigmoid;
  const unsigned priors = unsigned(in.sizes.priors), classes = unsigned(in.sizes.classes);
  const unsigned blocks = collecting_blocks<kSets>(priors), warp = threadIdx.x / gpu::kWarp;
  const int lane = threadIdx.x % gpu::kWarp, own = lane % kSumLanes;
  const int64_t image = blockIdx.x / blocks;
  // Candidates lie close together: a warp takes its sets, or the rows of a single set, from all over the image.
  const unsigned warps = blocks * kWarpsOfBlock, number = blockIdx.x % blocks * kWarpsOfBlock + warp;
  const auto prior_at = [=](unsigned set, unsigned row) {
    return kSets == 1 ? row * warps + number : (set * warps + number) * kRowsAtOnce + row;
  };
  const unsigned first = unsigned(first_class(in.params));
  const T* const logits = static_cast<const T*>(in.logits.data) + image * in.logits.image;
  RowStats<C>* const rows = w.rows + image * in.sizes.priors;

  // 1. The rows that may have a candidate. Of set i, the bits i, i + kRowLanes, i + 2 * kRowLanes and so on.
  static_assert(kSets <= kRowLanes);
  unsigned alive = 0;
#pragma unroll 1
  for (unsigned i = 0; i < kSets; ++i) {
    const unsigned p = prior_at(i, lane / kRowLanes);
    const T* const row = logits + p * in.logits.row;
    const bool is_inside = p < priors;
    const C background = is_sigmoid || !is_inside ? C(0) : gpu::widened<C>(*row);
    const C most = greatest_of_row<C>(row, in.logits.column, first, is_inside ? classes : 0);
    alive |= __ballot_sync(gpu::kFullMask, most - background > bound && lane % kRowLanes == 0) << i;
  }
  if (const unsigned set = lane / kRowsAtOnce, p = prior_at(set, lane % kRowsAtOnce); set < kSets && p < priors) {
    const bool is_alive = alive >> (lane % kRowsAtOnce * kRowLanes + set) & 1;
    if (!is_sigmoid && !is_alive) rows[p] = {C(0), std::numeric_limits<C>::infinity()};
  }

  // Of the others, each half of the warp takes every other one.
  const int64_t size = list_size(in);
  Stage<C> stage{staged[warp], &w.counters[image].found, w.lists + image * size, unsigned(size)};
#pragma unroll 1
  while (alive) {
    const unsigned rest = alive & (alive - 1), from = lane < kSumLanes ? alive : rest;
    alive = rest & (rest - 1);
    const bool is_alive = from != 0;
    const unsigned bit = is_alive ? __ffs(int(from)) - 1 : 0;
    const unsigned p = prior_at(bit % kRowLanes, bit / kRowLanes);
    const T* const row = logits + p * in.logits.row;
    const auto logit = [&](int c) { return gpu::widened<C>(row[c * in.logits.column]); };
    // 2. What softmax needs of the row.
    RowStats<C> stats{};
    if (!is_sigmoid) stats = stats_of_row<C>(logit, int(classes), is_alive);
    if (!is_sigmoid && is_alive && own == 0) rows[p] = stats;
    // 3. The scores of the classes whose logits allow one above the threshold.
    const C background = is_sigmoid || !is_alive ? C(0) : logit(0);
    for (int c = own; c - own < int(classes) && !stage.is_lost; c += kSumLanes) {
      C score = 0;
      if (is_alive && int(first) <= c && c < int(classes)) {
        const C x = logit(c);
        if (x - background > bound) score = is_sigmoid ? sigmoid(x) : exp(x - stats.greatest) / stats.sum;
      }
      stage.add(score > C(in.params.score_threshold), make_key(score, c * priors + p));
    }
  }
  stage.flush();
}

// ---- a lost list made anew -----------------------------------------------------------------------

// Scores of one class of an image; computed once into shared memory where they fit, else for each pass.
template <class C, bool kCached>
struct ClassScores {
  const Inputs& in;
  const RowStats<C>* rows;  // of the image, with softmax
  C* cache;                 // [priors] if kCached
  int64_t image, c;

  // f(logit): prior p -> its logit.
  template <class F>
  __device__ __forceinline__ void with_logits(const F& f) const {
    gpu::dispatch_held<C>(in.logits.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      f([&](int64_t p) { return at<T, C>(in.logits, image, p, c); });
    });
  }
  __device__ RowStats<C> row(int64_t p) const { return in.params.sigmoid ? RowStats<C>{} : rows[p]; }
  __device__ C score(C x, const RowStats<C>& row) const {
    return in.params.sigmoid ? sigmoid(x) : exp(x - row.greatest) / row.sum;
  }
  // The key of a candidate, else 0.
  __device__ Key<C> key(C score, int64_t p) const {
    return score > C(in.params.score_threshold) ? make_key(score, uint32_t(c * in.sizes.priors + p)) : Key<C>(0);
  }
  __device__ Key<C> operator()(int64_t p) const {
    if constexpr (kCached) return key(cache[p], p);
    C x;
    with_logits([&](const auto& logit) { x = logit(p); });
    return key(score(x, row(p)), p);
  }
};

// What the threads of a block share while they make a list anew.
template <class C>
struct ListMaking {
  gpu::SelectShared<Key<C>> select;
  unsigned candidates[kWarps];  // found by each warp
  unsigned slot;                // the next one in the list
};

// Appends the best candidates of class c to the image's list.
template <bool kCached, class C>
__device__ void list_best(const Inputs& in, const Workspace<C>& w, int64_t image, int64_t c, C* cache,
                          ListMaking<C>& shared) {
  const int64_t priors = in.sizes.priors, best = best_of_class(in);
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const ClassScores<C, kCached> key_at{in, w.rows + image * priors, cache, image, c};
  gpu::clear_counts<kThreads>(shared.select);
  unsigned count = 0;
#pragma unroll 1
  for (int64_t begin = 0; begin < priors; begin += kAhead * kThreads) {
    C x[kAhead];
    RowStats<C> row[kAhead];
    const auto prior_at = [=](int j) { return min_of(begin + j * kThreads + thread, priors - 1); };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) row[j] = key_at.row(prior_at(j));
    key_at.with_logits([&](const auto& logit) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) x[j] = logit(prior_at(j));
    });
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t p = begin + j * kThreads + thread;
      const C score = p < priors ? key_at.score(x[j], row[j]) : C(0);
      if (kCached && p < priors) cache[p] = score;
      const Key<C> key = key_at.key(score, p);
      count += key != 0;
      gpu::count_digit(key, key != 0, kKeyBits<C> - gpu::kDigitBits, shared.select);
    }
  }
  count = gpu::warp_sum(count);
  if (lane == 0) shared.candidates[warp] = count;
  __syncthreads();  // the counts are complete; the cache is each thread's own
  count = gpu::warp_sum(lane < kWarps ? shared.candidates[lane] : 0);
  Key<C> cut = 1;
  if (count > best) {
    cut = gpu::kth_greatest<kThreads, kKeyBits<C>>(key_at, priors, best, shared.select, true);
    count = unsigned(best);
  }
  if (thread == 0) shared.slot = atomicAdd(&w.counters[image].listed, count);
  __syncthreads();  // the place in the list is known
  Key<C>* const list = w.lists + image * list_size(in);
#pragma unroll 1
  for (int64_t begin = 0; begin < priors; begin += kThreads) {
    const int64_t p = begin + thread;
    const Key<C> key = p < priors ? key_at(p) : Key<C>(0);
    const unsigned taken = __ballot_sync(gpu::kFullMask, key >= cut);
    const unsigned slot = gpu::next_slot(&shared.slot, taken);
    if (key >= cut) list[slot] = key;
  }
}

// ---- the visit of an image's candidates -------------------------------------------------------------

// Keys turned so that they order candidates by class first, then as before.
template <class C>
struct ClassOrder {
  static constexpr int kScoreBits = 8 * sizeof(C) - 2;  // a score is at most 1
  uint32_t priors, classes;
  int prior_bits;

  __device__ explicit ClassOrder(const Sizes& sizes)
      : priors(uint32_t(sizes.priors)), classes(uint32_t(sizes.classes)) {
    prior_bits = 32 - __clz(int(priors - 1));  // in the body: a member initialiser is compiled for the host, too
  }

  __device__ Key<C> by_class(Key<C> key) const {
    const uint32_t number = number_of<C>(key), label = number / priors, prior = number % priors;
    return (Key<C>(classes - 1 - label) << kScoreBits | key >> 32) << prior_bits | (priors - 1 - prior);
  }
  __device__ Key<C> by_score(Key<C> key) const {
    const uint32_t prior = priors - 1 - uint32_t(key & ((Key<C>(1) << prior_bits) - 1));
    key >>= prior_bits;
    const uint32_t label = classes - 1 - uint32_t(key >> kScoreBits);
    return (key & ((Key<C>(1) << kScoreBits) - 1)) << 32 | uint32_t(~(label * priors + prior));
  }
};

// What the threads of a block share during a visit: a chunk of candidates, and what is kept of earlier chunks.
template <class C>
struct Visit {
  Key<C> keys[kChunk];
  alignas(16) C boxes[kChunk * 4];
  alignas(16) C kept_boxes[kKeptInShared * 4];
  int32_t labels[kChunk];  // -1: no candidate
  int32_t kept_labels[kKeptInShared];
  unsigned kept[kWarps];           // lanes of each warp whose candidates are kept; of groups that begin in it
  unsigned kept_of_first[kWarps];  // of its first group, if that begins in an earlier warp
  unsigned gathered;
};

// The next best keys of the list, at most kChunk: one for each thread, 0 if there are fewer. The first `seen` keys have
// had their turn; `last` divides them from the others.
template <class C>
__device__ Key<C> next_chunk(const Key<C>* list, int n, int& seen, Key<C>& last, gpu::SelectShared<Key<C>>& select,
                             Visit<C>& shared) {
  const int thread = int(threadIdx.x);
  if (n <= kChunk) {
    seen = n;
    return thread < n ? gpu::load_written(list + thread) : Key<C>(0);
  }
  const auto key_at = [&](int64_t i) {
    const Key<C> key = gpu::load_written(list + i);
    return key < last ? key : Key<C>(0);
  };
  Key<C> cut = 1;
  if (n - seen > kChunk) {  // any good part of a chunk will do
    cut = gpu::kth_greatest<kThreads, kKeyBits<C>, kAhead, true>(key_at, n, kChunk, select);
  }
  if (thread == 0) shared.gathered = 0;
  shared.keys[thread] = 0;
  __syncthreads();  // nothing is gathered
#pragma unroll 1
  for (int begin = 0; begin < n; begin += kAhead * kThreads) {
    Key<C> keys[kAhead];
    const int own = begin + thread;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) keys[j] = own + j * kThreads < n ? key_at(own + j * kThreads) : Key<C>(0);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const unsigned slot = gpu::next_slot(&shared.gathered, __ballot_sync(gpu::kFullMask, keys[j] >= cut));
      if (keys[j] >= cut) shared.keys[slot] = keys[j];
    }
  }
  __syncthreads();  // all are gathered
  last = cut;
  seen += int(shared.gathered);
  return shared.keys[thread];
}

// Sorts shared.keys, of which none after the first `count` is above 0.
template <class C>
__device__ void sort_chunk(int count, Visit<C>& shared) {
  __syncthreads();  // the keys are written
  int size = gpu::kLeastSorted;
  while (size < count) size *= 2;
  gpu::sort_falling(shared.keys, size);
}

// A thread's candidate among those of its group, which stand one after another and may extend over several warps.
struct Group {
  unsigned in_warp;  // lanes of this warp with candidates of the group
  int begin;         // position of its first candidate
  // Of the group of the warp's first candidate:
  int warps_before;   // how many hold some of it
  unsigned in_first;  // lanes with some of it, in the first of these
  bool is_first;      // it is this thread's, and warps_before > 0
};

// group_at(position) tells the groups apart; it is negative where there is no candidate.
template <class GroupAt>
__device__ Group group_of(const GroupAt& group_at) {
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const int own = group_at(thread), first = group_at(warp * gpu::kWarp);
  const bool begins = lane == 0 || group_at(thread - 1) != own;
  const unsigned beginnings = __ballot_sync(gpu::kFullMask, begins), up_to_own = ~0u >> (gpu::kWarp - 1 - lane);
  const unsigned next = beginnings & ~up_to_own, in_warp_from = ~0u << (gpu::kWarp - 1 - __clz(beginnings & up_to_own));
  const bool reaches_here = lane < warp && first >= 0 && group_at(lane * gpu::kWarp + gpu::kWarp - 1) == first;
  const unsigned warps = __ballot_sync(gpu::kFullMask, reaches_here);
  const int from = warps ? __ffs(warps) - 1 : warp;
  Group group;
  group.in_warp = in_warp_from & ((next & -next) - 1);  // all further lanes if none begins
  group.warps_before = warp - from;
  group.in_first = __ballot_sync(gpu::kFullMask, group_at(from * gpu::kWarp + lane) == first);
  group.is_first = warps && own == first;
  group.begin =
      group.is_first ? from * gpu::kWarp + __ffs(group.in_first) - 1 : thread - lane + __ffs(group.in_warp) - 1;
  return group;
}

// IoU > threshold of one box with others. The product of threshold and union decides but for its rounding, next to the
// threshold the quotient. With OverlapShares, which only rules overlaps out, each overlap would take a quotient, one
// lane after another: candidates of a class that stand side by side overlap more often than not.
template <class C>
struct Overlaps {
  Box<C> box;
  C own_area, threshold, low, high;

  __device__ Overlaps(const Box<C>& box, C threshold) : box(box), own_area(area(box)), threshold(threshold) {
    // Boxes that meet have a union no smaller than each of them. Where a product may be a denormal number, and lack
    // bits, the quotient decides always.
    const bool is_normal = threshold * own_area > OverlapShares<C>::kTiny;
    low = is_normal ? threshold * C(1 - 1e-5) : C(0);
    high = is_normal ? threshold * C(1 + 1e-5) : std::numeric_limits<C>::infinity();
  }

  struct Verdict {
    bool likely, surely;
  };
  __device__ Verdict rough(const Box<C>& other) const {
    // Where a coordinate is NaN, so is the union: the verdict is neither, which is right.
    const C inter = gpu::rough_intersection(box, other), total = own_area + area(other) - inter;
    const bool meet = inter > C(0);
    return {meet && inter > total * low, meet && inter > total * high};
  }
  __device__ bool exactly(const Box<C>& other) const { return gpu::overlaps(other, box, threshold); }
  __device__ bool operator()(const Box<C>& other) const {
    const Verdict verdict = rough(other);
    return verdict.surely || (verdict.likely && exactly(other));
  }
};

// NMS of a chunk: each thread has a candidate, its box in shared.boxes, that is kept unless it overlaps a kept one
// before it in its group. Of no group more than the first `room` are wanted. The result is in shared.kept and
// shared.kept_of_first, after a barrier.
template <class C>
__device__ void suppress(bool is_alive, const Group& group, const Overlaps<C>& overlaps, int64_t room,
                         Visit<C>& shared) {
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const unsigned alive = __ballot_sync(gpu::kFullMask, is_alive);
  const unsigned is_first = __ballot_sync(gpu::kFullMask, group.is_first);

  // Within the warp: which candidates before it each one overlaps.
  const auto box_of_lane = [&](int i) { return gpu::load_box(shared.boxes, warp * gpu::kWarp + i); };
  unsigned earlier = 0;
  const unsigned rivals = is_alive ? group.in_warp & alive & ((1u << lane) - 1) : 0;
  if (__any_sync(gpu::kFullMask, rivals != 0)) {
    unsigned likely = 0, surely = 0;
#pragma unroll 4
    for (int i = 0; i < gpu::kWarp; ++i) {
      const auto verdict = overlaps.rough(box_of_lane(i));
      likely |= verdict.likely ? 1u << i : 0u;
      surely |= verdict.surely ? 1u << i : 0u;
    }
    earlier = surely & rivals;
    for (unsigned open = likely & ~surely & rivals; open; open &= open - 1) {
      const int i = __ffs(open) - 1;
      if (overlaps.exactly(box_of_lane(i))) earlier |= 1u << i;
    }
  }
  const unsigned kept = gpu::kept_of_warp(alive & ~is_first, earlier);
  if (lane == 0) {
    shared.kept[warp] = kept;
    shared.kept_of_first[warp] = 0;
  }

  // A group that extends over several warps: in each step one more of them decides, and those after it look at
  // what it has kept.
  unsigned kept_before = 0;
  bool is_hit = false;
  for (int step = 1;; ++step) {
    const bool takes_part = step <= group.warps_before;
    if (!__syncthreads_or(takes_part)) break;  // what was kept in the step before is written
    if (!takes_part) continue;
    const int other = warp - group.warps_before + step - 1;
    unsigned rest = step == 1 ? shared.kept[other] & group.in_first : shared.kept_of_first[other];
    kept_before += __popc(rest);
    for (; rest; rest &= rest - 1) {
      is_hit |= overlaps(gpu::load_box(shared.boxes, other * gpu::kWarp + __ffs(rest) - 1));
    }
    if (step == group.warps_before && kept_before < room) {
      const unsigned hit = __ballot_sync(gpu::kFullMask, is_hit);
      const unsigned kept_now = gpu::kept_of_warp(alive & is_first & ~hit, earlier);
      if (lane == 0) shared.kept_of_first[warp] = kept_now;
    }
  }
}

// Detections so far, and what of them is needed to suppress candidates of later chunks.
template <class C>
struct Kept {
  C* boxes;         // [K, 4]
  int32_t* labels;  // [K]
  int64_t count = 0;
};

// Puts a candidate, or nothing if the key is 0, at the thread's position: its decoded box and its label.
template <class C>
__device__ void place_candidate(const Inputs& in, int64_t image, Key<C> key, Visit<C>& shared) {
  const Params& params = in.params;
  Box<C> box{C(0), C(0), C(0), C(0)};
  int32_t label = -1;
  if (key != 0) {
    const uint32_t number = number_of<C>(key), priors = uint32_t(in.sizes.priors), p = number % priors;
    label = int32_t(number / priors);
    const CenterBox<C> prior = four_at<C>(in.priors, 0, p);  // first: nothing waits for float32
    const CenterBox<C> delta = four_at<C>(in.deltas, image, p);
    box = decode_box(delta, prior, C(params.center), C(params.size), C(params.clip));
    box = clip_box(box, params.window);
  }
  gpu::store_four(shared.boxes, int(threadIdx.x), box.x1, box.y1, box.x2, box.y2);
  shared.labels[threadIdx.x] = label;
  __syncthreads();  // all are at their places
}

// Candidates of its class before this thread's, which are sorted by class. `visited` counts those of earlier chunks, or
// is null where this is the only one.
template <class C>
__device__ int64_t rank_in_class(const Group& group, unsigned* visited, const Visit<C>& shared) {
  const int thread = int(threadIdx.x);
  const int32_t label = shared.labels[thread];
  int64_t rank = thread - group.begin;
  if (visited) {
    if (label >= 0) rank += visited[label];
    __syncthreads();  // everybody has read the counts
    const bool is_last = thread == kChunk - 1 || shared.labels[thread + 1] != label;
    if (is_last && label >= 0) visited[label] = unsigned(rank + 1);
  }
  return rank;
}

// Whether the thread's candidate overlaps one kept of earlier chunks.
template <class C>
__device__ bool meets_kept(const Kept<C>& kept, int32_t label, bool is_agnostic, const Overlaps<C>& overlaps) {
  const int lane = int(threadIdx.x) % gpu::kWarp;
  const int32_t low = __shfl_sync(gpu::kFullMask, label, 0), high = __shfl_sync(gpu::kFullMask, label, gpu::kWarp - 1);
  bool is_hit = false;
  for (int64_t begin = 0; begin < kept.count; begin += gpu::kWarp) {
    // Each lane checks for one kept box whether it can be a rival of any candidate of the warp, whose labels rise.
    const int32_t other = begin + lane < kept.count ? kept.labels[begin + lane] : -1;
    const bool is_rival = other >= 0 && (is_agnostic || (low >= 0 && low <= other && (other <= high || high < 0)));
    for (unsigned rest = __ballot_sync(gpu::kFullMask, is_rival); rest; rest &= rest - 1) {
      const int64_t k = begin + __ffs(rest) - 1;
      if (is_agnostic || kept.labels[k] == label) is_hit |= overlaps(gpu::load_box(kept.boxes, k));
    }
  }
  return is_hit;
}

// Puts the kept candidates of the chunk into shared.keys in order of score; returns how many. Positions take the place
// of numbers: of equal scores the lower class stands first, then the lower prior.
template <class C>
__device__ int order_kept(C score, Visit<C>& shared) {
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const unsigned kept = lane < kWarps ? shared.kept[lane] | shared.kept_of_first[lane] : 0;
  const int before = gpu::warp_sum(lane < warp ? __popc(kept) : 0), all = gpu::warp_sum(__popc(kept));
  const unsigned of_warp = __shfl_sync(gpu::kFullMask, kept, warp);
  if (thread >= all) shared.keys[thread] = 0;
  if (of_warp >> lane & 1) {
    shared.keys[before + gpu::count_before(of_warp, lane)] = make_key(score, uint32_t(thread));
  }
  sort_chunk(all, shared);
  return all;
}

// Writes one number `to` of the outputs.
template <class C>
__device__ __forceinline__ void write(const Outputs<void>& out, DType dtype, int64_t to, const Box<C>& box, C score,
                                      int64_t label) {
  gpu::dispatch_held<C>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Wide = gpu::Compute<T>;
    gpu::store_four(static_cast<T*>(out.boxes), to, Wide(box.x1), Wide(box.y1), Wide(box.x2), Wide(box.y2));
    static_cast<T*>(out.scores)[to] = T(Wide(score));
  });
  out.labels[to] = label;
}

// Writes the `all` candidates in shared.keys as detections, as far as there is room, and keeps them for later chunks.
template <class C>
__device__ void write_detections(const Inputs& in, const Outputs<void>& out, int64_t image, int all, bool is_long,
                                 Kept<C>& kept, const Visit<C>& shared) {
  const Params& params = in.params;
  const int64_t most = params.max_detections;
  if (threadIdx.x < min_of(int64_t(all), most - kept.count)) {
    const Key<C> key = shared.keys[threadIdx.x];
    const int position = int(number_of<C>(key));
    const Box<C> box = gpu::load_box(shared.boxes, position);
    const int32_t label = shared.labels[position];
    const int64_t slot = kept.count + threadIdx.x;
    write(out, in.dtype, image * most + slot, clip_box(box, params.inner_window), score_of<C>(key),
          label_of(label, params));
    if (is_long) {
      gpu::store_four(kept.boxes, slot, box.x1, box.y1, box.x2, box.y2);
      kept.labels[slot] = label;
    }
  }
  kept.count = min_of(kept.count + all, most);
}

template <class C>
__device__ void pad_detections(const Inputs& in, const Outputs<void>& out, int64_t image, int64_t count) {
  const int64_t most = in.params.max_detections;
#pragma unroll 1
  for (int64_t k = image * most + count + threadIdx.x; k < (image + 1) * most; k += kThreads) {
    write(out, in.dtype, k, Box<C>{}, C(0), -1);
  }
  if (threadIdx.x == 0) out.counts[image] = count;
}

// Visits an image's candidates, the n keys of its list, and writes its detections. All threads of a block call it.
template <class C>
__device__ void visit(const Inputs& in, const Workspace<C>& w, const Outputs<void>& out, int64_t image, int n,
                      gpu::SelectShared<Key<C>>& select, Visit<C>& shared) {
  const int64_t most = in.params.max_detections, topk = in.params.topk_per_class;
  const int thread = int(threadIdx.x);
  const Key<C>* const list = w.lists + image * list_size(in);
  const bool is_long = n > kChunk;
  unsigned* const visited = is_long ? w.visited + image * in.sizes.classes : nullptr;
  if (is_long) {
#pragma unroll 1
    for (int64_t c = thread; c < in.sizes.classes; c += kThreads) visited[c] = 0;
  }
  Kept<C> kept{shared.kept_boxes, shared.kept_labels};
  if (most > kKeptInShared) kept = {w.kept_boxes + image * most * 4, w.kept_labels + image * most};
  // Where all classes are rivals, they only matter if one may have too many candidates.
  const bool is_agnostic = in.params.class_agnostic, goes_by_class = !is_agnostic || n > topk;
  const ClassOrder<C> order(in.sizes);
  int seen = 0;
  Key<C> last = ~Key<C>(0);
  while (seen < n && kept.count < most) {
    // 1. The best candidates not yet seen, sorted by class.
    const int before = seen;
    Key<C> key = next_chunk(list, n, seen, last, select, shared);
    shared.keys[thread] = key != 0 && goes_by_class ? order.by_class(key) : key;
    sort_chunk(seen - before, shared);
    key = shared.keys[thread];
    if (key != 0 && goes_by_class) key = order.by_score(key);
    place_candidate(in, image, key, shared);
    Group group = group_of([&](int i) { return shared.labels[i]; });

    // 2. Of each class the first topk_per_class.
    bool is_alive = key != 0;
    if (goes_by_class && rank_in_class(group, visited, shared) >= topk) is_alive = false;

    // 3. If all classes are rivals, in order of score.
    if (is_agnostic) {
      if (goes_by_class) {
        shared.keys[thread] = is_alive ? key : Key<C>(0);
        sort_chunk(seen - before, shared);
        key = shared.keys[thread];
        is_alive = key != 0;
        place_candidate(in, image, key, shared);
      }
      group = group_of([&](int i) { return shared.labels[i] < 0 ? -1 : 0; });
    }

    // 4. NMS: against what is kept of earlier chunks, then within the chunk.
    const Overlaps<C> overlaps(gpu::load_box(shared.boxes, thread), C(in.params.iou_threshold));
    if (meets_kept(kept, shared.labels[thread], is_agnostic, overlaps)) is_alive = false;
    suppress(is_alive, group, overlaps, most - kept.count, shared);

    // 5. The detections.
    const int all = order_kept(score_of<C>(key), shared);
    write_detections(in, out, image, all, is_long, kept, shared);
  }
  pad_detections<C>(in, out, image, kept.count);
}

// Dynamic shared memory of finish_kernel: the scores of a class first, then the visit.
using Bytes16 = gpu::Four<float>;
template <class C>
SSD_EXT_HD size_t finish_bytes(const Inputs& in, bool is_cached) {
  const size_t scores = is_cached ? in.sizes.priors * sizeof(C) : 0;
  return (max_of(scores, sizeof(Visit<C>)) + 15) / 16 * 16;
}

// Block (part, image) of a grid of parts x images, in which the parts 0 of all images come first.
template <class C, bool kCached>
__global__ void __launch_bounds__(kThreads, sizeof(C) == 8 ? 1 : 2)
    finish_kernel(Inputs in, Workspace<C> w, Outputs<void> out, unsigned parts) {
  __shared__ ListMaking<C> making;
  gpu::Smem smem;
  Bytes16* const memory = smem.take<Bytes16>(finish_bytes<C>(in, kCached) / 16);
  const unsigned images = unsigned(in.sizes.images), part = blockIdx.x / images;
  const int64_t image = blockIdx.x % images;
  Counters& counters = w.counters[image];
  unsigned n = counters.found;
  if (n > list_size(in)) {
    for (int64_t i = part; i < classes_of(in); i += parts) {
      list_best<kCached>(in, w, image, first_class(in.params) + i, reinterpret_cast<C*>(memory), making);
    }
    if (!gpu::is_last_block(&counters.ticket, parts)) return;
    n = gpu::load_written(&counters.listed);
  } else if (part > 0) {
    return;
  }
  visit(in, w, out, image, int(n), making.select, *reinterpret_cast<Visit<C>*>(memory));
}

template <class C>
void launch_all(const Inputs& in, const Outputs<void>& out, void* workspace, Stream stream) {
  const Workspace<C> w(workspace, in);
  const int64_t images = in.sizes.images, priors = in.sizes.priors, classes = classes_of(in);
  gpu::clear(w.counters, images * sizeof(Counters), stream);
  if (classes > 0) {
    const bool are_few = images * priors <= kFewRows;
    const unsigned blocks = are_few ? collecting_blocks<1>(priors) : collecting_blocks<4>(priors);
    const C bound = reject_below(C(in.params.score_threshold), in.params.sigmoid);
    gpu::dispatch(in.logits.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (sizeof(T) <= sizeof(C)) {
        gpu::launch(are_few ? collect_kernel<T, C, 1> : collect_kernel<T, C, 4>, dim3(unsigned(images * blocks)),
                    dim3(kCollectThreads), 0, stream, in, w, bound);
      }
    });
  }
  if (images == 0) return;
  // Blocks for each image in case its list is lost; all but one leave at once if it is not.
  const int64_t wanted = max_of(kMostPartsCuda, kFinishBlocks / images);
  const auto parts = unsigned(max_of(int64_t(1), min_of(classes, wanted)));
  const bool is_cached = size_t(priors) <= kMostCachedBytes / sizeof(C);
  gpu::launch(is_cached ? finish_kernel<C, true> : finish_kernel<C, false>, dim3(unsigned(images * parts)),
              dim3(kThreads), finish_bytes<C>(in, is_cached), stream, in, w, out, parts);
}

}  // namespace

size_t workspace_bytes(const Inputs& in) {
  return in.dtype == DType::f64 ? Workspace<double>(nullptr, in).bytes : Workspace<float>(nullptr, in).bytes;
}

void detect_cuda(const Inputs& in, const Outputs<void>& out, void* workspace, Stream stream) {
  if (in.dtype == DType::f64) return launch_all<double>(in, out, workspace, stream);
  launch_all<float>(in, out, workspace, stream);
}

}  // namespace ssd_ext::detect
