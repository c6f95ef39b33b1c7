#pragma once
// Soft-NMS (Bodla et al. 2017): instead of being removed, overlapping boxes lose score.
//
// keep[k] = j: box j is the k-th taken, with the score out_scores[k] that it had by then; -1 and 0
// for k >= count. Each step takes the box of highest score, the lowest index among equals, if that
// score is > score_threshold, and multiplies the score of every other box by decay() of its IoU
// with the taken one. A NaN score is never taken.
#include <cstddef>

#include "common/box.h"
#include "common/dtype.h"

namespace ssd_ext::soft_nms {

enum class Method : int64_t { linear = 0, gaussian = 1 };

struct Params {
  Method method;
  double iou_threshold;    // linear only; in [0, 1]
  double sigma;            // Gaussian only; positive
  double score_threshold;  // not NaN
};

#include "soft_nms/decay.inl"

// A box stays a candidate while its score is greater than this. Scores never rise, unless they are
// negative: with a negative threshold any number may still come to be taken.
template <class T>
SSD_EXT_HD T floor_of(const Params& p) {
  return p.score_threshold < 0 ? -std::numeric_limits<T>::infinity() : T(p.score_threshold);
}

// Bytes of scratch memory that soft_nms_cuda needs.
size_t workspace_bytes(DType dtype, int64_t n);

void soft_nms_cuda(DType dtype, const void* boxes,  // [n, 4] corners
                   const void* scores,              // [n]
                   int64_t n, const Params& params,
                   void* workspace,   // aligned to 16 bytes
                   int64_t* keep,     // [n]
                   void* out_scores,  // [n]
                   int64_t* count,    // []
                   Stream stream);

}  // namespace ssd_ext::soft_nms
