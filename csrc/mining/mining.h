#pragma once
// hard_negatives: which negatives of an image count in the loss.
//
// labels[b, p] says what prior p of image b is: positive (> 0), negative (0) or ignored (< 0).
//   mask[b, p] = true: p is one of the k negatives of image b with the largest loss,
//   k = min(max(floor(ratio * positives), min_negatives), negatives).
// The lowest prior wins a tie. A NaN loss is larger than any other and ties with every other NaN.
#include "common/dtype.h"
#include "common/macros.h"

namespace ssd_ext::mining {

struct Mining {
  int64_t batch;
  int64_t num_priors;
  double ratio;           // finite, >= 0
  int64_t min_negatives;  // >= 0
};

// k above. The product is compared before it is converted: it may be beyond every integer.
SSD_EXT_HD int64_t negatives_to_mark(int64_t positives, int64_t negatives, const Mining& mining) {
  const double asked = mining.ratio * double(positives);
  const int64_t by_ratio = asked < double(negatives) ? int64_t(asked) : negatives;
  const int64_t least = mining.min_negatives < negatives ? mining.min_negatives : negatives;
  return by_ratio > least ? by_ratio : least;
}

void hard_negatives_cuda(DType dtype, const void* loss,  // [batch, num_priors]
                         const int64_t* labels,          // [batch, num_priors]
                         bool* mask,                     // [batch, num_priors]
                         const Mining& mining, Stream stream);

}  // namespace ssd_ext::mining
