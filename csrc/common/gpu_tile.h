#pragma once
// Overlaps of boxes, and NMS within a tile of boxes, as bits.
#include "common/gpu.h"

namespace ssd_ext::gpu {

using Word = unsigned long long;  // bit i belongs to box i of a tile

constexpr int kTile = 64;
static_assert(kTile == 2 * kWarp);

// Lane l tells of boxes l and l + 32.
__device__ __forceinline__ Word ballot_tile(bool low, bool high) {
  const Word bits = __ballot_sync(kFullMask, low);
  return bits | Word(__ballot_sync(kFullMask, high)) << kWarp;
}

// Which of a warp's boxes are kept, one a lane: box i is kept if it is alive and no earlier box that it overlaps is
// kept. Each lane has the earlier boxes that its own overlaps. Starting from all alive ones and applying the rule to
// all boxes at once, box i is right after at most i + 1 rounds, and what a round leaves unchanged is the answer:
// seldom more than a few rounds.
__device__ __forceinline__ unsigned kept_of_warp(unsigned alive, unsigned earlier) {
  unsigned now = alive, last;
  do {
    last = now;
    now = alive & __ballot_sync(kFullMask, !(earlier & last));
  } while (now != last);
  return now;
}

// IoU > threshold, for a threshold >= 0: most boxes do not meet, which is told without a division.
template <class C>
__device__ __forceinline__ bool overlaps(const Box<C>& a, const Box<C>& b, C threshold) {
  const C inter = intersection(a, b);
  return inter > C(0) && iou_from(inter, area(a), area(b)) > threshold;
}

// One instruction each, unlike min_of and max_of: of a number and a NaN, the number.
__device__ __forceinline__ float least_of(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double least_of(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ float greatest_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double greatest_of(double a, double b) { return fmax(a, b); }

// The intersection, or some number where a coordinate is NaN, which makes the area NaN, too, and comparisons with it
// false.
template <class C>
__device__ __forceinline__ C rough_intersection(const Box<C>& a, const Box<C>& b) {
  const C w = least_of(a.x2, b.x2) - greatest_of(a.x1, b.x1);
  const C h = least_of(a.y2, b.y2) - greatest_of(a.y1, b.y1);
  return greatest_of(w, C(0)) * h;
}

}  // namespace ssd_ext::gpu
