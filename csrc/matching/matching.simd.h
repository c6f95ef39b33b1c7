// CPU kernels of matching; compiled once per SIMD level.
//
// Priors are walked in blocks of four vectors. Only ground truths that overlap a block's bounding box
// are compared with its priors: the others have IoU 0 there, which changes no maximum.

template <class T>
constexpr int64_t kBlock = 4 * kLanes<T>;

// Boxes as columns, and what those of a block have in common.
template <class T>
struct Blocks {
  BoxColumns<T> boxes, hulls;
  std::vector<T> least_area, greatest_area;

  explicit Blocks(BoxColumns<T> columns)
      : boxes(std::move(columns)),
        hulls((boxes.size + kBlock<T> - 1) / kBlock<T>),
        least_area(hulls.size),
        greatest_area(hulls.size) {
    using V = Vec<T>;
    const V inf = splat<V>(std::numeric_limits<T>::infinity());
    for (int64_t block = 0; block < hulls.size; ++block) {
      Box<V> hull{inf, inf, -inf, -inf};
      V least = inf, greatest = -inf;
      for (int64_t i = block * kBlock<T>; i < (block + 1) * kBlock<T>; i += kLanes<T>) {
        // A NaN leaves all of them alone: such a box has IoU 0 with everything.
        const Box<V> some = load_boxes(boxes, i);
        const V areas = load<T>(boxes.areas + i);
        hull = {min_of(some.x1, hull.x1), min_of(some.y1, hull.y1), max_of(some.x2, hull.x2), max_of(some.y2, hull.y2)};
        least = min_of(areas, least);
        greatest = max_of(areas, greatest);
      }
      const auto fold = [](V v, const auto& f) {
        T all = v[0];
        for (int i = 1; i < kLanes<T>; ++i) all = f(v[i], all);
        return all;
      };
      const auto lower = [](T a, T b) { return min_of(a, b); };
      const auto higher = [](T a, T b) { return max_of(a, b); };
      hulls.set(block, {fold(hull.x1, lower), fold(hull.y1, lower), fold(hull.x2, higher), fold(hull.y2, higher)});
      least_area[block] = fold(least, lower);
      greatest_area[block] = fold(greatest, higher);
    }
  }

  // Whether the IoU of each box of a block with one of this area is below a bound, as it is at most the quotient of
  // both areas.
  bool all_below(int64_t block, T area, T bound) const {
    return bound * least_area[block] > area || bound * area > greatest_area[block];
  }
};

template <class T>
Blocks<T> blocks_of_priors(const T* priors, int64_t n) {  // [n, 4] centre and size
  BoxColumns<T> corners(n);
  for (int64_t p = 0; p < n; p += kLanes<T>) {
    T rows[4 * kLanes<T>] = {};  // after the last prior, boxes at the origin without area
    memcpy(rows, priors + 4 * p, 4 * sizeof(T) * (n - p < kLanes<T> ? n - p : kLanes<T>));
    const Box<Vec<T>> some = to_corners(load_columns(rows));
    store(corners.x1 + p, some.x1);
    store(corners.y1 + p, some.y1);
    store(corners.x2 + p, some.x2);
    store(corners.y2 + p, some.y2);
    store(corners.areas + p, area(some));
  }
  return Blocks<T>(std::move(corners));
}

// f(i) for each of the boxes that may meet one box, until it returns true.
template <class T, class F>
inline __attribute__((always_inline)) void for_near(const BoxColumns<T>& boxes, const Box<Vec<T>>& one, const F& f) {
  for (int64_t i = 0; i < boxes.size; i += kLanes<T>) {
    unsigned near = mask_bits(may_meet(load_boxes(boxes, i), one));
    if (boxes.size - i < kLanes<T>) near &= (1u << (boxes.size - i)) - 1;
    for (; near; near &= near - 1) {
      if (f(i + __builtin_ctz(near))) return;
    }
  }
}

// The ground truth of one image. Rows that is_valid() refuses become NaN and overlap nothing.
template <class T>
struct GroundTruth {
  const T* rows;          // [size, 4]
  const int64_t* labels;  // [size] or nullptr
  BoxColumns<T> columns;
  int64_t first_valid = -1;

  GroundTruth(const T* boxes, const int64_t* gt_labels, int64_t n) : rows(boxes), labels(gt_labels), columns(n) {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    for (int64_t j = 0; j < n; ++j) {
      const Box<T> box = box_at(boxes, j);
      const bool valid = is_valid(box);
      if (valid && first_valid < 0) first_valid = j;
      columns.set(j, valid ? box : Box<T>{nan, nan, nan, nan});
    }
  }
  int64_t size() const { return columns.size; }
  bool valid(int64_t j) const { return columns.areas[j] == columns.areas[j]; }
};

// The best prior of a ground truth, or the other way round.
template <class T>
struct Best {
  T iou;
  int64_t index;  // -1: none
};

// The greatest value of all lanes, the lowest index among equals.
template <class T>
Best<T> best_lane(Vec<T> iou, IntOf<Vec<T>> index) {
  Best<T> best{iou[0], index[0]};
  for (int i = 1; i < kLanes<T>; ++i) {
    if (iou[i] > best.iou || (iou[i] == best.iou && index[i] < best.index)) best = {iou[i], index[i]};
  }
  return best;
}

// Writes the result for single priors and for runs of background.
template <class T>
struct Writer {
  const T* priors;  // [P, 4] centre and size
  const GroundTruth<T>& gt;
  const matching::Rule& rule;
  int64_t* matches;  // this image's rows of the outputs
  int64_t* labels;
  T* deltas;

  void background(int64_t p, int64_t n) const {
    if (matches) {
      for (int64_t i = 0; i < n; ++i) matches[p + i] = matching::kBackground;
    } else {
      memset(labels + p, 0, n * sizeof(int64_t));
      memset(deltas + 4 * p, 0, 4 * n * sizeof(T));
    }
  }

  void ignored(int64_t p) const { (matches ? matches : labels)[p] = matches ? matching::kIgnore : -1; }

  void matched(int64_t p, int64_t j) const {
    if (matches) {
      matches[p] = j;
      return;
    }
    labels[p] = gt.labels[j];
    const CenterBox<T> d = encode_box(box_at(gt.rows, j), prior_at(priors, p), T(rule.center), T(rule.size));
    memcpy(deltas + 4 * p, &d, sizeof d);
  }
};

// Matches the priors of blocks begin .. end by threshold and writes them; best[j] becomes the j-th
// ground truth's best prior among them.
template <class T>
void match_blocks(const Blocks<T>& priors, const GroundTruth<T>& gt, const Writer<T>& writer, int64_t begin,
                  int64_t end, Best<T>* best) {
  using V = Vec<T>;
  using I = IntOf<V>;
  constexpr int vectors = 4;
  const int64_t num_priors = priors.boxes.size, n = gt.size();
  if (gt.first_valid < 0) {
    const int64_t last = end * kBlock<T> < num_priors ? end * kBlock<T> : num_priors;
    writer.background(begin * kBlock<T>, last - begin * kBlock<T>);
    return;
  }
  const V zero = splat<V>(0), high = splat<V>(T(writer.rule.iou_threshold)),
          low = splat<V>(T(writer.rule.low_threshold));
  std::vector<T> lane_iou(n * kLanes<T>, T(0));
  std::vector<IntOf<T>> lane_prior(n * kLanes<T>, IntOf<T>(begin * kBlock<T>));

  for (int64_t block = begin; block < end; ++block) {
    const int64_t p0 = block * kBlock<T>;
    const Box<V> hull = broadcast(priors.hulls.at(block));
    V best_iou[vectors];
    I best_gt[vectors];
    for (int v = 0; v < vectors; ++v) {
      best_iou[v] = zero;
      best_gt[v] = splat<I>(IntOf<T>(gt.first_valid));
    }
    for_near(gt.columns, hull, [&](int64_t j) {
      const Box<V> box = broadcast(Box<T>{gt.columns.x1[j], gt.columns.y1[j], gt.columns.x2[j], gt.columns.y2[j]});
      const V gt_area = splat<V>(gt.columns.areas[j]);
      V top_iou = load<T>(&lane_iou[j * kLanes<T>]);
      I top_prior;
      memcpy(&top_prior, &lane_prior[j * kLanes<T>], sizeof top_prior);
      const I lane = iota<IntOf<T>>();
      for (int v = 0; v < vectors; ++v) {
        const int64_t p = p0 + v * kLanes<T>;
        const V inter = intersection(box, load_boxes(priors.boxes, p));
        if (!greater_bits(inter, zero)) continue;
        const V value = iou_from(inter, gt_area, load<T>(priors.boxes.areas + p));
        const auto better = value > best_iou[v];
        best_iou[v] = better ? value : best_iou[v];
        best_gt[v] = better ? splat<I>(IntOf<T>(j)) : best_gt[v];
        const auto top = value > top_iou;
        top_iou = top ? value : top_iou;
        top_prior = top ? lane + IntOf<T>(p) : top_prior;
      }
      store(&lane_iou[j * kLanes<T>], top_iou);
      memcpy(&lane_prior[j * kLanes<T>], &top_prior, sizeof top_prior);
      return false;
    });
    const int64_t left = num_priors - p0 < kBlock<T> ? num_priors - p0 : kBlock<T>;
    writer.background(p0, left);
    for (int v = 0; v < vectors && v * kLanes<T> < left; ++v) {
      unsigned touched = mask_bits(best_iou[v] >= low);
      const unsigned positive = mask_bits(best_iou[v] >= high);
      if (left - v * kLanes<T> < kLanes<T>) touched &= (1u << (left - v * kLanes<T>)) - 1;
      for (; touched; touched &= touched - 1) {
        const int i = __builtin_ctz(touched);
        const int64_t p = p0 + v * kLanes<T> + i;
        if (positive >> i & 1) {
          writer.matched(p, best_gt[v][i]);
        } else {
          writer.ignored(p);
        }
      }
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    IntOf<V> lane_index;
    memcpy(&lane_index, &lane_prior[j * kLanes<T>], sizeof lane_index);
    best[j] = gt.valid(j) ? best_lane<T>(load<T>(&lane_iou[j * kLanes<T>]), lane_index) : Best<T>{T(-1), -1};
  }
}

// The boxes of highest IoU that a search has found, the best first; the lowest index wins among equals.
template <class T, int count>
using Found = std::array<Best<T>, count>;

// A search for the boxes of highest IoU, vector by vector.
template <class T, int count>
class Search {
 public:
  // Nothing below an IoU of `at_least` is looked for.
  explicit Search(T at_least) : bound_(splat<Vec<T>>(below(at_least))) { found_.fill({bound_[0], -1}); }

  // Offers a vector of boxes whose intersection with the one sought for is `inter`. If any overlaps, areas() gives the
  // sum of its area and theirs, index() their indices. Most are refused by a product instead of a quotient.
  template <class Areas, class Index>
  inline __attribute__((always_inline)) void offer(Vec<T> inter, const Areas& areas, const Index& index) {
    using V = Vec<T>;
    const unsigned overlaps = greater_bits(inter, V{});
    if (!overlaps) return;
    const V sum = areas();
    if (!(overlaps & ~greater_bits(bound_ * (sum - inter), inter))) return;
    const V iou = iou_from(inter, sum, V{});
    const auto place = index();
    const V last = splat<V>(found_.back().iou);
    const auto is_before = place < splat<IntOf<V>>(IntOf<T>(found_.back().index));
    for (unsigned high = mask_bits((iou > last) | ((iou == last) & is_before)); high; high &= high - 1) {
      const int i = __builtin_ctz(high);
      insert({iou[i], place[i]});
    }
  }

  const Found<T, count>& found() const { return found_; }  // index -1: none
  T bound() const { return bound_[0]; }                    // below it nothing is found any more

 private:
  // Below every IoU that ties with this one, though a product with it may be rounded.
  static T below(T iou) { return max_of(iou * T(1 - 1e-6) - T(1e-30), T(0)); }

  void insert(const Best<T>& one) {
    const auto wins = [&](const Best<T>& other) {
      return one.iou > other.iou || (one.iou == other.iou && one.index < other.index);
    };
    if (!wins(found_.back())) return;
    int at = count - 1;
    for (; at > 0 && wins(found_[at - 1]); --at) found_[at] = found_[at - 1];
    found_[at] = one;
    bound_ = splat<Vec<T>>(below(found_.back().iou));
  }

  Found<T, count> found_;
  Vec<T> bound_;
};

// The boxes of highest IoU with one box. Some have an IoU of `at_least`, and none has more than `at_most`: the search
// ends at one that has it (infinity: it does not). Among the boxes from i on that fill a vector, free(i, inter) sets
// the intersections to 0 of those that cannot be chosen, and index(i) are their indices.
template <int count, class T, class Free, class Index>
Found<T, count> best_of(const Blocks<T>& blocks, const Box<T>& one, T at_least, T at_most, const Free& free,
                        const Index& index) {
  using V = Vec<T>;
  const Box<V> box = broadcast(one);
  const T box_area = area(one);
  Search<T, count> search(at_least);
  bool is_over = false;
  for_near(blocks.hulls, box, [&](int64_t block) {
    if (blocks.all_below(block, box_area, search.bound())) return false;
    for (int64_t i = block * kBlock<T>; i < (block + 1) * kBlock<T>; i += kLanes<T>) {
      search.offer(
          free(i, intersection(box, load_boxes(blocks.boxes, i))),
          [&] { return load<T>(blocks.boxes.areas + i) + splat<V>(box_area); }, [&] { return index(i); });
    }
    is_over = search.found()[0].iou == at_most;
    return is_over;
  });
  Found<T, count> found = search.found();
  // A search that ended early may not have seen what comes after those of the highest IoU.
  for (Best<T>& next : found) {
    if (is_over && next.iou != at_most) next.index = -1;
  }
  return found;
}

// The ground truths that have no prior yet, packed into blocks of neighbours (sort-tile-recursive, Leutenegger et al.,
// 1997), so that a prior is compared only with those around it.
template <class T>
class FreeGroundTruths {
 public:
  FreeGroundTruths(const GroundTruth<T>& gt, std::vector<IntOf<T>> free)
      : index_(std::move(free)), place_(gt.size()), blocks_(pack(gt.columns, index_)) {
    for (size_t i = 0; i < index_.size(); ++i) place_[index_[i]] = int64_t(i);
    index_.resize(blocks_.boxes.padded);
  }

  void remove(int64_t j) {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    blocks_.boxes.set(place_[j], {nan, nan, nan, nan});
  }

  // The one that overlaps a prior most.
  Best<T> best_for(const Box<T>& prior, T at_least) const {
    using V = Vec<T>;
    return best_of<1>(
        blocks_, prior, at_least, std::numeric_limits<T>::infinity(), [](int64_t, V inter) { return inter; },
        [&](int64_t i) {
          IntOf<V> index;
          memcpy(&index, &index_[i], sizeof index);
          return index;
        })[0];
  }

 private:
  // Strips of like height, and each of them from left to right.
  static Blocks<T> pack(const BoxColumns<T>& boxes, std::vector<IntOf<T>>& order) {
    const auto by = [](const T* low, const T* high) {
      return [=](IntOf<T> a, IntOf<T> b) { return low[a] + high[a] < low[b] + high[b]; };
    };
    std::sort(order.begin(), order.end(), by(boxes.y1, boxes.y2));
    const int64_t n = int64_t(order.size());
    const int64_t strip = kBlock<T> * int64_t(std::ceil(std::sqrt(double(n) / kBlock<T>)));
    for (int64_t i = 0; i < n; i += strip) {
      std::sort(order.begin() + i, order.begin() + std::min(i + strip, n), by(boxes.x1, boxes.x2));
    }
    BoxColumns<T> packed(n);
    for (int64_t i = 0; i < n; ++i) packed.set(i, boxes.at(order[i]));
    return Blocks<T>(std::move(packed));
  }

  std::vector<IntOf<T>> index_;  // of a place among the ground truths of the image
  std::vector<int64_t> place_;   // the inverse
  Blocks<T> blocks_;
};

// Joins what joining the best pair of all, then the best of what is left, and so on would join.
//
// Those are the pairs in which each is the best free one of the other, in whatever order they are found. A chain finds
// them: a ground truth, the best prior for it, the best ground truth for that, and so on, to ever better pairs. Once
// two have named each other they are joined, and the chain goes on from what is left of it (the nearest-neighbour
// chain; Preis, 1999, for matchings). Each step adds a ground truth to the chain or removes one for good: there are at
// most two searches of either kind for each.
template <class T>
class Bipartite {
 public:
  Bipartite(const Blocks<T>& priors, const GroundTruth<T>& gt, const Writer<T>& writer)
      : priors_(priors),
        gt_(gt),
        writer_(writer),
        overlap_(std::max(T(writer.rule.min_force_iou), T(0))),
        taken_(priors.boxes.padded, T(0)),
        joined_(gt.size()) {}

  // best[j] is the best prior of ground truth j.
  void join(Best<T>* best) {
    std::vector<IntOf<T>> free;  // ground truths that overlap a prior
    bool shared = false;         // two of them want one
    for (int64_t j = 0; j < gt_.size(); ++j) {
      if (!(best[j].iou > overlap_)) continue;
      free.push_back(IntOf<T>(j));
      shared |= taken_[best[j].index] != T(0);
      taken_[best[j].index] = T(1);
    }
    if (shared) {
      std::fill(taken_.begin(), taken_.end(), T(0));
      join_chains(free, best);
    } else {
      for (const IntOf<T> j : free) claim(best[j].index, j);
    }
    if (writer_.rule.min_force_iou < 0) join_without_overlap();
  }

 private:
  // A ground truth and the prior that named it; prior -1: the chain begins here.
  struct Link {
    T iou;
    int64_t prior, gt;
  };

  void join_chains(const std::vector<IntOf<T>>& free, Best<T>* best) {
    FreeGroundTruths<T> gts(gt_, free);
    Found<T, kNext> none;
    none.fill({T(-1), -1});
    next_.assign(gt_.size(), none);
    std::vector<Link> chain;
    for (const IntOf<T> first : free) {
      if (!joined_[first] && best[first].iou > overlap_) chain.push_back({overlap_, -1, first});
      while (!chain.empty()) {
        const Link link = chain.back();
        Best<T>& wanted = best[link.gt];
        if (wanted.index >= 0 && taken_[wanted.index] != T(0)) wanted = next_prior(link.gt, link.iou, wanted.iou);
        if (wanted.index < 0 || !(wanted.iou > overlap_)) {  // none is left
          chain.pop_back();
          continue;
        }
        const Best<T> named = wanted.index == link.prior ? Best<T>{link.iou, link.gt}
                                                         : gts.best_for(priors_.boxes.at(wanted.index), wanted.iou);
        // A chain holds none twice: the last condition only makes sure of an end.
        if (named.index < 0 || named.index == link.gt || chain.size() == free.size()) {
          claim(wanted.index, link.gt);
          gts.remove(link.gt);
          chain.pop_back();
        } else {
          chain.push_back({named.iou, wanted.index, named.index});
        }
      }
    }
  }

  // At IoU 0 all pairs are equal, and the order of indices decides.
  void join_without_overlap() {
    int64_t p = 0;
    for (int64_t j = 0; j < gt_.size(); ++j) {
      if (joined_[j] || !gt_.valid(j)) continue;
      while (p < priors_.boxes.size && taken_[p] != T(0)) ++p;
      if (p == priors_.boxes.size) return;
      claim(p, j);
    }
  }

  void claim(int64_t p, int64_t j) {
    writer_.matched(p, j);
    taken_[p] = T(1);
    joined_[j] = 1;
  }

  // The free prior that overlaps ground truth j most: one that the last search has found too, or by a new search. Its
  // IoU is at most that of the one before, and if a prior has named the ground truth, `at_least`.
  Best<T> next_prior(int64_t j, T at_least, T at_most) {
    using V = Vec<T>;
    for (const Best<T>& next : next_[j]) {
      if (next.index >= 0 && taken_[next.index] == T(0)) return next;
    }
    const Found<T, 1 + kNext> found = best_of<1 + kNext>(
        priors_, gt_.columns.at(j), at_least, at_most,
        [&](int64_t p, V inter) { return load<T>(&taken_[p]) == V{} ? inter : V{}; },
        [](int64_t p) { return iota<IntOf<T>>() + IntOf<T>(p); });
    std::copy(found.begin() + 1, found.end(), next_[j].begin());
    return found[0];
  }

  static constexpr int kNext = 3;  // priors that a search finds beside the best

  const Blocks<T>& priors_;
  const GroundTruth<T>& gt_;
  const Writer<T>& writer_;
  const T overlap_;                    // pairs are joined above this IoU
  std::vector<T> taken_;               // of each prior, 0 or 1
  std::vector<uint8_t> joined_;        // of each ground truth
  std::vector<Found<T, kNext>> next_;  // of each ground truth: the best free priors after the one that it wanted last
};

// Claims by force, over what match_blocks has written. best[] is used up.
template <class T>
void settle(const Blocks<T>& priors, const GroundTruth<T>& gt, const Writer<T>& writer, Best<T>* best) {
  if (gt.first_valid < 0) return;
  if (writer.rule.force == matching::Force::bipartite) {
    Bipartite<T>(priors, gt, writer).join(best);
  } else if (writer.rule.force == matching::Force::last) {
    for (int64_t j = 0; j < gt.size(); ++j) {
      if (gt.valid(j) && best[j].iou > T(writer.rule.min_force_iou)) writer.matched(best[j].index, j);
    }
  }
}

// All images. With enough of them each is one thread's work; else each is cut into runs of blocks,
// whose best priors are joined in order, so that the lowest index still wins.
template <class T>
void match_all(const T* gt_boxes, const int64_t* gt_labels, const int64_t* offsets, const T* prior_rows,
               const matching::Sizes& sizes, const matching::Rule& rule, const matching::Outputs& out) {
  const Blocks<T> priors = blocks_of_priors(prior_rows, sizes.priors);
  const int64_t blocks = priors.hulls.size, threads = torch::stable::get_num_threads();
  const auto image = [&](int64_t b, auto&& f) {
    const GroundTruth<T> gt(gt_boxes + 4 * offsets[b], gt_labels ? gt_labels + offsets[b] : nullptr,
                            offsets[b + 1] - offsets[b]);
    const int64_t row = b * sizes.priors;
    f(gt,
      Writer<T>{prior_rows, gt, rule, out.matches ? out.matches + row : nullptr,
                out.labels ? out.labels + row : nullptr, out.deltas ? static_cast<T*>(out.deltas) + 4 * row : nullptr});
  };
  if (sizes.images >= threads || blocks < 2 * threads) {
    parallel_for(sizes.images, 1, [&](int64_t begin, int64_t end) {
      std::vector<Best<T>> best;
      for (int64_t b = begin; b < end; ++b) {
        image(b, [&](const GroundTruth<T>& gt, const Writer<T>& writer) {
          best.resize(gt.size());
          match_blocks(priors, gt, writer, 0, blocks, best.data());
          settle(priors, gt, writer, best.data());
        });
      }
    });
    return;
  }
  for (int64_t b = 0; b < sizes.images; ++b) {
    image(b, [&](const GroundTruth<T>& gt, const Writer<T>& writer) {
      const int64_t n = gt.size();
      std::vector<Best<T>> best(threads * n, Best<T>{T(-1), -1});
      parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          match_blocks(priors, gt, writer, blocks * t / threads, blocks * (t + 1) / threads, best.data() + t * n);
        }
      });
      for (int64_t t = 1; t < threads; ++t) {
        for (int64_t j = 0; j < n; ++j) {
          if (best[t * n + j].iou > best[j].iou) best[j] = best[t * n + j];
        }
      }
      settle(priors, gt, writer, best.data());
    });
  }
}
