#pragma once
// detect: logits and deltas of a batch of images to padded detections.
//
//   score(b, p, c)  of prior p for class c in image b: softmax over the row's classes, or sigmoid.
//   candidate       (p, c) with score > score_threshold; with softmax, c > 0 (class 0 is background).
//   order           of candidates: falling score, then rising class, then rising prior.
// Of each class the first topk_per_class candidates are visited, all classes in one order. A candidate
// is kept unless its box has IoU > iou_threshold with a box kept before it, of the same class (or of
// any, if class_agnostic). The first max_detections kept ones are the result:
//   boxes[b, k], scores[b, k], labels[b, k] = label_of(c): the k-th kept candidate, for k < counts[b];
//   0, 0 and -1 for the others.
// A NaN score is no candidate. A box with a NaN or infinite coordinate overlaps nothing.
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "common/box.h"
#include "common/dtype.h"

namespace ssd_ext::detect {

struct Params {
  double score_threshold, iou_threshold;  // in [0, 1]
  int64_t topk_per_class, max_detections;
  bool sigmoid, class_agnostic;
  double center, size, clip;  // variances, and the bound of decoded sizes
  Box<double> window;         // boxes are clipped to it; infinite: they are not
  Box<double> inner_window;   // the part of it between numbers of the outputs' type: rounding never leaves it
};

// Labels count from 1, as 0 is background: with sigmoid, which has no column for that, column c is label c + 1.
SSD_EXT_HD int64_t label_of(int64_t column, const Params& params) { return params.sigmoid ? column + 1 : column; }

struct Sizes {
  int64_t images, priors, classes;  // classes: columns of the logits
};

// A tensor as it lies in memory: strides count elements.
struct Strided {
  const void* data;
  DType dtype;
  int64_t image, row, column;
};

struct Inputs {
  DType dtype;     // of boxes and scores, to which those below promote; computed in float64 if it is that, else float32
  Strided logits;  // [images, priors, classes]
  Strided deltas;  // [images, priors, 4]
  Strided priors;  // [priors, 4] centre and size
  Sizes sizes;
  Params params;
};

template <class T>
struct Outputs {    // K = max_detections
  T* boxes;         // [images, K, 4]
  T* scores;        // [images, K]
  int64_t* labels;  // [images, K]
  int64_t* counts;  // [images]
};

// priors * classes: a candidate's number has 32 bits, a label 31, and kernels step beyond the end.
constexpr int64_t kMostCandidates = 0x7fffffff - 4096;

// Softmax divides exp(x - max) by its sum over the classes, which every backend adds in this order: the
// classes c, c + kSumLanes, c + 2 * kSumLanes ... one after another, for each c < kSumLanes; then these
// sums by halves, lane l and lane l + 8, 4, 2, 1.
constexpr int kSumLanes = 16;
inline int64_t padded(int64_t classes) { return (classes + kSumLanes - 1) / kSumLanes * kSumLanes; }

// A candidate as one integer, the greater the earlier: its score, then its number class * P + prior
// inverted. Scores are positive, so that their bits have their order. No candidate has key 0.
template <class T>
using Key = std::conditional_t<sizeof(T) == 8, unsigned __int128, uint64_t>;

template <class T>
SSD_EXT_HD Key<T> make_key(T score, uint32_t number) {
  return Key<T>(std::make_unsigned_t<IntOf<T>>(bit_cast<IntOf<T>>(score))) << 32 | uint32_t(~number);
}
template <class T>
SSD_EXT_HD T score_of(Key<T> key) {
  return bit_cast<T>(IntOf<T>(key >> 32));
}
template <class T>
SSD_EXT_HD uint32_t number_of(Key<T> key) {
  return ~uint32_t(key);
}

// Whatever its row holds, a class whose logit is below this bound has a score below `least`: with
// softmax the logit less that of background, unless the row holds a NaN and no score at all. (Where all
// logits differ from background's by less than the bound, which is negative, background is the
// greatest: its term is exactly 1, the sum at least that, and the score at most exp of the difference.)
// The slack covers the rounding of exp, sum, quotient and of the bound itself.
template <class T>
T reject_below(T least, bool is_sigmoid) {
  const double score = double(least) * (1 - 1e-6);
  if (score < 1e-36) return -std::numeric_limits<T>::infinity();
  return T((is_sigmoid ? std::log(score / (1 - score)) : std::log(score)) - 1e-5);
}

constexpr int64_t kMostBlocksCuda = 0x7fffffff;  // of one launch
constexpr int64_t kMostPartsCuda = 8;            // blocks for each image of a launch, where there are many images

// Bytes of scratch memory that detect_cuda needs: detect's docstring tells what for.
size_t workspace_bytes(const Inputs& in);

void detect_cuda(const Inputs& in, const Outputs<void>& out,  // boxes and scores of in.dtype
                 void* workspace,                             // aligned to 16 bytes
                 Stream stream);

}  // namespace ssd_ext::detect
