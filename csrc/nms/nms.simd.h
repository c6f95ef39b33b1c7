// CPU kernel of NMS; compiled once per SIMD level.
//
// Boxes are visited by falling score. Each is compared, kLanes at a time, with the boxes kept so far in its group
// (class), and stops at the first one that suppresses it. Where boxes are many, one group is visited after another, so
// that those kept of a group stay in the cache, and groups are shared out among threads.
//
// Where many boxes of a group are kept, they are put into cells of like position, width and height. A box looks first
// into its own cell, where whatever suppresses it most likely is, then into the cells that could still hold such a
// box by their bounds. Cells are cut at medians of a sample, so that a few boxes far away or of any size change them
// little, and anew when many times as many boxes are kept. Which boxes are compared changes no result, only whether a
// comparison that cannot succeed is made.

constexpr int64_t kApart = 4000;             // boxes from which it pays to visit groups apart (measured)
constexpr int64_t kPairsOfThread = 1 << 24;  // of boxes of one group, that are worth a thread (half a millisecond)
constexpr int64_t kFewKept = 128;            // kept boxes up to which cells never pay,
constexpr int64_t kWorthCells = 600000;      // and what these times the boxes to come must be (measured)
constexpr int64_t kGrowth = 16;              // times as many kept boxes, until cells are cut anew
constexpr int kLeastLevels = 4;              // of cells: whole vectors of them
constexpr int kSampleOfCell = 4;

// Cells of about equally many boxes: the first levels of a k-d tree, which halve the boxes by their centres, across and
// down in turn, and at last by their widths and heights.
template <class T>
class Cells {
 public:
  // As many cells as the square root of the boxes, or half as many: comparing a box with the bounds of all cells then
  // takes about as long as comparing it with the boxes of the cells nearby. sample_at(j), any j >= 0, are boxes with an
  // area.
  template <class SampleAt>
  void cut(int64_t boxes, const SampleAt& sample_at) {
    static_assert((1 << kLeastLevels) % kLanes<T> == 0);
    levels_ = std::max((63 - __builtin_clzll(uint64_t(boxes))) / 2, kLeastLevels);
    bounds_.resize(size());
    std::vector<Features> sample;
    sample.reserve(kSampleOfCell * size());
    for (int64_t j = 0; j < kSampleOfCell * size(); ++j) sample.push_back(features(sample_at(j)));
    halve(1, 0, sample.data(), sample.data() + sample.size());
  }

  int64_t size() const { return int64_t(1) << levels_; }

  // The cell of a box, which may be any.
  int32_t of(const Box<T>& box) const {
    const Features at = features(box);
    int32_t node = 1;
    const auto descend = [&](int levels, T value, T next) {
      for (; levels > 0; --levels) {
        node = 2 * node + !(value < bounds_[node]);
        std::swap(value, next);
      }
    };
    descend(levels_ - 2, at.of[0], at.of[1]);
    descend(2, at.of[2], at.of[3]);
    return node - int32_t(size());
  }

 private:
  struct Features {
    T of[4];  // twice the centre, width, height
  };

  static Features features(const Box<T>& b) { return {{b.x1 + b.x2, b.y1 + b.y2, b.x2 - b.x1, b.y2 - b.y1}}; }

  void halve(int node, int level, Features* begin, Features* end) {
    if (level == levels_) return;
    const int axis = level < levels_ - 2 ? level % 2 : level - levels_ + 4;
    Features* const middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, [&](const Features& a, const Features& b) { return a.of[axis] < b.of[axis]; });
    bounds_[node] = middle->of[axis];
    halve(2 * node, level + 1, begin, middle);
    halve(2 * node + 1, level + 1, middle, end);
  }

  int levels_ = 0;
  std::vector<T> bounds_;  // of a node, whose children are 2 * node and 2 * node + 1: what the second one begins with
};

// The boxes kept so far, bucket by bucket in whole vectors: a bucket for each group, or for each cell of one group.
// Boxes without a positive, finite area have no IoU with any and are not to be added.
template <class T>
class KeptBoxes {
 public:
  explicit KeptBoxes(T threshold) : test_(threshold) {}

  // Begins anew, with room for so many boxes in each bucket.
  void begin(const std::vector<int64_t>& sizes, bool are_cells) {
    are_cells_ = are_cells;
    size_ = 0;
    count_.assign(sizes.size(), 0);
    start_.resize(sizes.size());
    int64_t total = 0;
    for (size_t b = 0; b < sizes.size(); ++b) {
      start_[b] = total;
      total += (sizes[b] + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    }
    if (total > room_) {
      room_ = total;
      storage_.reset(new Lanes[6 * room_ / kLanes<T>]);
      for (int c = 0; c < 6; ++c) columns_[c] = storage_[c * room_ / kLanes<T>].of;
    }
    if (!are_cells) return;
    constexpr T inf = std::numeric_limits<T>::infinity();
    const T empty[] = {inf, inf, -inf, -inf, 0, 0, inf};
    for (int c = 0; c < 7; ++c) bounds_[c].assign(sizes.size(), empty[c]);
  }

  int64_t size() const { return size_; }

  std::vector<Box<T>> boxes() const {
    std::vector<Box<T>> all;
    all.reserve(size_);
    for (size_t b = 0; b < start_.size(); ++b) {
      for (int64_t i = start_[b]; i < start_[b] + count_[b]; ++i) {
        all.push_back({columns_[0][i], columns_[1][i], columns_[2][i], columns_[3][i]});
      }
    }
    return all;
  }

  // Whether a kept box of its group has IoU > threshold with the box, which belongs to this bucket.
  inline __attribute__((always_inline)) bool suppresses(int64_t bucket, const Box<T>& one) const {
    using V = Vec<T>;
    const OverlapQuery<T> box = test_.query(one);
    if (suppressed_in(bucket, box)) return true;
    if (!are_cells_) return false;
    const V w = splat<V>(one.x2 - one.x1), h = splat<V>(one.y2 - one.y1);
    for (int64_t b = 0; b < int64_t(start_.size()); b += kLanes<T>) {
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
    ++size_;
    if (at % kLanes<T> == 0) {  // boxes without area overlap nothing
      for (T* column : columns_) store(column + at, Vec<T>{});
    }
    const T share = test_.share_of(b), values[] = {b.x1, b.y1, b.x2, b.y2, area(b), share};
    for (int c = 0; c < 6; ++c) columns_[c][at] = values[c];
    if (!are_cells_) return;
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
  struct alignas(sizeof(Vec<T>)) Lanes {  // else every load may touch two cache lines
    T of[kLanes<T>];
  };

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
  int64_t size_ = 0;
  std::vector<int64_t> start_, count_;  // of each bucket
  int64_t room_ = 0;                    // boxes
  std::unique_ptr<Lanes[]> storage_;
  T* columns_[6];             // x1, y1, x2, y2, area, share
  std::vector<T> bounds_[7];  // of each cell: least x1, y1, greatest x2, y2, w, h, least share
};

// Visits boxes, again and again in the same memory.
template <class T>
class Visitor {
 public:
  explicit Visitor(T threshold) : kept_(threshold) {}

  // Visits the boxes index_of(k), k < n, all of one group; calls keep(k) for those that are kept.
  template <class IndexOf, class Keep>
  void visit_group(const T* boxes, int64_t n, const IndexOf& index_of, const Keep& keep) {
    kept_.begin({n}, false);
    const auto box_of = [&](int64_t k) { return box_at(boxes, index_of(k)); };
    int64_t next = visit(0, n, box_of, [](int64_t) { return 0; }, keep, kFewKept);
    if (next == n) return;
    boxes_.resize(n);
    bucket_of_.resize(n);
    for (int64_t k = next; k < n; ++k) boxes_[k] = box_of(k);
    while (next < n) {
      const int64_t enough = kGrowth * kept_.size();
      put_into_cells(next, n);
      const auto bucket_of = [&](int64_t k) { return bucket_of_[k]; };
      next = visit(next, n, [&](int64_t k) { return boxes_[k]; }, bucket_of, keep, enough);
    }
  }

  // The same where box index_of(k) is of group group_of(k), of group_sizes.size() groups.
  template <class IndexOf, class GroupOf, class Keep>
  void visit_groups(const T* boxes, int64_t n, const IndexOf& index_of, const GroupOf& group_of,
                    const std::vector<int64_t>& group_sizes, const Keep& keep) {
    kept_.begin(group_sizes, false);
    visit(0, n, [&](int64_t k) { return box_at(boxes, index_of(k)); }, group_of, keep, n + 1);
  }

 private:
  // Visits from `next` on; returns where it stopped: at the end, or earlier, as cells pay, if `enough` are kept.
  template <class BoxOf, class BucketOf, class Keep>
  int64_t visit(int64_t next, int64_t n, const BoxOf& box_of, const BucketOf& bucket_of, const Keep& keep,
                int64_t enough) {
    while (next < n) {
      const int64_t k = next++;
      const Box<T> box = box_of(k);
      if (!is_valid(box)) {  // it has no IoU with any
        keep(k);
        continue;
      }
      const int64_t bucket = bucket_of(k);
      if (kept_.suppresses(bucket, box)) continue;
      kept_.add(bucket, box);
      keep(k);
      if (kept_.size() >= enough && kept_.size() * (n - next) >= kWorthCells) break;
    }
    return next;
  }

  void put_into_cells(int64_t next, int64_t n) {
    const std::vector<Box<T>> kept = kept_.boxes();
    // Those kept are what cells are for, but may all lie elsewhere than those to come, where scores go by position.
    cells_.cut(int64_t(kept.size()) * n / next, [&](int64_t j) {  // if others are kept as often
      // Multiples of the golden ratio spread evenly and follow no pattern of the boxes.
      const uint64_t spread = uint32_t(j / 2) * 2654435769u;
      const Box<T>& to_come = boxes_[next + int64_t(spread * uint64_t(n - next) >> 32)];
      return j % 2 == 0 && is_valid(to_come) ? to_come : kept[spread * kept.size() >> 32];
    });
    std::vector<int64_t> sizes(cells_.size());
    std::vector<int32_t> cell_of(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) ++sizes[cell_of[i] = cells_.of(kept[i])];
    for (int64_t k = next; k < n; ++k) ++sizes[bucket_of_[k] = cells_.of(boxes_[k])];
    kept_.begin(sizes, true);
    for (size_t i = 0; i < kept.size(); ++i) kept_.add(cell_of[i], kept[i]);
  }

  KeptBoxes<T> kept_;
  Cells<T> cells_;
  std::vector<Box<T>> boxes_;       // of the group, in the order of visiting; where there are cells
  std::vector<int32_t> bucket_of_;  // of each of these
};

// A place in the order of visiting and the box that has it.
struct Place {
  uint32_t place, box;
};

// Visits each group by itself; returns whether the box at a place is kept.
template <class T>
std::vector<uint8_t> visit_apart(const T* boxes, const std::vector<uint32_t>& order,
                                 const std::vector<uint32_t>& group_of, const std::vector<int64_t>& group_sizes,
                                 T threshold) {
  std::vector<int64_t> ends(group_sizes.size());  // of what is there of each group so far
  std::exclusive_scan(group_sizes.begin(), group_sizes.end(), ends.begin(), int64_t(0));
  std::vector<Place> places(group_of.size());  // group by group
  for (size_t p = 0; p < order.size(); ++p) places[ends[group_of[order[p]]]++] = {uint32_t(p), order[p]};

  struct Group {
    Place* places;
    int64_t size, kept;
  };
  std::vector<Group> visited;  // without the empty ones, as most are where class ids are sparse
  visited.reserve(std::min(group_sizes.size(), order.size()));
  Place* begin = places.data();
  for (size_t g = 0; g < group_sizes.size(); begin += group_sizes[g++]) {
    if (Place* const end = places.data() + ends[g]; end > begin) visited.push_back({begin, end - begin, 0});
  }
  int64_t pairs = 0;
  for (const Group& group : visited) pairs += group.size * group.size;
  const int64_t threads = std::clamp<int64_t>(pairs / kPairsOfThread, 1, torch::stable::get_num_threads());
  const size_t share = visited.size() / size_t(8 * threads) + 1;  // that a thread takes at a time
  std::atomic<size_t> next(0);
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    Visitor<T> visitor(threshold);
    for (size_t first; (first = next.fetch_add(share)) < visited.size();) {
      for (size_t g = first; g < std::min(first + share, visited.size()); ++g) {
        Group& group = visited[g];
        // Kept places move to the front: flags of several groups share a cache line, on which threads would wait.
        visitor.visit_group(
            boxes, group.size, [&](int64_t k) { return group.places[k].box; },
            [&](int64_t k) { group.places[group.kept++] = group.places[k]; });
      }
    }
  });
  std::vector<uint8_t> is_kept(order.size());
  for (const Group& group : visited) {
    for (int64_t k = 0; k < group.kept; ++k) is_kept[group.places[k].place] = 1;
  }
  return is_kept;
}

// Writes the kept boxes' indices in the order of visiting; returns how many. Box i is of group group_of[i], if there
// are several; these have at most group_sizes boxes.
template <class T>
int64_t nms(const T* boxes, const std::vector<uint32_t>& order, const std::vector<uint32_t>& group_of,
            const std::vector<int64_t>& group_sizes, T threshold, int64_t* keep) {
  const int64_t visited = int64_t(order.size());
  const auto in_order = [&](int64_t k) { return order[k]; };
  int64_t count = 0;
  const auto write = [&](int64_t k) { keep[count++] = order[k]; };
  if (group_sizes.size() <= 1) {
    Visitor<T>(threshold).visit_group(boxes, visited, in_order, write);
  } else if (visited < kApart) {
    const auto group = [&](int64_t k) { return group_of[order[k]]; };
    Visitor<T>(threshold).visit_groups(boxes, visited, in_order, group, group_sizes, write);
  } else {
    const std::vector<uint8_t> is_kept = visit_apart(boxes, order, group_of, group_sizes, threshold);
    for (int64_t p = 0; p < visited; ++p) {
      keep[count] = order[p];
      count += is_kept[p];
    }
  }
  return count;
}
