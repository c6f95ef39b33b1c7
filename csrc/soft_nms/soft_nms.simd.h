// CPU kernel of soft_nms; compiled once per SIMD level.

#include "soft_nms/decay.inl"

template <class T>
struct Pick {
  T score;
  int64_t position;
  int64_t alive;  // candidates left
};

// Lowers the scores of `size` candidates by their overlap with `taken`, and in the same pass finds
// the best of them: the first, among equals. A score at or below the floor becomes -inf, for good.
template <class T>
Pick<T> decay_and_pick(const BoxColumns<T>& boxes, T* scores, int64_t size, const Box<T>& taken,
                       const soft_nms::Params& params) {
  using V = Vec<T>;
  using I = IntOf<V>;
  constexpr T kGone = -std::numeric_limits<T>::infinity();
  const V gone = splat<V>(kGone), floor = splat<V>(soft_nms::floor_of<T>(params));
  const Box<V> box = broadcast(taken);
  const bool linear = params.method == soft_nms::Method::linear;
  const T threshold = T(params.iou_threshold), sigma = T(params.sigma);
  const V box_area = splat<V>(area(taken));
  V best = gone;
  I best_step{}, alive{};
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    V score = load<T>(scores + i);
    // No branch past boxes that do not meet: it would be mispredicted more dearly than the work it spares.
    const V overlap = iou_from(intersection(box, load_boxes(boxes, i)), box_area, load<T>(boxes.areas + i));
    score = score * decay(overlap, linear, threshold, sigma);
    score = score > floor ? score : gone;
    store(scores + i, score);
    const I better = score > best;
    best = better ? score : best;
    best_step = better ? I{} + IntOf<T>(i / kLanes<T>) : best_step;
    alive -= score > gone;
  }
  Pick<T> pick{kGone, 0, 0};
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const int64_t position = int64_t(best_step[lane]) * kLanes<T> + lane;
    if (best[lane] > pick.score || (best[lane] == pick.score && position < pick.position)) {
      pick.score = best[lane];
      pick.position = position;
    }
    pick.alive += alive[lane];
  }
  return pick;
}

// Moves the candidates left to the front, in order; returns their number.
template <class T>
int64_t compact(BoxColumns<T>& boxes, T* scores, int64_t* index, int64_t size) {
  constexpr T kGone = -std::numeric_limits<T>::infinity();
  int64_t to = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (!(scores[i] > kGone)) continue;
    boxes.set(to, boxes.at(i));
    scores[to] = scores[i];
    index[to] = index[i];
    ++to;
  }
  for (int64_t i = to; i < size; ++i) scores[i] = kGone;
  return to;
}

// Returns the count; keep and out_scores are written up to it.
template <class T>
int64_t soft_nms(const T* box_rows, const T* first_scores, int64_t n, const soft_nms::Params& params, int64_t* keep,
                 T* out_scores) {
  const T floor = soft_nms::floor_of<T>(params);
  std::vector<int64_t> index;  // of the candidates
  for (int64_t i = 0; i < n; ++i) {
    if (first_scores[i] > floor) index.push_back(i);
  }
  int64_t size = int64_t(index.size()), count = 0;
  BoxColumns<T> boxes(size);
  std::vector<T> scores(boxes.padded, -std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < size; ++i) {
    boxes.set(i, box_at(box_rows, index[i]));
    scores[i] = first_scores[index[i]];
  }
  Box<T> taken{};  // at first a box that meets none
  for (;;) {
    const Pick<T> pick = decay_and_pick(boxes, scores.data(), size, taken, params);
    if (!(pick.score > T(params.score_threshold))) return count;
    keep[count] = index[pick.position];
    out_scores[count] = pick.score;
    ++count;
    taken = boxes.at(pick.position);
    scores[pick.position] = -std::numeric_limits<T>::infinity();
    if (pick.alive < size / 4 * 3) size = compact(boxes, scores.data(), index.data(), size);
  }
}
