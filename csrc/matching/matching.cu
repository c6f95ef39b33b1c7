#include "matching/matching.h"

#include "common/gpu.h"

namespace ssd_ext::matching {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr int kGtTile = 64;    // ground truths in shared memory at a time
constexpr int32_t kFree = -1;  // the owner of a prior that no ground truth has claimed

// A ground truth's best prior so far; iou < 0: none. Aligned to be read and written in one access.
template <class C>
struct alignas(2 * sizeof(C)) Best {
  C iou;
  int32_t prior;
};

SSD_EXT_HD int64_t tiles_of(const Sizes& sizes) { return (sizes.priors + kThreads - 1) / kThreads; }

// The higher IoU, the lower prior among equals.
template <class C>
__device__ __forceinline__ Best<C> better_of(const Best<C>& a, const Best<C>& b) {
  return b.iou > a.iou || (b.iou == a.iou && b.prior < a.prior) ? b : a;
}

// The best of each aligned group of `lanes` lanes, in all of them; the whole warp must call it.
template <int lanes, class C>
__device__ __forceinline__ Best<C> best_of_lanes(Best<C> best) {
  for (int d = lanes / 2; d > 0; d /= 2) {
    best =
        better_of(best, {__shfl_xor_sync(gpu::kFullMask, best.iou, d), __shfl_xor_sync(gpu::kFullMask, best.prior, d)});
  }
  return best;
}

// Scratch memory of one call; none is needed without force. Tile t of an image covers priors
// t * kThreads .. (t + 1) * kThreads.
template <class C>
struct Workspace {
  Best<C>* tile_best;  // [tiles, G] the best prior within a tile
  Best<C>* wanted;     // [G] the prior that a ground truth claims
  int32_t* owner;      // [B, P] the ground truth of the image that holds a prior, or kFree
  size_t bytes;

  Workspace(void* base, const Sizes& sizes, Force force) {
    gpu::Scratch scratch{base};
    const int64_t forced = force == Force::none ? 0 : 1;
    tile_best = scratch.take<Best<C>>(forced * tiles_of(sizes) * sizes.gts);
    wanted = scratch.take<Best<C>>(forced * sizes.gts);
    owner = scratch.take<int32_t>(forced * sizes.images * sizes.priors);
    bytes = scratch.bytes;
  }
};

// Rows of image b, for all threads of a block to call together. From the first offset that falls or
// leaves 0 .. total on, images have no rows: so none leads out of bounds, and no two images share a row.
struct Rows {
  int64_t begin, count;
};
__device__ __forceinline__ Rows rows_of(const int64_t* __restrict__ offsets, int64_t b, int64_t total) {
  const int64_t begin = offsets[b], end = offsets[b + 1];
  bool bad = offsets[0] < 0 || end > total;
#pragma unroll 1  // unrolled, it would hold twice the registers for a loop that rarely comes round
  for (int64_t i = threadIdx.x; i <= b; i += kThreads) bad |= offsets[i + 1] < offsets[i];
  if (__syncthreads_or(bad)) return {0, 0};
  return {begin, end - begin};
}

// The bounding box of a warp's boxes. A NaN corner leaves it alone: such a box has IoU 0 with everything.
template <class C>
__device__ __forceinline__ Box<C> bounds_of_warp(const Box<C>& box, bool counts) {
  const C inf = std::numeric_limits<C>::infinity();
  Box<C> all{inf, inf, -inf, -inf};
  if (counts) all = {min_of(box.x1, inf), min_of(box.y1, inf), max_of(box.x2, -inf), max_of(box.y2, -inf)};
  for (int d = gpu::kWarp / 2; d > 0; d /= 2) {
    all = {min_of(all.x1, __shfl_xor_sync(gpu::kFullMask, all.x1, d)),
           min_of(all.y1, __shfl_xor_sync(gpu::kFullMask, all.y1, d)),
           max_of(all.x2, __shfl_xor_sync(gpu::kFullMask, all.x2, d)),
           max_of(all.y2, __shfl_xor_sync(gpu::kFullMask, all.y2, d))};
  }
  return all;
}

template <class T>
__device__ __forceinline__ void write_matched(const Outputs& out, const T* __restrict__ gt_boxes,
                                              const int64_t* __restrict__ gt_labels, const T* __restrict__ priors,
                                              const Rule& rule, int64_t row, int64_t p, const Rows& rows, int64_t j) {
  using C = gpu::Compute<T>;
  if (out.matches) {
    out.matches[row] = j;
    return;
  }
  const Box<C> b = gpu::load_box(gt_boxes, rows.begin + j);
  const CenterBox<C> c = gpu::load_prior(priors, p);
  const C center = C(rule.center), size = C(rule.size);
  out.labels[row] = gt_labels[rows.begin + j];
  gpu::store_four(static_cast<T*>(out.deltas), row, encode_center(b.x1, b.x2, c.cx, c.w, center),
                  encode_center(b.y1, b.y2, c.cy, c.h, center), encode_size(b.x1, b.x2, c.w, size),
                  encode_size(b.y1, b.y2, c.h, size));
}

// One thread a prior: its best ground truth by threshold, and each ground truth's best prior of the tile.
// A warp compares its priors only with the ground truths that overlap their bounding box; with the
// others the IoU is 0.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    threshold_kernel(const T* __restrict__ gt_boxes,         // [G, 4]
                     const int64_t* __restrict__ gt_labels,  // [G] or nullptr
                     const int64_t* __restrict__ offsets,    // [B + 1]
                     const T* __restrict__ priors,           // [P, 4]
                     Outputs out, Sizes sizes, Rule rule, Workspace<gpu::Compute<T>> work) {
  using C = gpu::Compute<T>;
  __shared__ Box<C> s_box[kGtTile];
  __shared__ C s_area[kGtTile];  // -1: not a valid box
  __shared__ Best<C> s_best[kWarps][kGtTile];
  const bool forced = rule.force != Force::none;
  const int tid = threadIdx.x, lane = tid % gpu::kWarp, warp = tid / gpu::kWarp;
  const int64_t tiles = tiles_of(sizes), b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t p = tile * kThreads + tid, row = b * sizes.priors + p;
  const int64_t first = p - lane;  // of the warp's priors
  const bool inside = p < sizes.priors;
  const Rows rows = rows_of(offsets, b, sizes.gts);
  const CenterBox<C> none{C(0), C(0), C(0), C(0)};  // IoU 0 with everything, as the last of its warp: never the best
  const Box<C> prior = to_corners(inside ? gpu::load_prior(priors, p) : none);
  const C prior_area = area(prior);
  const Box<C> bounds = bounds_of_warp(prior, inside);

  C best = C(-1);
  int64_t match = kBackground;
  for (int64_t j0 = 0; j0 < rows.count; j0 += kGtTile) {
    const int n = int(rows.count - j0 < kGtTile ? rows.count - j0 : kGtTile);
    if (tid < n) {
      const Box<C> box = gpu::load_box(gt_boxes, rows.begin + j0 + tid);
      s_box[tid] = box;
      s_area[tid] = is_valid(box) ? area(box) : C(-1);
    }
    __syncthreads();  // the tile is loaded before anybody reads it, and the last round's bests are read
    for (int k0 = 0; k0 < n; k0 += gpu::kWarp) {
      const int mine = k0 + lane;  // the ground truth that this lane keeps the books of
      bool valid = false, near = false;
      if (mine < n && s_area[mine] > C(0)) {
        const Box<C> box = s_box[mine];
        valid = true;
        near = box.x1 < bounds.x2 && box.x2 > bounds.x1 && box.y1 < bounds.y2 && box.y2 > bounds.y1;
      }
      const unsigned all_valid = __ballot_sync(gpu::kFullMask, valid);
      if (best < C(0) && all_valid) {
        best = C(0);
        match = j0 + k0 + __ffs(int(all_valid)) - 1;
      }
      Best<C> top{valid && first < sizes.priors ? C(0) : C(-1), int32_t(first)};
      for (unsigned left = __ballot_sync(gpu::kFullMask, near); left; left &= left - 1) {
        const int bit = __ffs(int(left)) - 1, j = k0 + bit;
        const C value = iou_from(intersection(s_box[j], prior), s_area[j], prior_area);
        if (value > best) {
          best = value;
          match = j0 + j;
        }
        if (!forced) continue;
        C most = value;
        for (int d = gpu::kWarp / 2; d > 0; d /= 2) most = max_of(most, __shfl_xor_sync(gpu::kFullMask, most, d));
        const unsigned holders = __ballot_sync(gpu::kFullMask, value == most);
        if (lane == bit) top = {most, int32_t(first) + __ffs(int(holders)) - 1};  // the lowest prior of equals
      }
      if (forced && mine < n) s_best[warp][mine] = top;
    }
    __syncthreads();  // all warps' bests are in, and the tile is read
    if (forced && tid < n) {
      Best<C> of_tile = s_best[0][tid];
      for (int w = 1; w < kWarps; ++w) {
        if (s_best[w][tid].iou > of_tile.iou) of_tile = s_best[w][tid];
      }
      work.tile_best[tile * sizes.gts + rows.begin + j0 + tid] = of_tile;
    }
  }
  if (!inside) return;
  if (forced) work.owner[row] = kFree;
  if (best >= C(rule.iou_threshold)) {
    write_matched(out, gt_boxes, gt_labels, priors, rule, row, p, rows, match);
    return;
  }
  const bool ignored = best >= C(rule.low_threshold);
  if (out.matches) {
    out.matches[row] = ignored ? kIgnore : kBackground;
  } else {
    out.labels[row] = ignored ? -1 : 0;
    gpu::store_four(static_cast<T*>(out.deltas), row, C(0), C(0), C(0), C(0));
  }
}

// Does ground truth j, whose IoU with a prior is `iou`, take it from its owner?
template <class C>
__device__ __forceinline__ bool takes(Force force, C iou, int32_t j, C owner_iou, int32_t owner) {
  if (force == Force::last) return j > owner;
  return iou > owner_iou || (iou == owner_iou && j < owner);
}

// One block an image: ground truths claim priors, over what threshold_kernel has written.
//
// Under `bipartite`, ground truths that lose the prior they want claim the next best that they can take,
// all of them at once, until nobody loses. Pairs are ranked in one order (IoU, prior, ground truth) that
// both sides follow, so this deferred acceptance (Gale and Shapley, 1962) ends in its one stable outcome:
// what joining the best pair of all, then the best of the rest, and so on would give.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    force_kernel(const T* __restrict__ gt_boxes,         // [G, 4]
                 const int64_t* __restrict__ gt_labels,  // [G] or nullptr
                 const int64_t* __restrict__ offsets,    // [B + 1]
                 const T* __restrict__ priors,           // [P, 4]
                 Outputs out, Sizes sizes, Rule rule, Workspace<gpu::Compute<T>> work) {
  using C = gpu::Compute<T>;
  const int tid = threadIdx.x, lane = tid % gpu::kWarp, warp = tid / gpu::kWarp;
  const int64_t b = blockIdx.x, tiles = tiles_of(sizes);
  const Rows rows = rows_of(offsets, b, sizes.gts);
  const int32_t count = int32_t(rows.count);
  const Best<C>* tile_best = work.tile_best + rows.begin;  // [tiles, count], rows sizes.gts apart
  Best<C>* wanted = work.wanted + rows.begin;              // [count]
  int32_t* owner = work.owner + b * sizes.priors;          // [P]

  constexpr int kParts = 8;  // lanes that share the tiles of a ground truth
  for (int32_t j0 = 0; j0 < count; j0 += kThreads / kParts) {
    const int32_t j = j0 + tid / kParts;
    Best<C> top{C(-1), 0};
    for (int64_t t = tid % kParts; j < count && t < tiles; t += kParts) {
      const Best<C> other = tile_best[t * sizes.gts + j];
      if (other.iou > top.iou) top = other;
    }
    top = best_of_lanes<kParts>(top);
    if (j < count && tid % kParts == 0) wanted[j] = top;
  }
  __syncthreads();  // a claim reads what its rivals want

  for (;;) {
    for (int32_t j = tid; j < count; j += kThreads) {
      const Best<C> mine = wanted[j];
      if (mine.iou < C(0)) continue;
      int32_t seen = kFree, held;
      while ((held = atomicCAS(&owner[mine.prior], seen, j)) != seen &&
             takes(rule.force, mine.iou, j, wanted[held].iou, held)) {
        seen = held;
      }
    }
    __syncthreads();  // all claims are settled
    if (rule.force == Force::last) break;
    bool lost = false;
    for (int32_t j = tid; j < count; j += kThreads) {
      lost |= wanted[j].iou >= C(0) && owner[wanted[j].prior] != j;
    }
    if (!__syncthreads_or(lost)) break;

    // A warp for each loser. A tile's best prior stands for its tile; if it cannot be taken, the tile is searched.
    for (int32_t j = warp; j < count; j += kWarps) {
      if (wanted[j].iou < C(0) || owner[wanted[j].prior] == j) continue;  // the same for the whole warp
      Best<C> found{C(-1), 0};
      const auto offer = [&](C value, int32_t q) {
        const int32_t held = owner[q];
        if (held != kFree && !takes(rule.force, value, j, wanted[held].iou, held)) return false;
        found = better_of(found, {value, q});
        return true;
      };
      const Box<C> box = gpu::load_box(gt_boxes, rows.begin + j);
      for (int64_t t0 = 0; t0 < tiles; t0 += gpu::kWarp) {
        const int64_t t = t0 + lane;
        bool refused = false;
        if (t < tiles) {
          const Best<C> of_tile = tile_best[t * sizes.gts + j];
          refused = !offer(of_tile.iou, of_tile.prior);
        }
        for (unsigned left = __ballot_sync(gpu::kFullMask, refused); left; left &= left - 1) {
          const int64_t begin = (t0 + __ffs(int(left)) - 1) * kThreads;
          for (int64_t q = begin + lane; q < begin + kThreads && q < sizes.priors; q += gpu::kWarp) {
            offer(iou(box, to_corners(gpu::load_prior(priors, q))), int32_t(q));
          }
        }
      }
      found = best_of_lanes<gpu::kWarp>(found);
      __syncwarp();  // every lane has read wanted[j] before it changes
      if (lane == 0) wanted[j] = found;
    }
    __syncthreads();  // all searches are over before the next claims
  }

  for (int32_t j = tid; j < count; j += kThreads) {
    const Best<C> mine = wanted[j];
    if (mine.iou >= C(0) && owner[mine.prior] == j) {
      write_matched(out, gt_boxes, gt_labels, priors, rule, b * sizes.priors + mine.prior, mine.prior, rows, j);
    }
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
    const T *boxes = static_cast<const T*>(gt_boxes), *prior_rows = static_cast<const T*>(priors);
    gpu::launch(threshold_kernel<T>, dim3(unsigned(tiles_of(sizes) * sizes.images)), dim3(kThreads), 0, stream, boxes,
                gt_labels, offsets, prior_rows, out, sizes, rule, work);
    if (rule.force == Force::none || sizes.gts == 0) return;
    gpu::launch(force_kernel<T>, dim3(unsigned(sizes.images)), dim3(kThreads), 0, stream, boxes, gt_labels, offsets,
                prior_rows, out, sizes, rule, work);
  });
}

}  // namespace ssd_ext::matching
