// CPU kernels of matching; compiled once per SIMD level.
//
// Priors are walked in blocks of four vectors. Only ground truths that overlap a block's bounding box
// are compared with its priors: the others have IoU 0 there, which changes no maximum.

template <class T>
constexpr int64_t kBlock = 4 * kLanes<T>;

// Priors as columns of corners, and the bounding box of each block.
template <class T>
struct PriorBlocks {
  BoxColumns<T> corners;
  std::vector<Box<T>> bounds;

  PriorBlocks(const T* priors, int64_t n) : corners(n), bounds((n + kBlock<T> - 1) / kBlock<T>) {
    using V = Vec<T>;
    const V inf = splat<V>(std::numeric_limits<T>::infinity());
    T last[4 * kBlock<T>] = {};  // the rows of an unfinished block, then zeros
    for (size_t b = 0; b < bounds.size(); ++b) {
      const int64_t p0 = b * kBlock<T>;
      const T* rows = priors + 4 * p0;
      if (n - p0 < kBlock<T>) {
        memcpy(last, rows, 4 * (n - p0) * sizeof(T));
        rows = last;
      }
      Box<V> box{inf, inf, -inf, -inf};
      for (int64_t i = 0; i < kBlock<T>; i += kLanes<T>) {
        const Box<V> some = to_corners(load_columns(rows + 4 * i));
        store(corners.x1 + p0 + i, some.x1);
        store(corners.y1 + p0 + i, some.y1);
        store(corners.x2 + p0 + i, some.x2);
        store(corners.y2 + p0 + i, some.y2);
        store(corners.areas + p0 + i, area(some));
        // A NaN corner leaves the bounds alone: its IoU is 0 with everything.
        box = {min_of(some.x1, box.x1), min_of(some.y1, box.y1), max_of(some.x2, box.x2), max_of(some.y2, box.y2)};
      }
      Box<T> all{box.x1[0], box.y1[0], box.x2[0], box.y2[0]};
      for (int i = 1; i < kLanes<T>; ++i) {
        all = {min_of(box.x1[i], all.x1), min_of(box.y1[i], all.y1), max_of(box.x2[i], all.x2),
               max_of(box.y2[i], all.y2)};
      }
      bounds[b] = all;
    }
  }
};

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

// The best prior of a ground truth so far.
template <class T>
struct BestPrior {
  T iou;
  int64_t prior;  // -1: none
};

// The greatest value of all lanes, the lowest index among equals.
template <class T>
BestPrior<T> best_lane(Vec<T> iou, IntOf<Vec<T>> prior) {
  BestPrior<T> best{iou[0], prior[0]};
  for (int i = 1; i < kLanes<T>; ++i) {
    if (iou[i] > best.iou || (iou[i] == best.iou && prior[i] < best.prior)) best = {iou[i], prior[i]};
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
void match_blocks(const PriorBlocks<T>& priors, const GroundTruth<T>& gt, const Writer<T>& writer, int64_t begin,
                  int64_t end, BestPrior<T>* best) {
  using V = Vec<T>;
  using I = IntOf<V>;
  constexpr int vectors = 4;
  const int64_t num_priors = priors.corners.size, n = gt.size();
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
    const Box<V> bounds = broadcast(priors.bounds[block]);
    V best_iou[vectors];
    I best_gt[vectors];
    for (int v = 0; v < vectors; ++v) {
      best_iou[v] = zero;
      best_gt[v] = splat<I>(IntOf<T>(gt.first_valid));
    }
    for (int64_t j0 = 0; j0 < n; j0 += kLanes<T>) {
      const Box<V> some = load_boxes(gt.columns, j0);
      unsigned near = mask_bits(may_meet(some, bounds));
      if (n - j0 < kLanes<T>) near &= (1u << (n - j0)) - 1;
      for (; near; near &= near - 1) {
        const int64_t j = j0 + __builtin_ctz(near);
        const Box<V> box = broadcast(Box<T>{gt.columns.x1[j], gt.columns.y1[j], gt.columns.x2[j], gt.columns.y2[j]});
        const V gt_area = splat<V>(gt.columns.areas[j]);
        V top_iou = load<T>(&lane_iou[j * kLanes<T>]);
        I top_prior;
        memcpy(&top_prior, &lane_prior[j * kLanes<T>], sizeof top_prior);
        const I lane = iota<IntOf<T>>();
        for (int v = 0; v < vectors; ++v) {
          const int64_t p = p0 + v * kLanes<T>;
          const V inter = intersection(box, load_boxes(priors.corners, p));
          if (!greater_bits(inter, zero)) continue;
          const V value = iou_from(inter, gt_area, load<T>(priors.corners.areas + p));
          const auto better = value > best_iou[v];
          best_iou[v] = better ? value : best_iou[v];
          best_gt[v] = better ? splat<I>(IntOf<T>(j)) : best_gt[v];
          const auto top = value > top_iou;
          top_iou = top ? value : top_iou;
          top_prior = top ? lane + IntOf<T>(p) : top_prior;
        }
        store(&lane_iou[j * kLanes<T>], top_iou);
        memcpy(&lane_prior[j * kLanes<T>], &top_prior, sizeof top_prior);
      }
    }
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
    best[j] = gt.valid(j) ? best_lane<T>(load<T>(&lane_iou[j * kLanes<T>]), lane_index) : BestPrior<T>{T(-1), -1};
  }
}

// The best prior that nobody has claimed; taken[p] != 0 marks the claimed ones.
template <class T>
BestPrior<T> best_free_prior(const PriorBlocks<T>& priors, const GroundTruth<T>& gt, int64_t j,
                             const std::vector<T>& taken) {
  using V = Vec<T>;
  using I = IntOf<V>;
  const Box<V> box = broadcast(Box<T>{gt.columns.x1[j], gt.columns.y1[j], gt.columns.x2[j], gt.columns.y2[j]});
  const V gt_area = splat<V>(gt.columns.areas[j]), none = splat<V>(-1);
  V best = none;
  I prior = I{} - 1;
  for (int64_t p = 0; p < priors.corners.padded; p += kLanes<T>) {
    const V value =
        iou_from(intersection(box, load_boxes(priors.corners, p)), gt_area, load<T>(priors.corners.areas + p));
    const V open = load<T>(&taken[p]) == splat<V>(0) ? value : none;
    const auto better = open > best;
    best = better ? open : best;
    prior = better ? iota<IntOf<T>>() + IntOf<T>(p) : prior;
  }
  // Lanes that found nothing hold -1, which must not win as the lowest index.
  prior = best < splat<V>(0) ? I{} + std::numeric_limits<IntOf<T>>::max() : prior;
  const BestPrior<T> found = best_lane<T>(best, prior);
  return found.iou < T(0) ? BestPrior<T>{T(-1), -1} : found;
}

// Joins the best remaining pair until ground truths or priors run out. best[] is used up.
template <class T>
void settle_bipartite(const PriorBlocks<T>& priors, const GroundTruth<T>& gt, const Writer<T>& writer,
                      BestPrior<T>* best) {
  const int64_t n = gt.size();
  std::vector<T> taken(priors.corners.padded, T(0));
  for (int64_t p = priors.corners.size; p < priors.corners.padded; ++p) taken[p] = T(1);
  for (;;) {
    int64_t winner = -1;
    for (int64_t j = 0; j < n; ++j) {
      if (best[j].prior < 0) continue;
      if (winner < 0 || best[j].iou > best[winner].iou ||
          (best[j].iou == best[winner].iou && best[j].prior < best[winner].prior)) {
        winner = j;
      }
    }
    if (winner < 0) return;
    const int64_t p = best[winner].prior;
    writer.matched(p, winner);
    taken[p] = T(1);
    best[winner].prior = -1;
    // Ground truths that wanted this prior look for another. Equal boxes find the same one, so a
    // thousand copies of a box cost one search a round, not a thousand.
    int64_t searched = -1;
    for (int64_t j = 0; j < n; ++j) {
      if (best[j].prior != p) continue;
      if (searched < 0 || memcmp(gt.rows + 4 * j, gt.rows + 4 * searched, 4 * sizeof(T)) != 0) {
        best[j] = best_free_prior(priors, gt, j, taken);
        searched = j;
      } else {
        best[j] = best[searched];
      }
    }
  }
}

// Claims by force, over what match_blocks has written.
template <class T>
void settle(const PriorBlocks<T>& priors, const GroundTruth<T>& gt, const Writer<T>& writer, BestPrior<T>* best) {
  if (gt.first_valid < 0 || writer.rule.force == matching::Force::none) return;
  const int64_t n = gt.size();
  bool shared = false;  // two ground truths want one prior
  if (writer.rule.force == matching::Force::bipartite) {
    std::vector<int64_t> wanted;
    for (int64_t j = 0; j < n; ++j) {
      if (best[j].prior >= 0) wanted.push_back(best[j].prior);
    }
    std::sort(wanted.begin(), wanted.end());
    shared = std::adjacent_find(wanted.begin(), wanted.end()) != wanted.end();
  }
  if (shared) {
    settle_bipartite(priors, gt, writer, best);
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    if (best[j].prior >= 0) writer.matched(best[j].prior, j);
  }
}

// All images. With enough of them each is one thread's work; else each is cut into runs of blocks,
// whose best priors are joined in order, so that the lowest index still wins.
template <class T>
void match_all(const T* gt_boxes, const int64_t* gt_labels, const int64_t* offsets, const T* prior_rows,
               const matching::Sizes& sizes, const matching::Rule& rule, const matching::Outputs& out) {
  const PriorBlocks<T> priors(prior_rows, sizes.priors);
  const int64_t blocks = int64_t(priors.bounds.size()), threads = torch::stable::get_num_threads();
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
      std::vector<BestPrior<T>> best;
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
      std::vector<BestPrior<T>> best(threads * n, BestPrior<T>{T(-1), -1});
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
