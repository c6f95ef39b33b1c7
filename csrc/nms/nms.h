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

// Integers whose falling order is the order of visiting: int64 for float64 scores, int32 for the
// other dtypes. NaN becomes the least integer; -0 and 0 become equal.
void sort_keys_cuda(DType dtype, const void* scores,  // [n]
                    void* keys,                       // [n] int32 or int64
                    int64_t n, Stream stream);

// Bytes of scratch memory that nms_cuda needs: linear in n.
size_t workspace_bytes(DType dtype, int64_t n);

void nms_cuda(DType dtype, const void* boxes,   // [n, 4] corners
              const int64_t* class_ids,         // [n] or nullptr: all of one class
              const void* sorted_keys,          // [n] keys in falling order
              const int64_t* order,             // [n] order[i] = j: box j is visited i-th
              int64_t n, double iou_threshold,  // in [0, 1]
              void* workspace,                  // aligned to 16 bytes
              int64_t* keep,                    // [n]
              int64_t* count,                   // []
              Stream stream);

}  // namespace ssd_ext::nms
