// CPU kernel of NMS; compiled once per SIMD level.
//
// Boxes are visited by falling score; where there are many of several groups (classes), one group after another, so
// that those kept of a group stay in the cache. Each is compared, kLanes at a time, with the boxes kept so far in its
// group, and stops at the first one that suppresses it.
//
// A large group is split into cells of like position, width and height. A box looks first into its own
// cell, where whatever suppresses it most likely is, then into the cells that could still hold such a
// box by their bounds. Which boxes are compared changes no result, only whether a comparison that
// cannot succeed is made.

constexpr int64_t kSplit = 3000;  // boxes in a group from which cells pay (measured)
constexpr int64_t kApart = 4000;  // boxes from which it pays to visit groups apart (measured)
constexpr int kSides = 4;         // classes of width, and of height
constexpr int kPositions = 4;     // cells across, and down
constexpr int kCells = kSides * kSides * kPositions * kPositions;

// Which of kSides classes a side falls into; each spans a factor of two about the mean.
template <class T>
int32_t side_class(T side, T mean) {
  return side > mean * T(1.5) ? 0 : side > mean * T(0.75) ? 1 : side > mean * T(0.375) ? 2 : 3;
}

template <class T>
int32_t position(T center, T low, T scale) {
  const T at = (center - low) * scale;
  return at > T(0) ? at < T(kPositions) ? int32_t(at) : kPositions - 1 : 0;  // NaN: 0
}

// The cell of each box.
template <class T>
std::vector<int32_t> cells_of(const T* boxes, int64_t n) {
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
  const T mean_w = sum_w / T(n), mean_h = sum_h / T(n);
  const T scale_x = T(kPositions) / (high_x - low_x), scale_y = T(kPositions) / (high_y - low_y);
  std::vector<int32_t> cells(n);
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> b = box_at(boxes, i);
    int32_t cell = side_class(b.x2 - b.x1, mean_w);
    cell = cell * kSides + side_class(b.y2 - b.y1, mean_h);
    cell = cell * kPositions + position((b.x1 + b.x2) * T(0.5), low_x, scale_x);
    cell = cell * kPositions + position((b.y1 + b.y2) * T(0.5), low_y, scale_y);
    cells[i] = cell;
  }
  return cells;
}

// The boxes kept so far, bucket by bucket in whole vectors: a bucket for each group, or for each cell of one group.
template <class T>
class KeptBoxes {
 public:
  explicit KeptBoxes(T threshold) : test_(threshold) {}

  // Begins anew, with room for so many boxes in each bucket.
  void begin(const std::vector<int64_t>& sizes, bool are_cells) {
    are_cells_ = are_cells;
    count_.assign(sizes.size(), 0);
    start_.resize(sizes.size());
    int64_t total = 0;
    for (size_t b = 0; b < sizes.size(); ++b) {
      start_[b] = total;
      total += (sizes[b] + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    }
    if (total > room_) {
      room_ = total;
      storage_.reset(new T[6 * room_]);
      for (int c = 0; c < 6; ++c) columns_[c] = storage_.get() + c * room_;
    }
    if (!are_cells) return;
    constexpr T inf = std::numeric_limits<T>::infinity();
    const T empty[] = {inf, inf, -inf, -inf, 0, 0, inf};
    for (int c = 0; c < 7; ++c) bounds_[c].assign(kCells, empty[c]);
  }

  // Whether a kept box of its group has IoU > threshold with the box, which belongs to this bucket.
  inline __attribute__((always_inline)) bool suppresses(int64_t bucket, const Box<T>& one) const {
    using V = Vec<T>;
    const OverlapQuery<T> box = test_.query(one);
    if (suppressed_in(bucket, box)) return true;
    if (!are_cells_) return false;
    const V w = splat<V>(one.x2 - one.x1), h = splat<V>(one.y2 - one.y1);
    for (int64_t b = 0; b < kCells; b += kLanes<T>) {
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

  inline __attribute__((always_inline)) void add(int64_t bucket, const Box<T>& b) {
    const int64_t at = start_[bucket] + count_[bucket]++;
    if (at % kLanes<T> == 0) {  // boxes without area overlap nothing
      for (T* column : columns_) store(column + at, Vec<T>{});
    }
    const T share = test_.share_of(b), values[] = {b.x1, b.y1, b.x2, b.y2, area(b), share};
    for (int c = 0; c < 6; ++c) columns_[c][at] = values[c];
    if (!are_cells_) return;
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
  bool are_cells_ = false;
  std::vector<int64_t> start_, count_;  // of each bucket
  int64_t room_ = 0;                    // boxes
  std::unique_ptr<T[]> storage_;
  T* columns_[6];             // x1, y1, x2, y2, area, share
  std::vector<T> bounds_[7];  // of each cell: least x1, y1, greatest x2, y2, w, h, least share
};

// Visits the boxes order(k) of buckets bucket_of(k), k < n; calls keep(k) for those that are kept.
template <class T, class Order, class BucketOf, class Keep>
void visit(const T* boxes, int64_t n, const Order& order, const BucketOf& bucket_of, KeptBoxes<T>& kept,
           const Keep& keep) {
  for (int64_t k = 0; k < n; ++k) {
    const Box<T> box = box_at(boxes, order(k));
    const int64_t bucket = bucket_of(k);
    if (kept.suppresses(bucket, box)) continue;
    kept.add(bucket, box);
    keep(k);
  }
}

// The places in the order of visiting, group by group.
inline std::vector<uint32_t> places_by_group(const std::vector<uint32_t>& order, const std::vector<int64_t>& group_of,
                                             const std::vector<int64_t>& group_sizes) {
  std::vector<int64_t> next(group_sizes.size());
  std::exclusive_scan(group_sizes.begin(), group_sizes.end(), next.begin(), int64_t(0));
  std::vector<uint32_t> places(order.size());
  for (size_t p = 0; p < order.size(); ++p) places[next[group_of[order[p]]]++] = uint32_t(p);
  return places;
}

// Writes the kept boxes' indices in the order of visiting; returns how many. Of the n boxes, box i is of group
// group_of[i], if there are several.
template <class T>
int64_t nms(const T* boxes, int64_t n, const std::vector<uint32_t>& order, const std::vector<int64_t>& group_of,
            int64_t groups, T threshold, int64_t* keep) {
  const int64_t visited = int64_t(order.size());
  KeptBoxes<T> kept(threshold);
  std::vector<int32_t> cell_of;  // of each box, once a group is split
  const auto visit_group = [&](int64_t size, const auto& order_in_group, const auto& keep_it) {
    if (size < kSplit) {
      kept.begin({size}, false);
      return visit(boxes, size, order_in_group, [](int64_t) { return 0; }, kept, keep_it);
    }
    if (cell_of.empty()) cell_of = cells_of(boxes, n);
    const auto cell = [&](int64_t k) { return cell_of[order_in_group(k)]; };
    std::vector<int64_t> cell_sizes(kCells);
    for (int64_t k = 0; k < size; ++k) ++cell_sizes[cell(k)];
    kept.begin(cell_sizes, true);
    visit(boxes, size, order_in_group, cell, kept, keep_it);
  };
  const auto whole_order = [&](int64_t k) { return order[k]; };
  int64_t count = 0;
  const auto write = [&](int64_t k) { keep[count++] = order[k]; };
  if (groups == 1) {
    visit_group(visited, whole_order, write);
    return count;
  }

  std::vector<int64_t> group_sizes(groups);
  for (const uint32_t i : order) ++group_sizes[group_of[i]];
  if (visited < kApart) {
    kept.begin(group_sizes, false);
    visit(boxes, visited, whole_order, [&](int64_t k) { return group_of[order[k]]; }, kept, write);
    return count;
  }

  const std::vector<uint32_t> places = places_by_group(order, group_of, group_sizes);
  std::vector<uint8_t> is_kept(visited);
  const uint32_t* group = places.data();
  for (const int64_t size : group_sizes) {
    if (size == 0) continue;  // as most are where class ids are sparse
    visit_group(size, [&](int64_t k) { return order[group[k]]; }, [&](int64_t k) { is_kept[group[k]] = 1; });
    group += size;
  }
  for (int64_t p = 0; p < visited; ++p) {
    keep[count] = order[p];
    count += is_kept[p];
  }
  return count;
}
