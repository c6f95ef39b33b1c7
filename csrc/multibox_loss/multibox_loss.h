#pragma once
// multibox_loss: cross-entropy of positives and mined negatives, smooth L1 of positives.
//
// y = labels[b, p] says what prior p of image b is: of class y (> 0), background (0) or ignored (< 0).
// With its logits x, its loss is log(1 + sum), sum = sum over c != y of exp(x[c] - x[y]). One order of
// summation on every backend, so that all select the same negatives to the bit: foreground class c goes to
// partial sum (c - 1) % kWays, in rising order; the partial sums l and l + 8 are added, then l and l + 4,
// l + 2, l + 1; class 0 comes last (where y is not 0 itself).
//
// ranks[b, p] is an integer of the width of x, in the order of the losses; negatives are mined by it:
//   sum <= 2^64, x[y] finite   bits(sum) - bits(inf) < 0, finer than the loss, which rounds to 0 for easy negatives
//   else                         bits(loss) >= 0, with the loss taken from the greatest logit
//   loss is NaN                  the greatest integer
// Once mined, ranks of priors that are neither positive nor mined become the least integer: what remains
// is all that the backward needs beside its inputs.
//
// An image's losses are summed in double: prior p in partial sum p % kSums, and those as told at OrderedSum.
#include <cstddef>

#include "common/dtype.h"
#include "mining/mining.h"

namespace ssd_ext::multibox_loss {

constexpr int kWays = 16;
constexpr int kSums = 1024;

struct Strides {  // in elements
  int64_t image, prior, last;
};

// A [batch, num_priors, n] tensor of any dtype and stride.
struct Rows {
  const void* data;
  DType dtype;
  Strides strides;
};

struct Loss {
  mining::Mining mining;
  int64_t classes;
  double alpha;    // weight of loc
  double beta;     // where smooth L1 passes from square to line
  bool per_image;  // each image is divided by its own positives, and the sum by the images
};

// Priors that count: of an image, or of all of them.
struct Counts {
  int64_t positives, negatives;
};

// What the terms of an image are divided by: the positives, or the negatives where there are none, so that their sum
// does not grow with min_negatives. In `all` negatives are counted only if there are no positives.
SSD_EXT_HD int64_t divisor_of(const Counts& image, const Counts& all, const Loss& loss) {
  const int64_t positives = loss.per_image ? image.positives : all.positives;
  const int64_t n = positives > 0 ? positives : loss.per_image ? image.negatives : all.negatives;
  return (n > 1 ? n : 1) * (loss.per_image ? loss.mining.batch : 1);
}

size_t workspace_bytes(const Loss& loss);

// Outputs are contiguous, but for gradients. Labels are not checked: one that is no class makes the rank, the
// loss and the gradient of its prior NaN.
void multibox_loss_cuda(const Rows& logits,     // [B, P, C]
                        const Rows& deltas,     // [B, P, 4]
                        const Rows& targets,    // [B, P, 4]
                        const int64_t* labels,  // [B, P]
                        const Loss& loss,       //
                        void* loc, void* conf,  // scalars; float64 where deltas, logits are, else float32
                        void* ranks,            // [B, P], int64 where logits are float64, else int32
                        int64_t* divisors,      // [B]
                        void* workspace,        // aligned to 16 bytes
                        Stream stream);

void logits_gradient_cuda(const void* grad_conf,    // scalar, of the type of conf
                          const Rows& logits,       // [B, P, C]
                          const int64_t* labels,    // [B, P]
                          const void* ranks,        // [B, P]
                          const int64_t* divisors,  // [B]
                          const Loss& loss,         //
                          void* gradient,           // [B, P, C], of the type of logits
                          const Strides& strides,   // of it
                          Stream stream);

void deltas_gradient_cuda(const void* grad_loc,     // scalar, of the type of loc
                          const Rows& deltas,       // [B, P, 4]
                          const Rows& targets,      // [B, P, 4]
                          const int64_t* labels,    // [B, P]
                          const int64_t* divisors,  // [B]
                          const Loss& loss,         //
                          void* gradient,           // [B, P, 4], of the type of deltas
                          const Strides& strides,   // of it
                          Stream stream);

}  // namespace ssd_ext::multibox_loss
