// CPU kernel of NMS; compiled once per SIMD level.
//
// Boxes are visited by falling score. Each is compared, kLanes at a time, with the boxes kept so far
// in its group (its class), and stops at the first one that suppresses it.
//
// A large group is split into cells of like position, width and height. A box looks first into its own
// cell, where whatever suppresses it most likely is, then into the cells that could still hold such a
// box by their bounds. Which boxes are compared changes no result, only whether a comparison that
// cannot succeed is made.

constexpr int64_t kSplit = 3000;  // boxes in a group from which cells pay (measured)
constexpr int kSides = 4;         // classes of width, and of height: cells = kSides^2 * positions^2

// Numbers of groups and cells, and where each box belongs.
struct Buckets {
  const std::vector<int64_t>& group_of;  // [n], empty: one group
  int64_t groups;
  int64_t positions;             // cells across and down; 0: a group is one cell
  std::vector<int32_t> cell_of;  // [n], empty: one cell

  int64_t cells() const { return positions ? kSides * kSides * positions * positions : 1; }
  int64_t group(int64_t i) const { return group_of.empty() ? 0 : group_of[i]; }
  int64_t bucket(int64_t i) const { return group(i) * cells() + (cell_of.empty() ? 0 : cell_of[i]); }
};

// Which of kSides classes a side falls into; each spans a factor of two about the mean.
template <class T>
int32_t side_class(T side, T mean) {
  return side > mean * T(1.5) ? 0 : side > mean * T(0.75) ? 1 : side > mean * T(0.375) ? 2 : 3;
}

template <class T>
int32_t position(T center, T low, T scale, int64_t positions) {
  const T at = (center - low) * scale;
  return at > T(0) ? at < T(positions) ? int32_t(at) : int32_t(positions - 1) : 0;  // NaN: 0
}

template <class T>
void assign_cells(const T* boxes, int64_t n, Buckets& buckets) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  T low_x = inf, low_y = inf, high_x = -inf, high_y = -inf, sum_w = 0, sum_h = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> b = box_at(boxes, i);
    const T cx = (b.x1 + b.x2) * T(0.5), cy = (b.y1 + b.y2) * T(0.5), w = b.x2 - b.x1, h = b.y2 - b.y1;
    low_x = min_of(cx, low_x);
    low_y = min_of(cy, low_y);
    high_x = max_of(cx, high_x);
    high_y = max_of(cy, high_y);
    sum_w += w == w ? w : T(0);
    sum_h += h == h ? h : T(0);
  }
  const T positions = T(buckets.positions), mean_w = sum_w / T(n), mean_h = sum_h / T(n);
  const T scale_x = positions / (high_x - low_x), scale_y = positions / (high_y - low_y);
  buckets.cell_of.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> b = box_at(boxes, i);
    int32_t cell = side_class(b.x2 - b.x1, mean_w);
    cell = cell * kSides + side_class(b.y2 - b.y1, mean_h);
    cell = cell * buckets.positions + position((b.x1 + b.x2) * T(0.5), low_x, scale_x, buckets.positions);
    cell = cell * buckets.positions + position((b.y1 + b.y2) * T(0.5), low_y, scale_y, buckets.positions);
    buckets.cell_of[i] = cell;
  }
}

// Boxes kept so far, bucket by bucket in whole vectors, and bounds of each bucket.
template <class T>
class KeptBoxes {
 public:
  KeptBoxes(int64_t n, const Buckets& buckets, T threshold)
      : test_(threshold), cells_(buckets.cells()), start_(buckets.groups * cells_), count_(buckets.groups * cells_) {
    for (int64_t i = 0; i < n; ++i) ++start_[buckets.bucket(i)];
    int64_t total = 0;
    for (int64_t& s : start_) {
      const int64_t size = (s + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
      s = total;
      total += size;
    }
    storage_.reset(new T[6 * total]);
    for (int c = 0; c < 6; ++c) columns_[c] = storage_.get() + c * total;
    if (cells_ > 1) {
      constexpr T inf = std::numeric_limits<T>::infinity();
      const T empty[] = {inf, inf, -inf, -inf, 0, 0, inf};
      for (int c = 0; c < 7; ++c) bounds_[c].assign(start_.size(), empty[c]);
    }
  }

  // Whether a kept box of this group has IoU > threshold with the box, which belongs to this bucket.
  bool suppresses(int64_t group, int64_t bucket, const Box<T>& one) const {
    using V = Vec<T>;
    const OverlapQuery<T> box = test_.query(one);
    if (suppressed_in(bucket, box)) return true;
    if (cells_ == 1) return false;
    const V w = splat<V>(one.x2 - one.x1), h = splat<V>(one.y2 - one.y1);
    const int64_t first = group * cells_;
    for (int64_t b = first; b < first + cells_; b += kLanes<T>) {
      const auto bound = [&](int c) { return load<T>(&bounds_[c][b]); };
      // No intersection with the cell's boxes exceeds the one with their hull, nor their largest sides.
      const V wide = min_of(min_of(box.box.x2, bound(2)) - max_of(box.box.x1, bound(0)), min_of(w, bound(4)));
      const V tall = min_of(min_of(box.box.y2, bound(3)) - max_of(box.box.y1, bound(1)), min_of(h, bound(5)));
      for (unsigned near = greater_bits(max_of(wide, V{}) * tall, box.share + bound(6)); near; near &= near - 1) {
        const int64_t cell = b + __builtin_ctz(near);
        if (cell != bucket && suppressed_in(cell, box)) return true;
      }
    }
    return false;
  }

  void add(int64_t bucket, const Box<T>& b) {
    const int64_t at = start_[bucket] + count_[bucket]++;
    if (at % kLanes<T> == 0) {  // boxes without area overlap nothing
      for (T* column : columns_) store(column + at, Vec<T>{});
    }
    const T share = test_.share_of(b), values[] = {b.x1, b.y1, b.x2, b.y2, area(b), share};
    for (int c = 0; c < 6; ++c) columns_[c][at] = values[c];
    if (cells_ == 1) return;
    // A NaN leaves the bounds alone: such a box suppresses nothing.
    const auto lower = [&](int c, T v) { bounds_[c][bucket] = min_of(v, bounds_[c][bucket]); };
    const auto raise = [&](int c, T v) { bounds_[c][bucket] = max_of(v, bounds_[c][bucket]); };
    lower(0, b.x1);
    lower(1, b.y1);
    raise(2, b.x2);
    raise(3, b.y2);
    raise(4, b.x2 - b.x1);
    raise(5, b.y2 - b.y1);
    lower(6, share);
  }

 private:
  bool suppressed_in(int64_t bucket, const OverlapQuery<T>& query) const {
    const int64_t begin = start_[bucket], end = begin + count_[bucket];
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      const auto column = [&](int c) { return load<T>(columns_[c] + i); };
      if (test_.any({column(0), column(1), column(2), column(3)}, column(4), column(5), query)) return true;
    }
    return false;
  }

  OverlapTest<T> test_;
  int64_t cells_;
  std::vector<int64_t> start_, count_;  // of each bucket
  std::unique_ptr<T[]> storage_;
  T* columns_[6];             // x1, y1, x2, y2, area, share
  std::vector<T> bounds_[7];  // of each bucket: least x1, y1, greatest x2, y2, w, h, least share
};

// Writes the kept boxes' indices in the order of visiting; returns how many.
template <class T>
int64_t nms(const T* boxes, int64_t n, const std::vector<uint32_t>& order, const std::vector<int64_t>& group_of,
            int64_t groups, T threshold, int64_t* keep) {
  Buckets buckets{group_of, groups, 0, {}};
  std::vector<int64_t> sizes(groups);
  for (int64_t i = 0; i < n; ++i) ++sizes[buckets.group(i)];
  constexpr int64_t positions = 4, cells = kSides * kSides * positions * positions;
  if (*std::max_element(sizes.begin(), sizes.end()) >= kSplit && groups * cells <= 8 * n) {
    buckets.positions = positions;
    assign_cells(boxes, n, buckets);
  }
  KeptBoxes<T> kept(n, buckets, threshold);
  int64_t count = 0;
  for (const uint32_t i : order) {
    const Box<T> box = box_at(boxes, i);
    const int64_t bucket = buckets.bucket(i);
    if (kept.suppresses(buckets.group(i), bucket, box)) continue;
    keep[count++] = i;
    kept.add(bucket, box);
  }
  return count;
}
