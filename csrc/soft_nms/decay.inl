// The factor of a box of that IoU with the taken one: in [0, 1], and 1 for boxes that do not meet.
// Included by soft_nms.h and, once per SIMD level, by soft_nms.simd.h.
template <class V>
SSD_EXT_HD V decay(V iou, bool linear, ScalarOf<V> iou_threshold, ScalarOf<V> sigma) {
  const V one = splat<V>(1);
  if (linear) return iou > splat<V>(iou_threshold) ? one - iou : one;
  return iou > splat<V>(0) ? exp(-(iou * iou) / sigma) : one;
}
