#include "detect/detect.h"

#include "common/gpu_select.h"
#include "common/gpu_sort.h"
#include "common/gpu_tile.h"

// One pass over the logits appends every candidate to its image's list, in any order: keys order them. A
// list has room for all candidates that can count, topk_per_class of each class. Where more than that
// pass the threshold, the list is lost and made anew from the best of each class.
//   clear_kernel     empties the lists
//   collect_kernel   half a warp a row of logits: candidates to the lists
//   select_kernel    one block a class of an image whose list is lost: its best, from the same scores
//   visit_kernel     one block an image: candidates best first, kChunk sorted at a time, NMS of kTile at a time
namespace ssd_ext::detect {
namespace {

using gpu::ballot_tile;
using gpu::kTile;
using gpu::Word;

constexpr int kCollectThreads = 128;
constexpr int kPairs = 4;  // of rows that a warp reads in collect_kernel, a row for each half
constexpr int kRows = 2 * kPairs;
constexpr int kSelectThreads = 512;
constexpr size_t kMostCached = 40 * 1024;  // bytes of scores kept in shared memory; P = 8732 in float32 fits
constexpr int kChunk = 512;
constexpr int kVisitThreads = kChunk;
constexpr int kVisitWarps = kVisitThreads / gpu::kWarp;
static_assert(kSumLanes == gpu::kWarp / 2);

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

template <class C>
struct Workspace {
  Key<C>* lists;        // [images, list_size]
  C* kept_boxes;        // [images, K, 4]
  RowStats<C>* rows;    // [images, priors], with softmax
  unsigned* found;      // [images] candidates, of which a list may hold but a part
  int32_t* kept_class;  // [images, K]
  int64_t* visited;     // [images, classes] candidates of each class seen so far
  size_t bytes;

  Workspace(void* base, const Inputs& in) {
    gpu::Scratch scratch{base};
    const Sizes& n = in.sizes;
    kept_boxes = scratch.take<C>(n.images * in.params.max_detections * 4);
    lists = scratch.take<Key<C>>(n.images * list_size(in));
    rows = scratch.take<RowStats<C>>(in.params.sigmoid ? 0 : n.images * n.priors);
    found = scratch.take<unsigned>(n.images);
    kept_class = scratch.take<int32_t>(n.images * in.params.max_detections);
    visited = scratch.take<int64_t>(n.images * n.classes);
    bytes = scratch.bytes;
  }
};

// An element, for T the type of the inputs.
template <class T>
__device__ __forceinline__ gpu::Compute<T> at(const Strided& t, int64_t image, int64_t row, int64_t column) {
  return gpu::Compute<T>(static_cast<const T*>(t.data)[image * t.image + row * t.row + column * t.column]);
}

template <class T>
__device__ __forceinline__ CenterBox<gpu::Compute<T>> four_at(const Strided& t, int64_t image, int64_t row) {
  return {at<T>(t, image, row, 0), at<T>(t, image, row, 1), at<T>(t, image, row, 2), at<T>(t, image, row, 3)};
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

__global__ void __launch_bounds__(kCollectThreads) clear_kernel(unsigned* __restrict__ found, int64_t images) {
  const int64_t stride = int64_t(gridDim.x) * kCollectThreads;
  for (int64_t b = gpu::global_index(); b < images; b += stride) found[b] = 0;
}

// One warp for kRows priors of an image.
template <class T>
__global__ void __launch_bounds__(kCollectThreads, 1)
    collect_kernel(Inputs in, Workspace<gpu::Compute<T>> w, gpu::Compute<T> bound) {
  using C = gpu::Compute<T>;
  const C infinity = std::numeric_limits<C>::infinity(), threshold = C(in.params.score_threshold);
  const bool is_sigmoid = in.params.sigmoid;
  const int64_t priors = in.sizes.priors, tiles = (priors + kRows - 1) / kRows, size = list_size(in);
  const int64_t tile = gpu::global_index() / gpu::kWarp, image = tile / tiles, first_row = tile % tiles * kRows;
  if (image >= in.sizes.images) return;
  const int lane = threadIdx.x % gpu::kWarp, half = lane / kSumLanes;
  const int classes = int(in.sizes.classes), first = int(first_class(in.params)), own = lane % kSumLanes;
  Key<C>* const list = w.lists + image * size;
  const auto logit = [&](int64_t p, int c) { return at<T>(in.logits, image, p, c); };

  // Whether a row can have a candidate, of all rows together: many loads on their way at once.
  C most[kPairs];
  for (C& m : most) m = -infinity;
  for (int c = first + own; c < classes; c += kSumLanes) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int64_t p = first_row + 2 * i + half;
      most[i] = max_of(logit(p < priors ? p : priors - 1, c), most[i]);
    }
  }
  unsigned alive = 0;  // bit i: the i-th row of this half
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int64_t p = first_row + 2 * i + half;
    const C greatest = max_of_lanes(most[i]);
    if (p < priors && greatest - (is_sigmoid ? C(0) : logit(p, 0)) > bound) alive |= 1u << i;
  }

  bool full = false;  // the list can take no more
#pragma unroll 1
  for (int r = 0; r < kPairs; ++r) {
    const int64_t p = first_row + 2 * r + half;
    const bool lives = alive >> r & 1;
    RowStats<C> stats{C(0), infinity};
    if (__any_sync(gpu::kFullMask, lives)) {
      if (!is_sigmoid) {
        C greatest = -infinity, sum = 0;
        if (lives) {
          for (int c = own; c < classes; c += kSumLanes) greatest = max_of(logit(p, c), greatest);
        }
        greatest = max_of_lanes(greatest);
        if (lives) {
          for (int c = own; c < classes; c += kSumLanes) sum += exp(logit(p, c) - greatest);
        }
        sum = sum_of_lanes(sum);
        if (lives) stats = {greatest, sum};
      }
      for (int start = 0; start < classes && !full; start += kSumLanes) {
        const int c = start + own;
        C score = 0;
        if (lives && first <= c && c < classes) {
          score = is_sigmoid ? sigmoid(logit(p, c)) : exp(logit(p, c) - stats.greatest) / stats.sum;
        }
        const unsigned passed = __ballot_sync(gpu::kFullMask, score > threshold);
        if (passed == 0) continue;
        const unsigned count = __popc(passed);
        unsigned slot = 0;
        if (lane == 0) slot = atomicAdd(&w.found[image], count);
        slot = __shfl_sync(gpu::kFullMask, slot, 0);
        full = slot + count > size;  // and `found` says so
        slot += __popc(passed & ((1u << lane) - 1));
        if (score > threshold && slot < size) list[slot] = make_key(score, uint32_t(c * priors + p));
      }
    }
    if (own == 0 && p < priors && !is_sigmoid) w.rows[image * priors + p] = stats;
  }
}

// Scores of one class of an image; computed once into shared memory where they fit, else for each pass.
template <class T, bool kCached>
struct ClassScores {
  using C = gpu::Compute<T>;
  const Inputs& in;
  const RowStats<C>* rows;  // of the image, with softmax
  C* cache;                 // [priors] if kCached
  int64_t image, c;

  __device__ C made(int64_t p) const {
    const C x = at<T>(in.logits, image, p, c);
    if (in.params.sigmoid) return sigmoid(x);
    const RowStats<C> row = rows[p];
    return exp(x - row.greatest) / row.sum;
  }
  // The key of a candidate, else 0.
  __device__ Key<C> operator()(int64_t p) const {
    C score;
    if constexpr (kCached) {
      score = cache[p];
    } else {
      score = made(p);
    }
    return score > C(in.params.score_threshold) ? make_key(score, uint32_t(c * in.sizes.priors + p)) : Key<C>(0);
  }
};

template <class T, bool kCached>
__global__ void __launch_bounds__(kSelectThreads, 1) select_kernel(Inputs in, Workspace<gpu::Compute<T>> w) {
  using C = gpu::Compute<T>;
  __shared__ gpu::SelectShared<Key<C>> select;
  __shared__ int64_t candidates[kSelectThreads / gpu::kWarp];
  __shared__ unsigned written;
  gpu::Smem smem;
  const int64_t priors = in.sizes.priors, size = list_size(in), best = best_of_class(in);
  C* const cache = smem.take<C>(kCached ? priors : 0);
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const int64_t image = blockIdx.x / classes_of(in), place = blockIdx.x % classes_of(in);
  if (w.found[image] <= size) return;
  const int64_t c = place + first_class(in.params);
  const ClassScores<T, kCached> key_at{in, w.rows + image * priors, cache, image, c};
  int64_t count = 0;
  for (int64_t p = thread; p < priors; p += kSelectThreads) {
    if constexpr (kCached) cache[p] = key_at.made(p);
    count += key_at(p) != 0;
  }
  count = gpu::warp_sum(count);
  if (lane == 0) candidates[warp] = count;
  if (thread == 0) written = 0;
  __syncthreads();  // counts and cache are written
  count = gpu::warp_sum(lane < kSelectThreads / gpu::kWarp ? candidates[lane] : 0);
  Key<C> cut = 1;
  if (count > best) {
    cut = gpu::kth_greatest<kSelectThreads, kKeyBits<C>>(key_at, priors, best, select).key;
    count = best;
  }
  Key<C>* const list = w.lists + image * size + place * best;
  for (int64_t begin = 0; begin < priors; begin += kSelectThreads) {
    const int64_t p = begin + thread;
    const Key<C> key = p < priors ? key_at(p) : Key<C>(0);
    const unsigned taken = __ballot_sync(gpu::kFullMask, key >= cut);
    unsigned slot = 0;
    if (lane == 0 && taken) slot = atomicAdd(&written, unsigned(__popc(taken)));
    slot = __shfl_sync(gpu::kFullMask, slot, 0) + __popc(taken & ((1u << lane) - 1));
    if (key >= cut) list[slot] = key;
  }
  for (int64_t i = count + thread; i < best; i += kSelectThreads) list[i] = 0;
}

// What the threads of visit_kernel tell each other.
template <class C>
struct Visit {
  gpu::SelectShared<Key<C>> select;
  int64_t behind[kVisitWarps];  // keys behind the last one visited, found by each warp
  Key<C> keys[kChunk];          // sorted
  Box<C> boxes[kChunk];
  int32_t classes[kChunk];
  unsigned valid[kVisitWarps];   // bits of the boxes that may be kept
  Word earlier[kTile];           // which boxes of the tile overlap which earlier ones of it
  Word suppressed[kVisitWarps];  // boxes of the tile that overlap a kept one, found by each warp
  Word kept;                     // of the tile
  unsigned gathered;
};

// The best keys below `last`, kChunk of them or all there are, sorted into shared.keys; returns how many.
template <class C>
__device__ int next_chunk(const Key<C>* list, int64_t n, Key<C> last, Visit<C>& shared) {
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const auto key_at = [&](int64_t i) { return list[i] < last ? list[i] : Key<C>(0); };
  Key<C> cut = 1;
  if (n > kChunk) {
    int64_t behind = 0;
    for (int64_t i = thread; i < n; i += kVisitThreads) behind += key_at(i) != 0;
    behind = gpu::warp_sum(behind);
    if (lane == 0) shared.behind[warp] = behind;
    __syncthreads();  // the counts of the warps are written
    behind = gpu::warp_sum(lane < kVisitWarps ? shared.behind[lane] : 0);
    if (behind > kChunk) {
      cut = gpu::kth_greatest<kVisitThreads, kKeyBits<C>>(key_at, n, kChunk, shared.select).key;
    }
  }
  if (thread == 0) shared.gathered = 0;
  shared.keys[thread] = 0;
  __syncthreads();  // nothing is gathered
  for (int64_t begin = 0; begin < n; begin += kVisitThreads) {
    const int64_t i = begin + thread;
    const Key<C> key = i < n ? key_at(i) : Key<C>(0);
    const unsigned taken = __ballot_sync(gpu::kFullMask, key >= cut);
    unsigned slot = 0;
    if (lane == 0 && taken) slot = atomicAdd(&shared.gathered, unsigned(__popc(taken)));
    slot = __shfl_sync(gpu::kFullMask, slot, 0) + __popc(taken & ((1u << lane) - 1));
    if (key >= cut) shared.keys[slot] = key;
  }
  __syncthreads();  // all are gathered
  const int count = int(shared.gathered);
  int size = gpu::kLeastSorted;
  while (size < count) size *= 2;
  gpu::sort_falling(shared.keys, size);  // after the keys stand zeros
  return count;
}

template <class T>
__global__ void __launch_bounds__(kVisitThreads, 1)
    visit_kernel(Inputs in, Workspace<gpu::Compute<T>> w, Outputs<T> out) {
  using C = gpu::Compute<T>;
  __shared__ Visit<C> shared;
  const Params& params = in.params;
  const int64_t priors = in.sizes.priors, most = params.max_detections, size = list_size(in);
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const C threshold = C(params.iou_threshold);
  const Box<C> window{C(params.window_x1), C(params.window_y1), C(params.window_x2), C(params.window_y2)};
  const int64_t image = blockIdx.x;
  const Key<C>* const list = w.lists + image * size;
  int64_t* const visited = w.visited + image * in.sizes.classes;
  C* const kept_boxes = w.kept_boxes + image * most * 4;
  int32_t* const kept_class = w.kept_class + image * most;
  const int64_t found = w.found[image], n = min_of(found, size);
  // Whether a class may have more candidates than are to be looked at.
  const bool crowded = found <= size && found > params.topk_per_class;
  if (crowded) {
    for (int64_t c = thread; c < in.sizes.classes; c += kVisitThreads) visited[c] = 0;
  }
  int64_t count = 0;
  Key<C> last = ~Key<C>(0);
  while (count < most) {
    const int gathered = next_chunk(list, n, last, shared);
    if (gathered == 0) break;
    last = shared.keys[gathered - 1];

    // Each thread has one candidate of the chunk.
    const Key<C> key = shared.keys[thread];
    const int64_t number = number_of<C>(key);
    bool valid = thread < gathered;
    int32_t label = -1;
    if (valid) {
      label = int32_t(number / priors);
      const int64_t p = number % priors;
      const Box<C> box = decode_box(four_at<T>(in.deltas, image, p), four_at<T>(in.priors, 0, p), C(params.center),
                                    C(params.size), C(params.clip));
      shared.boxes[thread] = clip_box(box, window);
    } else {
      shared.boxes[thread] = {C(0), C(0), C(0), C(0)};
    }
    shared.classes[thread] = label;
    __syncthreads();  // boxes and classes are written
    if (crowded) {
      int64_t rank = 0;
      bool is_last = true;  // of its class in the chunk
      for (int i = 0; i < gathered; ++i) {
        const bool same = shared.classes[i] == label;
        rank += same && i < thread;
        is_last &= !(same && i > thread);
      }
      if (valid) rank += visited[label];
      __syncthreads();  // everybody has read what was visited before
      if (valid && is_last) visited[label] = rank + 1;
      valid &= rank < params.topk_per_class;
    }
    const unsigned bits = __ballot_sync(gpu::kFullMask, valid);
    if (lane == 0) shared.valid[warp] = bits;  // to be read behind the next barrier

    for (int tile = 0; tile * kTile < gathered && count < most; ++tile) {
      const int i = tile * kTile + lane, j = i + gpu::kWarp;
      const Box<C> low = shared.boxes[i], high = shared.boxes[j];
      const int32_t low_class = shared.classes[i], high_class = shared.classes[j];
      const auto rivals = [&](int32_t a, int32_t b) { return params.class_agnostic || a == b; };
      bool low_hit = false, high_hit = false;
      for (int64_t k = warp; k < count; k += kVisitWarps) {
        const Box<C> box = gpu::load_box(kept_boxes, k);
        const int32_t c = kept_class[k];
        low_hit |= rivals(low_class, c) && gpu::overlaps(box, low, threshold);
        high_hit |= rivals(high_class, c) && gpu::overlaps(box, high, threshold);
      }
      const Word suppressed = ballot_tile(low_hit, high_hit);
      if (lane == 0) shared.suppressed[warp] = suppressed;
      for (int row = warp; row < kTile; row += kVisitWarps) {
        const Box<C> box = shared.boxes[tile * kTile + row];
        const int32_t c = shared.classes[tile * kTile + row];
        const Word met = ballot_tile(rivals(low_class, c) && gpu::overlaps(low, box, threshold),
                                     rivals(high_class, c) && gpu::overlaps(high, box, threshold));
        if (lane == 0) shared.earlier[row] = met & ((Word(1) << row) - 1);
      }
      __syncthreads();  // what the tile's boxes overlap is written
      if (warp == 0) {
        Word alive = shared.valid[2 * tile] | Word(shared.valid[2 * tile + 1]) << gpu::kWarp;
        for (int other = 0; other < kVisitWarps; ++other) alive &= ~shared.suppressed[other];
        const Word now = gpu::kept_of_tile(alive, shared.earlier[lane], shared.earlier[lane + gpu::kWarp]);
        if (lane == 0) shared.kept = now;
      }
      __syncthreads();  // the kept boxes of the tile are known
      const Word kept = shared.kept;
      if (thread < kTile && (kept >> thread & 1)) {
        const int64_t slot = count + __popcll(kept & ((Word(1) << thread) - 1));
        if (slot < most) {
          const int from = tile * kTile + thread;
          const Box<C> box = shared.boxes[from];
          const int32_t c = shared.classes[from];
          gpu::store_four(kept_boxes, slot, box.x1, box.y1, box.x2, box.y2);
          kept_class[slot] = c;
          gpu::store_four(out.boxes, image * most + slot, box.x1, box.y1, box.x2, box.y2);
          out.scores[image * most + slot] = T(score_of<C>(shared.keys[from]));
          out.labels[image * most + slot] = c;
        }
      }
      count = min_of(count + __popcll(kept), most);
      __syncthreads();  // they may be read, and what is shared about the tile used again
    }
    if (n <= kChunk) break;  // that was all
  }
  for (int64_t k = count + thread; k < most; k += kVisitThreads) {
    gpu::store_four(out.boxes, image * most + k, C(0), C(0), C(0), C(0));
    out.scores[image * most + k] = T(C(0));
    out.labels[image * most + k] = -1;
  }
  if (thread == 0) out.counts[image] = count;
}

}  // namespace

size_t workspace_bytes(const Inputs& in) {
  return in.dtype == DType::f64 ? Workspace<double>(nullptr, in).bytes : Workspace<float>(nullptr, in).bytes;
}

void detect_cuda(const Inputs& in, const Outputs<void>& out, void* workspace, Stream stream) {
  gpu::dispatch(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = gpu::Compute<T>;
    const Workspace<C> w(workspace, in);
    const int64_t images = in.sizes.images, priors = in.sizes.priors;
    const Outputs<T> typed{static_cast<T*>(out.boxes), static_cast<T*>(out.scores), out.labels, out.counts};
    gpu::launch(clear_kernel, dim3(gpu::blocks_for(images, kCollectThreads)), dim3(kCollectThreads), 0, stream, w.found,
                images);
    if (classes_of(in) > 0) {
      const int64_t warps = images * ((priors + kRows - 1) / kRows), per_block = kCollectThreads / gpu::kWarp;
      const C bound = reject_below(C(in.params.score_threshold), in.params.sigmoid);
      gpu::launch(collect_kernel<T>, dim3(unsigned((warps + per_block - 1) / per_block)), dim3(kCollectThreads), 0,
                  stream, in, w, bound);
      const bool cached = size_t(priors) <= kMostCached / sizeof(C);
      gpu::launch(cached ? select_kernel<T, true> : select_kernel<T, false>,
                  dim3(unsigned(priors > 0 ? images * classes_of(in) : 0)), dim3(kSelectThreads),
                  cached ? gpu::Smem::end_of<C>(0, priors) : 0, stream, in, w);
    }
    gpu::launch(visit_kernel<T>, dim3(unsigned(images)), dim3(kVisitThreads), 0, stream, in, w, typed);
  });
}

}  // namespace ssd_ext::detect
