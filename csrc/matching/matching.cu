// One launch matches a batch.
//
// Ladder: microseconds for SSD300 with about 7 ground truths an image at B = 32, with 60 at B = 32, and with a photo's
// at B = 1, predicted from the instructions of sm_90, or measured on an H200 where it says so.
//
// 1. A kernel for the thresholds, a prior a lane, with five shuffles for the best of a warp's priors; then one with a
//    block for each image for the forced matches, one load in flight: 12, -, 8.5.
// 2. One kernel: the last block of an image goes on with its forced matches, six loads in flight, after a memset that
//    clears the tickets; the best of a warp by __reduce_max_sync: 9, -, 5.5.
// 3. Two priors a lane: 8, -, 5.5. Measured: 25.9, 66, -. A pair took 175 instructions, not 75, for 0 / total takes the
//    slow path of the division; the 35 ground truths of the fullest image came one after another; 64 registers left a
//    second wave; and the forced matches waited for code that no cache held.
// 4. This one: no quotient of 0, a prior a lane and two ground truths at a time, the largest priors first, a third less
//    code: 9, 22, 5. Measured: 13.7, 36.6, -. Crowds of ground truths that want the same priors are joined one after
//    another, predicted to take 10 for each: in rounds of claims alone, each of the losers would search again.
//
// What binds it: at B = 32 instructions, 300 for the 32 priors of a warp and 54 for each ground truth near them, and
// the fullest image; at B = 1 a chain of latencies, in clocks: priors and offsets 1,700, seven ground truths 3,900,
// thresholds 1,700, ticket 1,800, the best of all tiles 1,100, claims 1,300, their targets 2,400.
#include "matching/matching.h"

#include "common/gpu.h"
#include "common/gpu_last_block.h"
#include "common/gpu_warp.h"

namespace ssd_ext::matching {
namespace {

constexpr int kThreads = 192;  // with 56 registers each, six blocks fill a multiprocessor
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr int kTile = kThreads;  // priors of a block, one a lane
constexpr int kGtTile = 64;      // ground truths in shared memory at a time
constexpr int kAtOnce = 2;       // ground truths that a warp compares at a time, to hide latency
constexpr int kRounds = 16;      // of claims, before the ground truths of a crowd are joined one after another
constexpr int32_t kFree = -1;    // the owner of a prior that no ground truth has claimed

// A prior and its IoU with a ground truth; iou < 0: none. Aligned to be read and written in one access, and without
// padding.
template <class C>
struct alignas(2 * sizeof(C)) Best {
  C iou;
  IntOf<C> prior;
};

// The higher IoU, the lower prior among equals.
template <class C>
__device__ __forceinline__ Best<C> better_of(const Best<C>& a, const Best<C>& b) {
  return b.iou > a.iou || (b.iou == a.iou && b.prior < a.prior) ? b : a;
}

// The best of each aligned group of `lanes` lanes, in all of them; the whole warp must call it.
template <int lanes, class C>
__device__ __forceinline__ Best<C> best_of_lanes(Best<C> best) {
#pragma unroll 1
  for (int d = lanes / 2; d > 0; d /= 2) {
    best =
        better_of(best, {__shfl_xor_sync(gpu::kFullMask, best.iou, d), __shfl_xor_sync(gpu::kFullMask, best.prior, d)});
  }
  return best;
}

// The best of a block's threads, in all of them, which call this together. `of_warps` is shared memory.
template <class C>
__device__ __forceinline__ Best<C> best_of_block(Best<C> best, Best<C>* of_warps) {
  best = best_of_lanes<gpu::kWarp>(best);
  __syncthreads();  // the last call's are read
  if (threadIdx.x % gpu::kWarp == 0) of_warps[threadIdx.x / gpu::kWarp] = best;
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) best = better_of(best, of_warps[w]);
  return best;
}

// Tile t of an image covers priors t * kTile .. (t + 1) * kTile; a block matches one tile.
SSD_EXT_HD unsigned tiles_of(const Sizes& sizes) { return unsigned((sizes.priors + kTile - 1) / kTile); }

// Scratch memory of one call; none is needed without force.
template <class C>
struct Workspace {
  unsigned* tickets;   // [B] of the image's blocks, 0 before the launch
  Best<C>* tile_best;  // [tiles, G] the best prior within a tile
  Best<C>* wanted;     // [G] the prior that a ground truth claims
  int32_t* owner;      // [B, P] the ground truth of the image that holds a prior, or kFree
  size_t bytes;

  Workspace(void* base, const Sizes& sizes, Force force) {
    gpu::Scratch scratch{base};
    const int64_t forced = force == Force::none ? 0 : 1;
    tickets = scratch.take<unsigned>(forced * sizes.images);
    tile_best = scratch.take<Best<C>>(forced * tiles_of(sizes) * sizes.gts);
    wanted = scratch.take<Best<C>>(forced * sizes.gts);
    owner = scratch.take<int32_t>(forced * sizes.images * sizes.priors);
    bytes = scratch.bytes;
  }
};

// Rows of image b, for all threads of a block to call together. From the first offset that falls or
// leaves 0 .. total on, images have no rows: so none leads out of bounds, and no two images share a row.
struct Rows {
  int64_t begin;
  int32_t count;
};
__device__ __forceinline__ Rows rows_of(const int64_t* __restrict__ offsets, int64_t b, int64_t total) {
  const int64_t begin = offsets[b], end = offsets[b + 1];
  bool bad = false;
#pragma unroll 1  // unrolled, it would hold twice the registers for a loop that rarely comes round
  for (int64_t i = threadIdx.x; i <= b; i += kThreads) {
    const int64_t offset = offsets[i], next = offsets[i + 1];
    bad |= offset < 0 || next < offset;
  }
  bad |= end > total;
  if (__syncthreads_or(bad)) return {0, 0};
  return {begin, int32_t(end - begin)};
}

// Stores the label and the target of a prior. Not inlined: the forced matches, which come once, then find its code in
// the cache.
template <class T>
__device__ __attribute__((noinline)) void store_target(const T* gt_box, const int64_t* gt_label, const T* prior,
                                                       int64_t* label, T* delta, gpu::Compute<T> center,
                                                       gpu::Compute<T> size) {
  const int64_t given = *gt_label;
  const auto d = encode_box(gpu::load_box(gt_box, 0), gpu::load_center_box(prior, 0), center, size);
  *label = given;
  gpu::store_four(delta, 0, d.cx, d.cy, d.w, d.h);
}

// Writes the outputs of one image.
template <class T>
struct Writer {
  using C = gpu::Compute<T>;
  const T* gt_boxes;         // [G, 4]
  const int64_t* gt_labels;  // [G] or nullptr
  const T* priors;           // [P, 4]
  const Outputs& out;
  const Rule& rule;
  int64_t first_gt, first_row;  // of the image

  __device__ __forceinline__ void matched(int64_t p, int32_t j) const {
    const int64_t row = first_row + p;
    if (out.matches) {
      out.matches[row] = j;
      return;
    }
    store_target(gt_boxes + 4 * (first_gt + j), gt_labels + first_gt + j, priors + 4 * p, out.labels + row,
                 static_cast<T*>(out.deltas) + 4 * row, C(rule.center), C(rule.size));
  }

  __device__ __forceinline__ void unmatched(int64_t p, bool ignored) const {
    const int64_t row = first_row + p;
    if (out.matches) {
      out.matches[row] = ignored ? kIgnore : kBackground;
    } else {
      out.labels[row] = ignored ? -1 : 0;
      gpu::store_four(static_cast<T*>(out.deltas), row, C(0), C(0), C(0), C(0));
    }
  }
};

// ---- matching by threshold, a prior a lane ---------------------------------------------------------

// Some ground truths of an image, in shared memory.
template <class C>
struct GtTile {
  Box<C> boxes[kGtTile];
  C areas[kGtTile];  // -1: not a valid box
};

template <class T, class C>
__device__ __forceinline__ void load_ground_truth(GtTile<C>& gts, const T* __restrict__ gt_boxes, int64_t first,
                                                  int n) {
  const int k = threadIdx.x;
  if (k >= n) return;
  const Box<C> box = gpu::load_box(gt_boxes, first + k);
  gts.boxes[k] = box;
  gts.areas[k] = is_valid(box) ? area(box) : C(-1);
}

// The prior of a lane and the best ground truth found for it.
template <class C>
struct Prior {
  Box<C> box;
  C area;
  C iou = C(-1);  // with its match; -1: there is none yet
  int32_t match = 0;
};

// The bounding box of a warp's priors. A NaN corner does not extend it: such a box has IoU 0 with everything.
template <class C>
__device__ __forceinline__ Box<C> bounds_of_warp(const Box<C>& prior) {
  const C inf = std::numeric_limits<C>::infinity();
  const auto most = [=](C x) {
    return from_order_key<C>(from_radix_key(gpu::warp_max(radix_key(order_key_nan_least(max_of(x, -inf))))));
  };
  return {-most(-prior.x1), -most(-prior.y1), most(prior.x2), most(prior.y2)};
}

// Compares the priors of a warp, from `first` on, with ground truths k0 .. k0 + 31 of a tile that begins with the
// image's j0-th. Each lane updates the match of its prior and returns the best of the warp's priors for ground truth
// k0 + lane, which is only right if `forced`. Ground truths that do not meet the bounding box of the priors are
// skipped: their IoU with each of them is 0.
template <class C>
__device__ __forceinline__ Best<C> compare(const GtTile<C>& gts, int k0, int n, int32_t j0, int32_t first,
                                           const Box<C>& bounds, bool forced, Prior<C>& prior) {
  const int lane = threadIdx.x % gpu::kWarp, k = k0 + lane;
  const bool valid = k < n && gts.areas[k] > C(0);
  const unsigned all_valid = __ballot_sync(gpu::kFullMask, valid);
  // The first valid ground truth is the match of a prior that overlaps none: at IoU 0, which a threshold of 0 takes.
  if (prior.iou < C(0) && all_valid) {
    prior.iou = C(0);
    prior.match = j0 + k0 + __ffs(int(all_valid)) - 1;
  }
  Best<C> best{valid ? C(0) : C(-1), first};  // the first prior, if all have IoU 0
  const bool near = valid && may_meet(gts.boxes[k], bounds);
  for (unsigned left = __ballot_sync(gpu::kFullMask, near); left;) {
    int bits[kAtOnce];
    C inters[kAtOnce], ious[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      bits[i] = left || i == 0 ? __ffs(int(left)) - 1 : bits[i - 1];  // the last one once more changes nothing
      left &= left - 1;
      inters[i] = intersection(gts.boxes[k0 + bits[i]], prior.box);
    }
    for (int i = 0; i < kAtOnce; ++i) {
      ious[i] = gpu::iou_of(inters[i], gts.areas[k0 + bits[i]], prior.area);
      if (ious[i] > prior.iou) {
        prior.iou = ious[i];
        prior.match = j0 + k0 + bits[i];
      }
    }
    if (!forced) continue;
    for (int i = 0; i < kAtOnce; ++i) {
      // An IoU that is at least +0 is in the order of its bits.
      using Bits = std::make_unsigned_t<IntOf<C>>;
      const Bits iou = bit_cast<Bits>(ious[i]), most = gpu::warp_max(iou);
      const int holder = __ffs(int(__ballot_sync(gpu::kFullMask, iou == most))) - 1;
      if (lane == bits[i]) best = {bit_cast<C>(most), first + holder};
    }
  }
  return best;
}

// ---- forced matches, one block an image ------------------------------------------------------------

// Does ground truth j, whose IoU with a prior is `iou`, take it from its owner?
template <class C>
__device__ __forceinline__ bool takes(Force force, C iou, int32_t j, C owner_iou, int32_t owner) {
  if (force == Force::last) return j > owner;
  return iou > owner_iou || (iou == owner_iou && j < owner);
}

// How the ground truths of an image claim priors. `tile_best` and `owner` come from all its blocks, so they are read
// by load_written().
template <class C>
struct Claims {
  Force force;
  C min_iou;           // pairs are joined above
  int32_t count;       // ground truths of the image
  int64_t gts;         // and of all images
  unsigned tiles;      // of the image's priors
  Best<C>* tile_best;  // [tiles, count], rows `gts` apart
  Best<C>* wanted;     // [count]
  int32_t* owner;      // [P]

  __device__ __forceinline__ Best<C> if_joinable(const Best<C>& best) const {
    return best.iou > min_iou ? best : Best<C>{C(-1), 0};
  }

  // Each ground truth wants its best prior, that of its best tile.
  __device__ __forceinline__ void want_best() const {
    constexpr int kParts = 8;   // lanes that share the tiles of a ground truth
    constexpr int kAtOnce = 6;  // tiles that a lane has in flight: the 46 of SSD300 in one round
    const int part = threadIdx.x % kParts;
    for (int32_t j0 = 0; j0 < count; j0 += kThreads / kParts) {
      const int32_t j = j0 + int(threadIdx.x) / kParts;
      Best<C> best{C(-1), 0};
#pragma unroll 1
      for (unsigned t0 = 0; t0 < tiles; t0 += kParts * kAtOnce) {
        Best<C> some[kAtOnce];
        unsigned t = t0 + part;
        for (Best<C>& one : some) {
          one = j < count && t < tiles ? gpu::load_written(&tile_best[t * gts + j]) : Best<C>{C(-1), 0};
          t += kParts;
        }
        for (const Best<C>& one : some) {
          if (one.iou > best.iou) best = one;
        }
      }
      best = best_of_lanes<kParts>(best);
      if (j < count && part == 0) wanted[j] = if_joinable(best);
    }
  }

  // Each ground truth claims the prior that it wants; of several that claim one, the strongest holds it in the end.
  // `wanted` does not change meanwhile, so that whoever holds a prior, its IoU is there to be compared.
  __device__ __forceinline__ void claim() const {
#pragma unroll 1
    for (int32_t j = threadIdx.x; j < count; j += kThreads) {
      const Best<C> own = wanted[j];
      if (own.iou < C(0)) continue;
      int32_t seen = kFree, held;
      while ((held = atomicCAS(&owner[own.prior], seen, j)) != seen &&
             takes(force, own.iou, j, wanted[held].iou, held)) {
        seen = held;
      }
    }
  }

  __device__ __forceinline__ bool holds(int32_t j, const Best<C>& own) const {
    return gpu::load_written(&owner[own.prior]) == j;
  }

  // Has a ground truth lost the prior that it wanted?
  __device__ __forceinline__ bool lost(int32_t j) const {
    const Best<C> own = wanted[j];
    return own.iou >= C(0) && !holds(j, own);
  }

  // The best prior that ground truth j can take, for a warp to call. A tile's best prior stands for the tile; only if
  // that cannot be taken, and nothing better is found elsewhere, the tile is searched. What an owner wants does not
  // change meanwhile, for it has not lost.
  template <class T>
  __device__ __forceinline__ Best<C> next_best(int32_t j, const Box<C>& box, const T* __restrict__ priors,
                                               int32_t num_priors) const {
    constexpr int kAtOnce = 3;  // priors that a lane has in flight
    const int lane = threadIdx.x % gpu::kWarp;
    Best<C> found{C(-1), 0};
    const auto offer = [&](const Best<C>& one, int32_t held) {
      if (held != kFree && !takes(force, one.iou, j, wanted[held].iou, held)) return false;
      found = better_of(found, one);
      return true;
    };
    for (unsigned t0 = 0; t0 < tiles; t0 += gpu::kWarp) {
      bool refused = false;
      Best<C> of_tile{};
      if (t0 + lane < tiles) {
        of_tile = gpu::load_written(&tile_best[(t0 + lane) * gts + j]);
        refused = !offer(of_tile, gpu::load_written(&owner[of_tile.prior]));
      }
      for (unsigned left = __ballot_sync(gpu::kFullMask, refused); left; left &= left - 1) {
        const int bit = __ffs(int(left)) - 1;
        const C most = __shfl_sync(gpu::kFullMask, of_tile.iou, bit);
        if (__any_sync(gpu::kFullMask, found.iou > most)) continue;  // nothing in this tile is better
        const int32_t begin = int32_t(t0 + bit) * kTile;
#pragma unroll 1
        for (int32_t q0 = begin + lane; q0 < begin + kTile; q0 += kAtOnce * gpu::kWarp) {
          const auto q = [&](int i) { return q0 + i * gpu::kWarp < num_priors ? q0 + i * gpu::kWarp : num_priors - 1; };
          CenterBox<C> some[kAtOnce];
          int32_t held[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            some[i] = gpu::load_center_box(priors, q(i));
            held[i] = gpu::load_written(&owner[q(i)]);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) offer({iou(box, to_corners(some[i])), q(i)}, held[i]);
        }
      }
    }
    return if_joinable(best_of_lanes<gpu::kWarp>(found));
  }

  // The best prior for a box that nobody owns, for a block to call.
  template <class T>
  __device__ __forceinline__ Best<C> best_free_prior(const Box<C>& box, const T* __restrict__ priors,
                                                     int32_t num_priors, Best<C>* of_warps) const {
    Best<C> best{C(-1), 0};
    if (is_valid(box)) {
#pragma unroll 1
      for (int32_t p = threadIdx.x; p < num_priors; p += kThreads) {
        if (gpu::load_written(&owner[p]) != kFree) continue;
        const C value = iou(box, to_corners(gpu::load_center_box(priors, p)));
        if (value > best.iou) best = {value, p};
      }
    }
    return best_of_block(best, of_warps);
  }

  // The best ground truth without a prior for a prior, for a block to call.
  template <class T>
  __device__ __forceinline__ int32_t best_ground_truth(const Box<C>& prior, const T* __restrict__ gt_boxes,
                                                       Best<C>* of_warps) const {
    Best<C> best{C(-1), 0};
#pragma unroll 1
    for (int32_t j = threadIdx.x; j < count; j += kThreads) {
      const Box<C> box = gpu::load_box(gt_boxes, j);
      if (wanted[j].iou >= C(0) || !is_valid(box)) continue;
      const C value = iou(box, prior);
      if (value > best.iou) best = {value, j};
    }
    return int32_t(best_of_block(best, of_warps).prior);
  }

  // Joins all of them anew, for a block to call, as the CPU does (see Bipartite in matching.simd.h): by a chain of
  // ground truths, each named by the prior that the one before it wants, until the last one and its prior name each
  // other. For each ground truth the block searches all priors at most twice, and all ground truths at most twice.
  template <class T>
  __device__ __forceinline__ void join_chains(const T* __restrict__ gt_boxes, const T* __restrict__ priors,
                                              int32_t num_priors, Best<C>* of_warps) const {
    Best<C>* const chain = tile_best;  // which nobody needs any more
#pragma unroll 1
    for (int32_t p = threadIdx.x; p < num_priors; p += kThreads) owner[p] = kFree;
#pragma unroll 1
    for (int32_t j = threadIdx.x; j < count; j += kThreads) wanted[j] = {C(-1), 0};
    __syncthreads();  // nobody owns or wants a prior
#pragma unroll 1
    for (int32_t first = 0; first < count; ++first) {
      int32_t length = 0, j = first, named_by = kFree;
      while (wanted[j].iou < C(0)) {
        const Best<C> best = best_free_prior(gpu::load_box(gt_boxes, j), priors, num_priors, of_warps);
        const bool is_some = best.iou > min_iou;
        const int32_t winner =
            !is_some || best.prior == named_by
                ? j
                : best_ground_truth(to_corners(gpu::load_center_box(priors, best.prior)), gt_boxes, of_warps);
        if (winner != j) {
          if (threadIdx.x == 0) chain[length] = {C(0), j};
          ++length;
          named_by = best.prior;
          j = winner;
          continue;
        }
        if (is_some && threadIdx.x == 0) {
          wanted[j] = best;
          owner[best.prior] = j;
        }
        __syncthreads();  // they are joined, and the chain is written
        if (length == 0) break;
        j = gpu::load_written(&chain[--length]).prior;
        named_by = kFree;
      }
    }
  }
};

// ---- the kernel ------------------------------------------------------------------------------------

// A block for each tile of priors of each image. The last one to finish of an image lets its ground truths claim
// priors, over what all have written.
//
// Under `bipartite`, ground truths that lose the prior they want claim the next best that they can take,
// all of them at once, until nobody loses. Pairs are ranked in one order (IoU, prior, ground truth) that
// both sides follow, so this deferred acceptance (Gale and Shapley, 1962) ends in its one stable outcome:
// what joining the best pair of all, then the best of the rest, and so on would give. In a crowd of ground truths that
// want the same priors all but one lose each time: after kRounds rounds they are joined by chains instead.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 6)
    match_kernel(const T* __restrict__ gt_boxes,         // [G, 4]
                 const int64_t* __restrict__ gt_labels,  // [G] or nullptr
                 const int64_t* __restrict__ offsets,    // [B + 1]
                 const T* __restrict__ priors,           // [P, 4]
                 Outputs out, Sizes sizes, Rule rule, Workspace<gpu::Compute<T>> work) {
  using C = gpu::Compute<T>;
  __shared__ GtTile<C> gts;
  __shared__ Best<C> best_of_warps[kWarps][kGtTile], chain_bests[kWarps];
  const bool forced = rule.force != Force::none;
  const int tid = threadIdx.x, lane = tid % gpu::kWarp, warp = tid / gpu::kWarp;
  // The last tiles come first: detectors end with their largest priors, which meet the most ground truths.
  const unsigned images = unsigned(sizes.images), tiles = tiles_of(sizes);
  const unsigned b = blockIdx.x % images, tile = tiles - 1 - blockIdx.x / images;
  const int32_t first = int32_t(tile) * kTile + warp * gpu::kWarp, p = first + lane, last = int32_t(sizes.priors) - 1;

  // 1. The priors of this warp, and the ground truths of this image. Lanes after the last prior repeat it: they tie
  // with it, and the lowest index wins.
  const CenterBox<C> center = gpu::load_center_box(priors, p < last ? p : last);
  const Rows rows = rows_of(offsets, b, sizes.gts);
  const Box<C> corners = to_corners(center);
  Prior<C> own{corners, area(corners)};
  const Box<C> bounds = bounds_of_warp(corners);

  // 2. The best ground truth of each prior, and the best prior of this tile for each ground truth.
  for (int32_t j0 = 0; j0 < rows.count; j0 += kGtTile) {
    const int n = rows.count - j0 < kGtTile ? rows.count - j0 : kGtTile;
    load_ground_truth(gts, gt_boxes, rows.begin + j0, n);
    __syncthreads();  // the ground truths are loaded, and the last round's bests are read
    for (int k0 = 0; k0 < n; k0 += gpu::kWarp) {
      const Best<C> best = compare(gts, k0, n, j0, first, bounds, forced, own);
      if (forced && k0 + lane < n) best_of_warps[warp][k0 + lane] = best;
    }
    __syncthreads();  // the bests of all warps are written, and the ground truths are read
    if (forced && tid < n) {
      Best<C> best = best_of_warps[0][tid];
      for (int w = 1; w < kWarps; ++w) {
        if (best_of_warps[w][tid].iou > best.iou) best = best_of_warps[w][tid];
      }
      work.tile_best[tile * sizes.gts + rows.begin + j0 + tid] = best;
    }
  }

  // 3. The thresholds decide.
  const int64_t first_row = b * sizes.priors;
  const Writer<T> write{gt_boxes, gt_labels, priors, out, rule, rows.begin, first_row};
  if (p <= last) {
    if (forced) work.owner[first_row + p] = kFree;
    if (own.iou >= C(rule.iou_threshold)) {
      write.matched(p, own.match);
    } else {
      write.unmatched(p, own.iou >= C(rule.low_threshold));
    }
  }
  if (!forced || rows.count == 0) return;

  // 4. The image's last block: ground truths claim priors until none has lost the one that it wants.
  if (!gpu::is_last_block(&work.tickets[b], tiles)) return;
  constexpr int kShared = kWarps * kGtTile;
  const Claims<C> claims{rule.force,
                         C(rule.min_force_iou),
                         rows.count,
                         sizes.gts,
                         tiles,
                         work.tile_best + rows.begin,
                         rows.count <= kShared ? best_of_warps[0] : work.wanted + rows.begin,
                         work.owner + first_row};
  claims.want_best();
  __syncthreads();  // a claim reads what its rivals want
  for (int round = 1;; ++round) {
    claims.claim();
    __syncthreads();  // all claims are settled
    if (rule.force == Force::last) break;
    bool lost = false;
#pragma unroll 1
    for (int32_t j = tid; j < rows.count; j += kThreads) lost |= claims.lost(j);
    if (!__syncthreads_or(lost)) break;
    if (round == kRounds) {
      claims.join_chains(gt_boxes + 4 * rows.begin, priors, int32_t(sizes.priors), chain_bests);
      break;
    }
    for (int32_t j = warp; j < rows.count; j += kWarps) {
      if (!claims.lost(j)) continue;  // the same for the whole warp
      const Best<C> next = claims.next_best(j, gpu::load_box(gt_boxes, rows.begin + j), priors, int32_t(sizes.priors));
      __syncwarp();  // every lane has read wanted[j] before it changes
      if (lane == 0) claims.wanted[j] = next;
    }
    __syncthreads();  // all searches are over before the next claims
  }
#pragma unroll 1
  for (int32_t j = tid; j < rows.count; j += kThreads) {
    const Best<C> won = claims.wanted[j];
    if (won.iou >= C(0) && claims.holds(j, won)) write.matched(won.prior, j);
  }
}

}  // namespace

size_t workspace_bytes(DType dtype, const Sizes& sizes, Force force) {
  return dtype == DType::f64 ? Workspace<double>(nullptr, sizes, force).bytes
                             : Workspace<float>(nullptr, sizes, force).bytes;
}

void match_cuda(DType dtype, const void* gt_boxes, const int64_t* gt_labels, const int64_t* offsets, const void* priors,
                const Outputs& out, const Sizes& sizes, const Rule& rule, void* workspace, Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Workspace<gpu::Compute<T>> work(workspace, sizes, rule.force);
    if (rule.force != Force::none) gpu::clear(work.tickets, sizes.images * sizeof(unsigned), stream);
    gpu::launch(match_kernel<T>, dim3(unsigned(tiles_of(sizes) * sizes.images)), dim3(kThreads), 0, stream,
                static_cast<const T*>(gt_boxes), gt_labels, offsets, static_cast<const T*>(priors), out, sizes, rule,
                work);
  });
}

}  // namespace ssd_ext::matching
