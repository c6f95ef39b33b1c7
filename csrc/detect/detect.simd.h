// CPU kernel of detect; compiled once per SIMD level.
//
// Candidates are visited lazily, best first over all classes, until max_detections are kept: of an
// untrained detector's hundreds of thousands most are never sorted, nor their boxes decoded. So a first
// pass over the logits collects only the best few (Shortlist). Where they run out, because too many
// were suppressed, a second pass collects every candidate that counts (ClassLists).

constexpr int64_t kLeastShort = 512;    // keys that a shortlist is cut to, at the least,
constexpr int64_t kOverflow = 8;        // when it holds so many times as many
constexpr int64_t kAhead = 12;          // keys between the one visited and the one whose deltas are fetched
constexpr int64_t kFirstSorted = 384;   // keys sorted at first; then four times as many, and so on
constexpr int64_t kColumnRows = 256;    // rows looked at together where classes are the outer dimension
constexpr int64_t kRowsOfSlice = 1024;  // rows worth a thread, where there are few images

template <class T>
using Key = detect::Key<T>;

// ---- reading ----------------------------------------------------------------------------------

template <class T, class S>
void widen(const void* data, int64_t first, int64_t stride, int64_t n, T* to) {
  const S* from = static_cast<const S*>(data) + first;
  for (int64_t i = 0; i < n; ++i) to[i] = T(from[i * stride]);
}

// The first n elements of a row as T, which holds them.
template <class T>
void gather(const detect::Strided& from, int64_t image, int64_t row, int64_t n, T* to) {
  const int64_t first = image * from.image + row * from.row;
  switch (from.dtype) {
    case DType::f32:
      return widen<T, float>(from.data, first, from.column, n, to);
    case DType::f64:
      return widen<T, double>(from.data, first, from.column, n, to);
    case DType::f16:
      return widen<T, torch::headeronly::Half>(from.data, first, from.column, n, to);
    case DType::bf16:
      return widen<T, torch::headeronly::BFloat16>(from.data, first, from.column, n, to);
  }
}

template <class T>
CenterBox<T> four_at(const detect::Strided& from, int64_t image, int64_t row) {
  T v[4];
  gather(from, image, row, 4, v);
  return {v[0], v[1], v[2], v[3]};
}

// The box of a prior, decoded and clipped. A NaN stays NaN.
template <class T>
Box<T> detected_box(const detect::Inputs& in, int64_t image, int64_t prior) {
  const detect::Params& p = in.params;
  const Box<T> b = decode_box(four_at<T>(in.deltas, image, prior), four_at<T>(in.priors, 0, prior), T(p.center),
                              T(p.size), T(p.clip));
  return clip_box(b, p.window);
}

// ---- collecting candidates --------------------------------------------------------------------

// A row's scores of every class are at least these to be candidates; infinite for what is none.
template <class T>
struct Floors {
  std::vector<T> of_class;  // [classes, filled up to whole steps of kSumLanes]
  T logit;                  // detect::reject_below of the least of them
  T share;                  // a term of softmax below floor * share * (the sum of all) has a score below floor

  explicit Floors(const detect::Inputs& in) : of_class(detect::padded(in.sizes.classes), kInfinity) {
    set_all(in, least(in));
  }

  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  // The least score above the threshold: a normal number for a thread that takes others for 0 (set_flush_denormal).
  static T least(const detect::Inputs& in) {
    const T threshold = T(in.params.score_threshold), next = std::nextafter(threshold, kInfinity);
    return next > threshold ? next : std::numeric_limits<T>::min();
  }

  void set_all(const detect::Inputs& in, T floor) {
    for (int64_t c = in.params.sigmoid ? 0 : 1; c < in.sizes.classes; ++c) of_class[c] = floor;
    logit = detect::reject_below(floor, in.params.sigmoid);
    // Next to denormals products round too coarsely: then every quotient is taken.
    share = floor < T(1e-30) ? T(0) : T(1 - 1e-6);
  }
};

// The best keys of all.
template <class T>
class Shortlist {
 public:
  Floors<T> floors;
  std::vector<Key<T>> keys;
  Key<T> dropped = 0;  // the greatest of those that were left out

  explicit Shortlist(const detect::Inputs& in)
      : floors(in), in_(in), size_(std::max(kLeastShort, 2 * in.params.max_detections)) {}

  void clear() {
    keys.clear();
    dropped = 0;
    floors.set_all(in_, floors.least(in_));
  }

  void add(int64_t, Key<T> key) {
    if (key < dropped) return;
    keys.push_back(key);
    if (int64_t(keys.size()) < kOverflow * size_) return;
    std::nth_element(keys.begin(), keys.begin() + size_, keys.end(), std::greater<Key<T>>());
    dropped = keys[size_];
    keys.resize(size_);
    floors.set_all(in_, detect::score_of<T>(dropped));
  }

 private:
  const detect::Inputs& in_;
  int64_t size_;
};

// The topk_per_class best keys of each class.
template <class T>
class ClassLists {
 public:
  Floors<T> floors;

  explicit ClassLists(const detect::Inputs& in)
      : floors(in), lists_(in.sizes.classes), size_(std::min(in.params.topk_per_class, in.sizes.priors)) {}

  void add(int64_t c, Key<T> key) {
    List& list = lists_[c];
    if (key < list.dropped) return;
    list.keys.push_back(key);
    if (int64_t(list.keys.size()) < 2 * size_) return;
    shorten(list);
    floors.of_class[c] = detect::score_of<T>(list.dropped);
  }

  std::vector<Key<T>> all() {
    std::vector<Key<T>> keys;
    for (List& list : lists_) {
      if (int64_t(list.keys.size()) > size_) shorten(list);
      keys.insert(keys.end(), list.keys.begin(), list.keys.end());
    }
    return keys;
  }

 private:
  struct List {
    std::vector<Key<T>> keys;
    Key<T> dropped = 0;
  };

  void shorten(List& list) {
    std::nth_element(list.keys.begin(), list.keys.begin() + size_, list.keys.end(), std::greater<Key<T>>());
    list.dropped = list.keys[size_];
    list.keys.resize(size_);
  }

  std::vector<List> lists_;
  int64_t size_;
};

// Whether no class of a row can reach its floor; x is contiguous. May say no where the answer is yes.
template <class T>
inline __attribute__((always_inline)) bool rejected(const T* x, int64_t classes, bool is_sigmoid, T bound) {
  using V = Vec<T>;
  const int64_t first = is_sigmoid ? 0 : 1;
  const T base = is_sigmoid ? T(0) : x[0];
  if (classes - first < kLanes<T>) {
    for (int64_t c = first; c < classes; ++c) {
      if (x[c] - base > bound) return false;
    }
    return true;
  }
  const V nothing = splat<V>(-std::numeric_limits<T>::infinity());
  V most = max_of(load<T>(x + classes - kLanes<T>), nothing);  // a NaN is passed over: sigmoid's others count
  for (int64_t c = first; c + kLanes<T> < classes; c += kLanes<T>) most = max_of(load<T>(x + c), most);
  return !greater_bits(most - base, splat<V>(bound));
}

// All kSumLanes lanes of some vectors as one, by halves: lane l and lane l + 8, 4, 2, 1; in every lane.
template <int kHalf, class V, int... I>
inline __attribute__((always_inline)) V swap_halves(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ kHalf)...);
}
template <int kHalf, class V, class F>
inline __attribute__((always_inline)) V fold_lanes(V v, const F& f) {
  if constexpr (kHalf == 0) {
    return v;
  } else {
    const V other = swap_halves<kHalf>(v, std::make_integer_sequence<int, int(sizeof(V) / sizeof(ScalarOf<V>))>{});
    return fold_lanes<kHalf / 2>(f(v, other), f);
  }
}
template <int kParts, class V, class F>
inline __attribute__((always_inline)) V fold(V (&v)[kParts], const F& f) {
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int part = 0; part < half; ++part) v[part] = f(v[part], v[part + half]);
  }
  return fold_lanes<int(sizeof(V) / sizeof(ScalarOf<V>)) / 2>(v[0], f);
}

// The scores of one row at a time.
template <class T>
class Row {
 public:
  explicit Row(const detect::Inputs& in)
      : classes_(in.sizes.classes),
        padded_(detect::padded(classes_)),
        sigmoid_(in.params.sigmoid),
        // Behind the last class: terms of 0, which change no sum.
        logits_(padded_, -std::numeric_limits<T>::infinity()),
        scores_(padded_) {}

  T* logits() { return logits_.data(); }  // to be filled with a row

  // Adds the candidates among logits() to the list; number: of the row's prior in class 0.
  template <class List>
  void score(List& list, int64_t prior, int64_t priors) {
    using V = Vec<T>;
    if (sigmoid_) {
      emit(
          list, prior, priors, splat<V>(1), [&](int64_t c) { return sigmoid(load<T>(&logits_[c])); },
          [](V scores) { return scores; });
      return;
    }
    constexpr int lanes = kLanes<T>, parts = detect::kSumLanes / lanes;
    V most[parts], sums[parts] = {};
    for (int part = 0; part < parts; ++part) most[part] = load<T>(&logits_[part * lanes]);
    for (int64_t c = detect::kSumLanes; c < padded_; c += detect::kSumLanes) {
      for (int part = 0; part < parts; ++part) most[part] = max_of(load<T>(&logits_[c + part * lanes]), most[part]);
    }
    const V greatest = fold(most, [](V a, V b) { return max_of(a, b); });
    for (int64_t c = 0; c < padded_; c += detect::kSumLanes) {
      for (int part = 0; part < parts; ++part) {
        const V term = exp(load<T>(&logits_[c + part * lanes]) - greatest);
        store(&scores_[c + part * lanes], term);
        sums[part] += term;
      }
    }
    const V sum = fold(sums, [](V a, V b) { return a + b; });
    emit(
        list, prior, priors, sum * list.floors.share, [&](int64_t c) { return load<T>(&scores_[c]); },
        [&](V terms) { return terms / sum; });
  }

 private:
  // The candidates among score(term(c)), c = 0, 1, ...; a term below its floor times `share` is none.
  template <class List, class Term, class Score>
  inline __attribute__((always_inline)) void emit(List& list, int64_t prior, int64_t priors, Vec<T> share,
                                                  const Term& term, const Score& score) {
    for (int64_t c = 0; c < padded_; c += kLanes<T>) {
      const Vec<T> terms = term(c), floors = load<T>(&list.floors.of_class[c]);
      if (!mask_bits(terms >= floors * share)) continue;
      const Vec<T> scores = score(terms);
      store(&scores_[c], scores);
      for (unsigned above = mask_bits(scores >= floors); above; above &= above - 1) {
        const int64_t k = c + __builtin_ctz(above);
        list.add(k, detect::make_key(scores_[k], uint32_t(k * priors + prior)));
      }
    }
  }

  int64_t classes_, padded_;
  bool sigmoid_;
  std::vector<T> logits_, scores_;
};

// most[i] = the greatest logit, but for a NaN, of prior i for any class; a class's logits are contiguous.
template <class T>
void greatest_of_columns(const T* x, int64_t stride, int64_t first, int64_t classes, int64_t n, T* most) {
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  std::fill(most, most + n, -std::numeric_limits<T>::infinity());
  for (int64_t c = first; c < classes; ++c) {
    const T* column = x + c * stride;
    for (int64_t i = 0; i < whole; i += kLanes<T>) store(most + i, max_of(load<T>(column + i), load<T>(most + i)));
    for (int64_t i = whole; i < n; ++i) most[i] = max_of(column[i], most[i]);
  }
}

// Adds the candidates among priors begin .. end of an image to the list.
template <class T, class List>
void collect(const detect::Inputs& in, int64_t image, int64_t begin, int64_t end, List& list) {
  const detect::Strided& logits = in.logits;
  const int64_t classes = in.sizes.classes, priors = in.sizes.priors;
  if (classes == 0) return;
  const bool native = logits.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32), is_sigmoid = in.params.sigmoid;
  Row<T> row(in);
  const auto gather_row = [&](int64_t p) { gather(logits, image, p, classes, row.logits()); };
  if (native && (logits.column == 1 || classes == 1)) {
    const T* x = static_cast<const T*>(logits.data) + image * logits.image;
    for (int64_t p = begin; p < end; ++p) {
      const T* from = x + p * logits.row;
      if (rejected(from, classes, is_sigmoid, list.floors.logit)) continue;
      memcpy(row.logits(), from, classes * sizeof(T));
      row.score(list, p, priors);
    }
  } else if (native && logits.row == 1) {
    T most[kColumnRows];
    for (int64_t p = begin; p < end; p += kColumnRows) {
      const T* x = static_cast<const T*>(logits.data) + image * logits.image + p;
      const int64_t n = std::min(kColumnRows, end - p);
      greatest_of_columns(x, logits.column, is_sigmoid ? 0 : 1, classes, n, most);
      for (int64_t i = 0; i < n; ++i) {
        if (!(most[i] - (is_sigmoid ? T(0) : x[i]) > list.floors.logit)) continue;
        gather_row(p + i);
        row.score(list, p + i, priors);
      }
    }
  } else {
    for (int64_t p = begin; p < end; ++p) {
      gather_row(p);
      if (!rejected<T>(row.logits(), classes, is_sigmoid, list.floors.logit)) row.score(list, p, priors);
    }
  }
}

// ---- visiting them ----------------------------------------------------------------------------

// Kept boxes, class by class, in chained blocks of one vector.
template <class T>
class Kept {
 public:
  Kept(int64_t groups, T threshold) : test_(threshold), last_(groups, -1) {}

  bool overlaps(int64_t group, const Box<T>& box) const {
    const OverlapQuery<T> query = test_.query(box);
    for (int32_t i = last_[group]; i >= 0; i = blocks_[i].next) {
      const T(&columns)[6][kLanes<T>] = blocks_[i].columns;
      const auto column = [&](int c) { return load<T>(columns[c]); };
      if (test_.any({column(0), column(1), column(2), column(3)}, column(4), column(5), query)) return true;
    }
    return false;
  }

  void add(int64_t group, const Box<T>& box) {
    if (last_[group] < 0 || blocks_[last_[group]].size == kLanes<T>) {
      blocks_.push_back({{}, 0, last_[group]});  // boxes without area overlap nothing
      last_[group] = int32_t(blocks_.size() - 1);
    }
    Block& block = blocks_[last_[group]];
    const T values[] = {box.x1, box.y1, box.x2, box.y2, area(box), test_.share_of(box)};
    for (int c = 0; c < 6; ++c) block.columns[c][block.size] = values[c];
    ++block.size;
  }

 private:
  struct Block {
    T columns[6][kLanes<T>];  // x1, y1, x2, y2, area, share
    int32_t size, next;       // next: -1 for the last
  };

  OverlapTest<T> test_;
  std::vector<Block> blocks_;
  std::vector<int32_t> last_;  // of each group
};

// Visits the keys above `bound`, in any order given, and writes an image's detections; returns whether they
// are all there are: false where candidates up to the bound might have added some.
template <class T>
bool visit(const detect::Inputs& in, int64_t image, std::vector<Key<T>>& keys, Key<T> bound,
           const detect::Outputs<T>& out) {
  const detect::Params& params = in.params;
  const int64_t classes = in.sizes.classes, priors = in.sizes.priors, most = params.max_detections;
  T *boxes = out.boxes + image * most * 4, *scores = out.scores + image * most;
  int64_t* labels = out.labels + image * most;
  Kept<T> kept(params.class_agnostic ? 1 : classes, T(params.iou_threshold));
  const DType of_deltas = in.deltas.dtype;
  const int64_t delta_bytes = of_deltas == DType::f64 ? 8 : of_deltas == DType::f32 ? 4 : 2;
  std::vector<int64_t> visited(classes);
  int64_t count = 0, sorted = 0, next = kFirstSorted;
  keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key<T> key) { return key <= bound; }), keys.end());
  for (int64_t i = 0; i < int64_t(keys.size()) && count < most; ++i) {
    if (i == sorted) {
      const auto begin = keys.begin() + sorted;
      sorted = std::min(sorted + next, int64_t(keys.size()));
      next *= 4;
      const auto end = keys.begin() + sorted;
      if (end != keys.end()) std::nth_element(begin, end, keys.end(), std::greater<Key<T>>());
      std::sort(begin, end, std::greater<Key<T>>());
    }
    if (i + kAhead < sorted) {
      const int64_t prior = detect::number_of<T>(keys[i + kAhead]) % priors;
      const int64_t at = image * in.deltas.image + prior * in.deltas.row;
      __builtin_prefetch(static_cast<const char*>(in.deltas.data) + at * delta_bytes);
    }
    const int64_t number = detect::number_of<T>(keys[i]), column = number / priors;
    if (visited[column]++ >= params.topk_per_class) continue;
    const Box<T> box = detected_box<T>(in, image, number - column * priors);
    const int64_t group = params.class_agnostic ? 0 : column;
    if (kept.overlaps(group, box)) continue;
    kept.add(group, box);
    const Box<T> shown = clip_box(box, params.inner_window);
    T* to = boxes + 4 * count;
    to[0] = shown.x1;
    to[1] = shown.y1;
    to[2] = shown.x2;
    to[3] = shown.y2;
    scores[count] = detect::score_of<T>(keys[i]);
    labels[count] = detect::label_of(column, params);
    ++count;
  }
  out.counts[image] = count;
  std::fill(boxes + 4 * count, boxes + 4 * most, T(0));
  std::fill(scores + count, scores + most, T(0));
  std::fill(labels + count, labels + most, int64_t{-1});
  return count == most || bound == 0;
}

// An image whose candidates stand in the shortlists of its slices.
template <class T>
void finish(const detect::Inputs& in, int64_t image, Shortlist<T>* slices, int64_t count,
            const detect::Outputs<T>& out) {
  Key<T> dropped = 0;
  for (int64_t s = 0; s < count; ++s) {
    dropped = std::max(dropped, slices[s].dropped);
    if (s > 0) slices[0].keys.insert(slices[0].keys.end(), slices[s].keys.begin(), slices[s].keys.end());
  }
  if (visit(in, image, slices[0].keys, dropped, out)) return;
  ClassLists<T> lists(in);
  collect<T>(in, image, 0, in.sizes.priors, lists);
  std::vector<Key<T>> keys = lists.all();
  visit(in, image, keys, Key<T>(0), out);
}

template <class T>
void detect_images(const detect::Inputs& in, const detect::Outputs<T>& out) {
  const int64_t images = in.sizes.images, priors = in.sizes.priors;
  if (images == 0) return;
  // Slices of rows, so that a few images keep all threads busy. The result does not depend on them.
  const int64_t wanted = (2 * int64_t(torch::stable::get_num_threads()) + images - 1) / images;
  const int64_t slices = std::max(int64_t{1}, std::min(wanted, priors / kRowsOfSlice));
  const auto collect_slice = [&](int64_t image, int64_t slice, Shortlist<T>& list) {
    collect<T>(in, image, priors * slice / slices, priors * (slice + 1) / slices, list);
  };
  if (slices == 1) {
    parallel_for(images, 1, [&](int64_t begin, int64_t end) {
      Shortlist<T> list(in);
      for (int64_t image = begin; image < end; ++image) {
        list.clear();
        collect_slice(image, 0, list);
        finish(in, image, &list, 1, out);
      }
    });
    return;
  }
  std::vector<Shortlist<T>> lists(images * slices, Shortlist<T>(in));
  parallel_for(images * slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) collect_slice(i / slices, i % slices, lists[i]);
  });
  parallel_for(images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) finish(in, image, &lists[image * slices], slices, out);
  });
}
