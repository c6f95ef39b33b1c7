// Whether one box overlaps any of a vector of boxes. Included by for_each_simd_level.h.
//
// IoU > t exactly where inter > c * (area_a + area_b), c = t / (1 + t), but for rounding. The test by
// product, with c lowered a little, needs no division and lets every true case through; what passes
// is decided by the quotient. A box's share is its part of that sum, c * area.

template <class T>
struct OverlapQuery {
  Box<Vec<T>> box;
  Vec<T> area, share;
};

template <class T>
class OverlapTest {
 public:
  explicit OverlapTest(T threshold) : threshold_(threshold) {
    const T c = threshold / (T(1) + threshold) * T(1 - 1e-5);
    likely_ = c < T(1e-6) ? T(0) : c;  // so that no product is lost among the denormals
  }

  T share_of(const Box<T>& b) const { return likely_ * area(b); }

  OverlapQuery<T> query(const Box<T>& one) const {
    using V = Vec<T>;
    const T one_area = area(one);
    // Next to denormal areas products round too coarsely: then every quotient is taken.
    const T share = one_area < T(1e-30) ? -std::numeric_limits<T>::infinity() : likely_ * one_area;
    return {broadcast(one), splat<V>(one_area), splat<V>(share)};
  }

  // Whether the query's box has IoU > threshold with one of these boxes.
  bool any(const Box<Vec<T>>& boxes, Vec<T> areas, Vec<T> shares, const OverlapQuery<T>& query) const {
    using V = Vec<T>;
    const V w = min_of(boxes.x2, query.box.x2) - max_of(boxes.x1, query.box.x1);
    const V h = min_of(boxes.y2, query.box.y2) - max_of(boxes.y1, query.box.y1);
    if (!greater_bits(max_of(w, V{}) * h, query.share + shares)) return false;
    const V exact = iou_from(intersection(boxes, query.box), areas, query.area);
    return greater_bits(exact, splat<V>(threshold_)) != 0;
  }

 private:
  T threshold_, likely_;
};
