#pragma once
// Non-maximum suppression, of one set of boxes or class by class.
//
// Boxes are visited by falling score, the lowest index first among equals. A box is kept unless a
// box kept before it, of the same class, has IoU > iou_threshold with it.
//   keep[k] = j: box j is the k-th kept one; keep[k] = -1 for k >= count.
// A box whose score is NaN is never kept. A box with a NaN or infinite coordinate overlaps nothing.
#include <cstddef>

#include "common/dtype.h"

namespace ssd_ext::nms {

// Bytes of scratch memory that nms_cuda needs: linear in n.
size_t workspace_bytes(DType dtype, int64_t n, bool has_classes);

void nms_cuda(DType dtype, const void* boxes,   // [n, 4] corners
              const void* scores,               // [n]
              const int64_t* class_ids,         // [n] or nullptr: all of one class
              int64_t n, double iou_threshold,  // in [0, 1]
              void* workspace,                  // aligned to 16 bytes
              int64_t* keep,                    // [n]
              int64_t* count,                   // []
              Stream stream);

}  // namespace ssd_ext::nms
