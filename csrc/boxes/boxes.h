#pragma once
// encode, decode, box_iou.
//
// Row r of boxes and deltas belongs to prior r % num_priors: leading dimensions are flattened.
//   deltas[r] = ((gx - cx) / (w * center), (gy - cy) / (h * center), log(gw / w) / size, log(gh / h) / size)
// with (gx, gy, gw, gh) the centre and size of boxes[r], (cx, cy, w, h) the prior, and (center, size)
// the variances. decode is the inverse; it bounds delta * size by `clip` before the exponential.
//
// Rows are read in their own type; priors and what is written are of the type `to`, that of the rows or a wider one.
#include "common/dtype.h"

namespace ssd_ext::boxes {

struct Coding {
  int64_t rows;
  int64_t num_priors;
  double center;  // variance of the centre
  double size;    // variance of width and height
  double clip;    // decode only
};

void encode_cuda(DType from, const void* boxes,  // [rows, 4] corners
                 DType to, const void* priors,   // [num_priors, 4] centre and size
                 void* deltas,                   // [rows, 4]
                 const Coding& coding, Stream stream);

void decode_cuda(DType from, const void* deltas,  // [rows, 4]
                 DType to, const void* priors,    // [num_priors, 4]
                 void* boxes,                     // [rows, 4]
                 const Coding& coding, Stream stream);

void box_iou_cuda(DType dtype, const void* a,  // [n, 4]
                  const void* b,               // [m, 4]
                  void* out,                   // [n, m]
                  int64_t n, int64_t m, Stream stream);

}  // namespace ssd_ext::boxes
