// Whether one box overlaps any of a vector of boxes. Included by for_each_simd_level.h.

template <class T>
struct OverlapQuery {
  Box<Vec<T>> box;
  Vec<T> area, share;
};

template <class T>
class OverlapTest {
 public:
  explicit OverlapTest(T threshold) : threshold_(threshold), shares_(threshold) {}

  T share_of(const Box<T>& b) const { return shares_.of(b); }

  OverlapQuery<T> query(const Box<T>& one) const {
    using V = Vec<T>;
    return {broadcast(one), splat<V>(area(one)), splat<V>(shares_.of_query(one))};
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
  T threshold_;
  OverlapShares<T> shares_;
};
