// Box arithmetic, one function for every backend. V is float, double, or a vector of either: lane i
// of each argument belongs to box i. Included by box.h and for_each_simd_level.h.

template <class V>
struct Box {  // corners, x1 <= x2 and y1 <= y2 in a proper box
  V x1, y1, x2, y2;
};

template <class V>
SSD_EXT_HD V area(const Box<V>& b) {
  return (b.x2 - b.x1) * (b.y2 - b.y1);
}

template <class V>
SSD_EXT_HD V intersection(const Box<V>& a, const Box<V>& b) {
  const V zero = splat<V>(0);
  const V w = min_of(a.x2, b.x2) - max_of(a.x1, b.x1);
  const V h = min_of(a.y2, b.y2) - max_of(a.y1, b.y1);
  return max_of(w, zero) * max_of(h, zero);
}

// 0 where the union is not a positive number: a box with a NaN or infinite coordinate, or two
// boxes without area, overlap nothing.
template <class V>
SSD_EXT_HD V iou_from(V inter, V area_a, V area_b) {
  const V zero = splat<V>(0);
  const V total = area_a + area_b - inter;
  return total > zero ? inter / total : zero;
}

template <class V>
SSD_EXT_HD V iou(const Box<V>& a, const Box<V>& b) {
  return iou_from(intersection(a, b), area(a), area(b));
}

// False only where the intersection is empty, so that the IoU is 0; false for a NaN coordinate.
template <class V>
SSD_EXT_HD auto may_meet(const Box<V>& a, const Box<V>& b) {
  return (a.x1 < b.x2) & (a.x2 > b.x1) & (a.y1 < b.y2) & (a.y2 > b.y1);
}

// Tells without a division which boxes may have IoU > threshold. That is so exactly where the intersection exceeds
// c * (area_a + area_b), c = t / (1 + t), but for rounding: so c is lowered a little, which lets every true case
// through, and the quotient decides on what passes. The share of a box is its part of that sum, c * area.
template <class T>
struct OverlapShares {
  static constexpr T kTiny = T(1e-30);  // areas below which products may be denormal numbers, and round too coarsely
  static constexpr T kHuge = T(1e31);   // above this, the sum of two areas may be infinite, and their IoU 0
  T likely;

  SSD_EXT_HD explicit OverlapShares(T threshold) {
    const T c = threshold / (T(1) + threshold) * T(1 - 1e-5);
    likely = c < T(1e-6) ? T(0) : c;  // so that no product is lost among the denormals
  }

  SSD_EXT_HD T of(const Box<T>& b) const { return likely * area(b); }
  // Of one of the two boxes. If its area is tiny or huge, every quotient is taken. Otherwise the sum of areas is only
  // infinite if the other box is huge, whose share, a millionth of its area or more, then exceeds any intersection.
  SSD_EXT_HD T of_query(const Box<T>& b) const {
    const T share = of(b), size = area(b);
    return size < kTiny || size > kHuge ? -std::numeric_limits<T>::infinity() : share;
  }
};

// A ground-truth box that may be matched: finite coordinates and a positive, finite area.
template <class T>
SSD_EXT_HD bool is_valid(const Box<T>& b) {
  const T a = area(b);
  return (b.x2 > b.x1) & (b.y2 > b.y1) & (a > T(0)) & (a <= std::numeric_limits<T>::max());  // without branches
}

// A prior: centre and size.
template <class V>
struct CenterBox {
  V cx, cy, w, h;
};

template <class V>
SSD_EXT_HD Box<V> to_corners(const CenterBox<V>& p) {
  return {p.cx - p.w * ScalarOf<V>(0.5), p.cy - p.h * ScalarOf<V>(0.5), p.cx + p.w * ScalarOf<V>(0.5),
          p.cy + p.h * ScalarOf<V>(0.5)};
}

// The two halves of the SSD box coding (Liu et al. 2016, eq. 2), one axis at a time.
template <class V>
SSD_EXT_HD V encode_center(V low, V high, V center, V size, ScalarOf<V> variance) {
  return ((low + high) * ScalarOf<V>(0.5) - center) / (size * variance);
}
template <class V>
SSD_EXT_HD V encode_size(V low, V high, V size, ScalarOf<V> variance) {
  return log((high - low) / size) / variance;
}
template <class V>
SSD_EXT_HD CenterBox<V> encode_box(const Box<V>& box, const CenterBox<V>& prior, ScalarOf<V> center, ScalarOf<V> size) {
  return {encode_center(box.x1, box.x2, prior.cx, prior.w, center),
          encode_center(box.y1, box.y2, prior.cy, prior.h, center), encode_size(box.x1, box.x2, prior.w, size),
          encode_size(box.y1, box.y2, prior.h, size)};
}
template <class V>
SSD_EXT_HD V decode_center(V delta, V center, V size, ScalarOf<V> variance) {
  return center + delta * variance * size;
}
// A NaN delta stays NaN.
template <class V>
SSD_EXT_HD V decode_size(V delta, V size, ScalarOf<V> variance, ScalarOf<V> clip) {
  const V d = delta * variance, top = splat<V>(clip);
  return exp(d > top ? top : d) * size;
}
template <class V>
SSD_EXT_HD Box<V> decode_box(const CenterBox<V>& delta, const CenterBox<V>& prior, ScalarOf<V> center, ScalarOf<V> size,
                             ScalarOf<V> clip) {
  return to_corners(CenterBox<V>{decode_center(delta.cx, prior.cx, prior.w, center),
                                 decode_center(delta.cy, prior.cy, prior.h, center),
                                 decode_size(delta.w, prior.w, size, clip), decode_size(delta.h, prior.h, size, clip)});
}

// Each coordinate bounded to the window's, which is of any type; a NaN stays NaN.
template <class T, class Window>
SSD_EXT_HD Box<T> clip_box(const Box<T>& b, const Window& window) {
  const auto between = [](T x, T low, T high) { return x < low ? low : x > high ? high : x; };
  const T x1 = T(window.x1), y1 = T(window.y1), x2 = T(window.x2), y2 = T(window.y2);
  return {between(b.x1, x1, x2), between(b.y1, y1, y2), between(b.x2, x1, x2), between(b.y2, y1, y2)};
}
