// CPU kernel of NMS; compiled once per SIMD level.
//
// Groups of boxes (classes) are visited one after another, so that the boxes kept of a group stay in the cache, and the
// kept boxes of all groups are then put in the order of visiting. Each box is compared, kLanes at a time, with the
// boxes kept so far in its group, and stops at the first one that suppresses it.
//
// A large group is split into cells of like position, width and height. A box looks first into its own
// cell, where whatever suppresses it most likely is, then into the cells that could still hold such a
// box by their bounds. Which boxes are compared changes no result, only whether a comparison that
// cannot succeed is made.

constexpr int64_t kSplit = 3000;  // boxes in a group from which cells pay (measured)
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

// The cell of each of a group's boxes.
template <class T>
std::vector<int32_t> cells_of(const T* boxes, const std::vector<uint32_t>& group) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  T low_x = inf, low_y = inf, high_x = -inf, high_y = -inf, sum_w = 0, sum_h = 0;
  for (const uint32_t i : group) {
    const Box<T> b = box_at(boxes, i);
    const T cx = (b.x1 + b.x2) * T(0.5), cy = (b.y1 + b.y2) * T(0.5), w = b.x2 - b.x1, h = b.y2 - b.y1;
    low_x = min_of(cx, low_x);
    low_y = min_of(cy, low_y);
    high_x = max_of(cx, high_x);
    high_y = max_of(cy, high_y);
    sum_w += w == w ? w : T(0);
    sum_h += h == h ? h : T(0);
  }
  const T n = T(group.size()), mean_w = sum_w / n, mean_h = sum_h / n;
  const T scale_x = T(kPositions) / (high_x - low_x), scale_y = T(kPositions) / (high_y - low_y);
  std::vector<int32_t> cells;
  cells.reserve(group.size());
  for (const uint32_t i : group) {
    const Box<T> b = box_at(boxes, i);
    int32_t cell = side_class(b.x2 - b.x1, mean_w);
    cell = cell * kSides + side_class(b.y2 - b.y1, mean_h);
    cell = cell * kPositions + position((b.x1 + b.x2) * T(0.5), low_x, scale_x);
    cell = cell * kPositions + position((b.y1 + b.y2) * T(0.5), low_y, scale_y);
    cells.push_back(cell);
  }
  return cells;
}

// The boxes of a group that are kept so far, cell by cell in whole vectors, and bounds of each cell.
template <class T>
class KeptBoxes {
 public:
  KeptBoxes(int64_t largest_group, T threshold) : test_(threshold) {
    const int64_t cells = largest_group < kSplit ? 1 : kCells, size = largest_group + cells * kLanes<T>;
    storage_.reset(new T[6 * size]);
    for (int c = 0; c < 6; ++c) columns_[c] = storage_.get() + c * size;
    start_.resize(cells);
    count_.resize(cells);
    for (std::vector<T>& bound : bounds_) bound.resize(cells);
  }

  // Begins a group that is one cell.
  void begin() {
    cells_ = 1;
    start_[0] = count_[0] = 0;
  }

  // Begins a group that is split into kCells; cells[i] is that of its i-th box.
  void begin(const std::vector<int32_t>& cells) {
    cells_ = kCells;
    std::fill(count_.begin(), count_.end(), 0);
    for (const int32_t cell : cells) ++count_[cell];
    int64_t total = 0;
    for (int c = 0; c < kCells; ++c) {
      start_[c] = total;
      total += (count_[c] + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
      count_[c] = 0;
    }
    constexpr T inf = std::numeric_limits<T>::infinity();
    const T empty[] = {inf, inf, -inf, -inf, 0, 0, inf};
    for (int c = 0; c < 7; ++c) std::fill(bounds_[c].begin(), bounds_[c].end(), empty[c]);
  }

  // Whether a kept box has IoU > threshold with the box, which belongs to this cell.
  bool suppresses(int cell, const Box<T>& one) const {
    using V = Vec<T>;
    const OverlapQuery<T> box = test_.query(one);
    if (suppressed_in(cell, box)) return true;
    if (cells_ == 1) return false;
    const V w = splat<V>(one.x2 - one.x1), h = splat<V>(one.y2 - one.y1);
    for (int c = 0; c < kCells; c += kLanes<T>) {
      const auto bound = [&](int b) { return load<T>(&bounds_[b][c]); };
      // No intersection with the cell's boxes exceeds the one with their hull, nor their largest sides.
      const V wide = min_of(min_of(box.box.x2, bound(2)) - max_of(box.box.x1, bound(0)), min_of(w, bound(4)));
      const V tall = min_of(min_of(box.box.y2, bound(3)) - max_of(box.box.y1, bound(1)), min_of(h, bound(5)));
      for (unsigned near = greater_bits(max_of(wide, V{}) * tall, box.share + bound(6)); near; near &= near - 1) {
        const int other = c + __builtin_ctz(near);
        if (other != cell && suppressed_in(other, box)) return true;
      }
    }
    return false;
  }

  void add(int cell, const Box<T>& b) {
    const int64_t at = start_[cell] + count_[cell]++;
    if (at % kLanes<T> == 0) {  // boxes without area overlap nothing
      for (T* column : columns_) store(column + at, Vec<T>{});
    }
    const T share = test_.share_of(b), values[] = {b.x1, b.y1, b.x2, b.y2, area(b), share};
    for (int c = 0; c < 6; ++c) columns_[c][at] = values[c];
    if (cells_ == 1) return;
    // A NaN leaves the bounds alone: such a box suppresses nothing.
    const auto lower = [&](int c, T v) { bounds_[c][cell] = min_of(v, bounds_[c][cell]); };
    const auto raise = [&](int c, T v) { bounds_[c][cell] = max_of(v, bounds_[c][cell]); };
    lower(0, b.x1);
    lower(1, b.y1);
    raise(2, b.x2);
    raise(3, b.y2);
    raise(4, b.x2 - b.x1);
    raise(5, b.y2 - b.y1);
    lower(6, share);
  }

 private:
  bool suppressed_in(int cell, const OverlapQuery<T>& query) const {
    const int64_t begin = start_[cell], end = begin + count_[cell];
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      const auto column = [&](int c) { return load<T>(columns_[c] + i); };
      if (test_.any({column(0), column(1), column(2), column(3)}, column(4), column(5), query)) return true;
    }
    return false;
  }

  OverlapTest<T> test_;
  int cells_ = 1;
  std::vector<int64_t> start_, count_;  // of each cell
  std::unique_ptr<T[]> storage_;
  T* columns_[6];             // x1, y1, x2, y2, area, share
  std::vector<T> bounds_[7];  // of each cell: least x1, y1, greatest x2, y2, w, h, least share
};

// The places in the order of visiting, group by group: group g has those from ends[g - 1] to ends[g].
struct Groups {
  std::vector<uint32_t> places;
  std::vector<int64_t> ends;
  int64_t largest;  // boxes
};

inline Groups group_places(const std::vector<uint32_t>& order, const std::vector<int64_t>& group_of, int64_t groups) {
  Groups by_group{std::vector<uint32_t>(order.size()), std::vector<int64_t>(groups), 0};
  if (groups == 1) {
    std::iota(by_group.places.begin(), by_group.places.end(), 0u);
    by_group.ends[0] = by_group.largest = int64_t(order.size());
    return by_group;
  }
  for (const uint32_t i : order) ++by_group.ends[group_of[i]];
  int64_t total = 0;
  for (int64_t& end : by_group.ends) {  // the beginning, at first
    by_group.largest = std::max(by_group.largest, end);
    total += std::exchange(end, total);
  }
  for (size_t p = 0; p < order.size(); ++p) by_group.places[by_group.ends[group_of[order[p]]]++] = uint32_t(p);
  return by_group;
}

// Writes the kept boxes' indices in the order of visiting; returns how many.
template <class T>
int64_t nms(const T* boxes, const std::vector<uint32_t>& order, const std::vector<int64_t>& group_of, int64_t groups,
            T threshold, int64_t* keep) {
  const Groups by_group = group_places(order, group_of, groups);
  KeptBoxes<T> kept(by_group.largest, threshold);
  std::vector<uint8_t> is_kept(order.size());
  const uint32_t* place = by_group.places.data();
  for (const int64_t end : by_group.ends) {
    const uint32_t *const begin = place, *const stop = by_group.places.data() + end;
    const bool is_split = stop - begin >= kSplit;
    std::vector<int32_t> cells;
    if (is_split) {
      std::vector<uint32_t> group;
      for (const uint32_t* p = begin; p < stop; ++p) group.push_back(order[*p]);
      cells = cells_of(boxes, group);
      kept.begin(cells);
    } else {
      kept.begin();
    }
    for (; place < stop; ++place) {
      const Box<T> box = box_at(boxes, order[*place]);
      const int cell = is_split ? cells[place - begin] : 0;
      if (kept.suppresses(cell, box)) continue;
      kept.add(cell, box);
      is_kept[*place] = 1;
    }
  }
  int64_t count = 0;
  for (size_t p = 0; p < order.size(); ++p) {
    keep[count] = order[p];
    count += is_kept[p];
  }
  return count;
}
