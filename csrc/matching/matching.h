#pragma once
// Matching priors with ground truth, and the training targets that follow from it.
//
// Ground truth of all images lies in one array; image b owns rows offsets[b] .. offsets[b + 1]. Rows from offsets[B]
// on are padding.
//   matches[b, p] = j >= 0: prior p of image b is matched with the image's j-th ground truth;
//   kBackground: its best IoU is below the low threshold; kIgnore: between the two thresholds.
// A prior takes the ground truth of highest IoU (the lowest index among equals). Then, by Force, each
// ground truth claims a prior for itself, where their IoU is above a minimum. A ground truth that
// is_valid() refuses takes no part.
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace ssd_ext::matching {

constexpr int64_t kBackground = -1;
constexpr int64_t kIgnore = -2;

enum class Force : int64_t {
  none,
  last,       // each ground truth claims its best prior; of two that claim one, the last has it
  bipartite,  // the best pair of all is joined first, then the best of what is left, and so on;
              // equal pairs by lowest prior, then by lowest ground truth
};

struct Rule {
  double iou_threshold;  // positive at >=
  double low_threshold;  // ignored from here up to iou_threshold; equal to it: nothing is ignored
  Force force;
  double min_force_iou;  // claims are made above; -1: at any IoU
  double center, size;   // variances of the encoding
};

struct Sizes {
  int64_t images;
  int64_t priors;
  int64_t gts;  // of all images
};

// Outputs; either matches, or labels and deltas.
struct Outputs {
  int64_t* matches;  // [B, P]
  int64_t* labels;   // [B, P] label of the matched ground truth, 0: background, -1: ignored
  void* deltas;      // [B, P, 4] encoded ground truth, 0 where not matched
};

size_t workspace_bytes(DType dtype, const Sizes& sizes, Force force);  // 0 without force

void match_cuda(DType dtype, const void* gt_boxes,  // [G, 4] corners
                const int64_t* gt_labels,           // [G], or nullptr when only matches are wanted
                const int64_t* offsets,             // [B + 1]; none is matched from a bad one on (see rows_of)
                const void* priors,                 // [P, 4] centre and size
                const Outputs& out, const Sizes& sizes, const Rule& rule, void* workspace, Stream stream);

}  // namespace ssd_ext::matching
