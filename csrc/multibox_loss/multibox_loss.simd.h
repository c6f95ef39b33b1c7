// CPU kernels of multibox_loss; compiled once per SIMD level. S is a type that tensors hold, T the one it is
// computed in.

#include "multibox_loss/rank.inl"

template <class S>
using ComputedIn = std::conditional_t<std::is_same_v<S, double>, double, float>;

// ---- one row of logits --------------------------------------------------------------------------

// Sum over foreground classes c != omitted of exp(x[c] - base), in kLanes partial sums.
template <class T>
inline __attribute__((always_inline)) Vec<T> partial_sums(const T* x, int64_t classes, T base, int64_t omitted = 0) {
  using V = Vec<T>;
  using I = IntOf<T>;
  constexpr int lanes = kLanes<T>, parts = multibox_loss::kWays / lanes;
  constexpr T nothing = -std::numeric_limits<T>::infinity();  // whose exponential is 0
  const V bases = splat<V>(base);
  V sums[parts] = {};
  const auto add = [&](int part, int64_t c, V logits) {
    if (omitted) logits = iota<I>() == I(omitted - c) ? splat<V>(nothing) : logits;
    sums[part] += exp(logits - bases);
  };
  int64_t c = 1;
  for (; c + multibox_loss::kWays <= classes; c += multibox_loss::kWays) {
    for (int part = 0; part < parts; ++part) add(part, c + part * lanes, load<T>(x + c + part * lanes));
  }
  if (c < classes) {
    for (int part = 0; part < parts; ++part, c += lanes) add(part, c, load_first<T>(x + c, classes - c, nothing));
  }
  for (int half = parts / 2; half > 0; half /= 2) {
    for (int part = 0; part < half; ++part) sums[part] += sums[part + half];
  }
  return sums[0];
}

template <class T>
T sum_over_classes(const T* x, int64_t classes, T base, int64_t omitted) {
  Vec<T> sums[kLanes<T>] = {partial_sums(x, classes, base, omitted)};
  const T foreground = sums_of_lanes<T>(sums)[0];
  return omitted ? foreground + exp(x[0] - base) : foreground;
}

// Where the sum over c != y is not finite.
template <class T>
struct Softmax {
  T top, sum;  // the greatest logit, sum over all c of exp(x[c] - top)
};
template <class T>
Softmax<T> softmax_of(const T* x, int64_t classes) {
  T top = x[0];
  for (int64_t c = 1; c < classes; ++c) top = max_of(x[c], top);
  constexpr int64_t none = std::numeric_limits<int32_t>::max();  // class 0 is added then, and nothing omitted
  return {top, sum_over_classes(x, classes, top, none)};
}

// The rank of a row of label y, 0 <= y < classes.
template <class T>
IntOf<T> rank_of_row(const T* x, int64_t classes, int64_t y) {
  const T sum = sum_over_classes(x, classes, x[y], y) + (x[y] - x[y]);
  if (sum <= std::numeric_limits<T>::max()) return rank_of_sum(sum);
  const Softmax<T> softmax = softmax_of(x, classes);
  return rank_of_large_loss(softmax.top, x[y], softmax.sum);
}

// The gradient of scale * loss.
template <class T>
void gradient_of_row(const T* x, int64_t classes, int64_t y, IntOf<T> rank, T scale, T* gradient) {
  T base, divisor, at_label;
  if (rank < 0) {
    const T sum = sum_of_rank<T>(rank);
    base = x[y];
    divisor = 1 + sum;
    at_label = -sum / divisor;
  } else {
    const Softmax<T> softmax = softmax_of(x, classes);
    base = softmax.top;
    divisor = softmax.sum;
    at_label = exp(x[y] - base) / divisor - 1;
  }
  const auto step = [&](Vec<T> logits) { return exp(logits - base) / divisor * scale; };
  int64_t c = 0;
  for (; c + kLanes<T> <= classes; c += kLanes<T>) store(gradient + c, step(load<T>(x + c)));
  if (c < classes) store_first(gradient + c, classes - c, step(load_first<T>(x + c, classes - c, base)));
  gradient[y] = at_label * scale;
}

// ---- rows of any type and stride ----------------------------------------------------------------

// Hands out up to kLanes consecutive rows of an image as rows of T: the tensor's own where it can be read
// in place, else copies.
template <class S>
class RowReader {
 public:
  using T = ComputedIn<S>;
  RowReader(const multibox_loss::Rows& rows, int64_t classes)
      : data_(static_cast<const S*>(rows.data)),
        strides_(rows.strides),
        classes_(classes),
        in_place_(std::is_same_v<S, T> && strides_.last == 1),
        copies_(in_place_ ? nullptr : new T[kLanes<T> * classes]) {}

  int64_t stride() const { return in_place_ ? strides_.prior : classes_; }

  const T* rows(int64_t image, int64_t prior, int64_t count) const {
    const S* from = data_ + image * strides_.image + prior * strides_.prior;
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) return from;
    }
    if (strides_.last == 1) {
      for (int64_t j = 0; j < count; ++j, from += strides_.prior) {
        for (int64_t c = 0; c < classes_; ++c) copies_[j * classes_ + c] = T(from[c]);
      }
    } else {
      for (int64_t c = 0; c < classes_; ++c, from += strides_.last) {
        for (int64_t j = 0; j < count; ++j) copies_[j * classes_ + c] = T(from[j * strides_.prior]);
      }
    }
    return copies_.get();
  }

 private:
  const S* data_;
  multibox_loss::Strides strides_;
  int64_t classes_;
  bool in_place_;
  std::unique_ptr<T[]> copies_;
};

// Four numbers of row (image, prior), of whatever type.
inline void load_four(const multibox_loss::Rows& rows, int64_t image, int64_t prior, double* out) {
  const multibox_loss::Strides& s = rows.strides;
  const int64_t at = image * s.image + prior * s.prior;
  const auto copy = [&](const auto* data) {
    for (int i = 0; i < 4; ++i) out[i] = double(data[at + i * s.last]);
  };
  switch (rows.dtype) {
    case DType::f32:
      return copy(static_cast<const float*>(rows.data));
    case DType::f64:
      return copy(static_cast<const double*>(rows.data));
    case DType::f16:
      return copy(static_cast<const Half*>(rows.data));
    case DType::bf16:
      return copy(static_cast<const BFloat16*>(rows.data));
  }
}

// ---- forward ------------------------------------------------------------------------------------

// Ranks of the rows [begin, end) of all images' rows. Returns the first whose label is no class, or `end`.
template <class S>
int64_t rank_rows(const multibox_loss::Rows& logits, const int64_t* labels, const multibox_loss::Loss& loss,
                  int64_t begin, int64_t end, IntOf<ComputedIn<S>>* ranks) {
  using T = ComputedIn<S>;
  using V = Vec<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t n = loss.mining.num_priors, classes = loss.classes;
  const RowReader<S> reader(logits, classes);
  const int64_t stride = reader.stride();
  for (int64_t r = begin; r < end;) {
    const int64_t count = std::min({lanes, end - r, n - r % n});
    const T* x = reader.rows(r / n, r % n, count);
    V sums[lanes];
    T bases[lanes];
    for (int64_t j = 0; j < lanes; ++j) {
      const T* row = x + std::min(j, count - 1) * stride;
      bases[j] = row[0];
      sums[j] = partial_sums(row, classes, row[0]);
    }
    const V base = load<T>(bases), sum = sums_of_lanes<T>(sums) + (base - base);
    store_first(ranks + r, count, rank_of_sum(sum));
    unsigned again = ~mask_bits(sum <= splat<V>(std::numeric_limits<T>::max()));
    for (int64_t j = 0; j < count; ++j) again |= unsigned(labels[r + j] > 0) << j;
    for (again &= (1u << count) - 1; again; again &= again - 1) {
      const int64_t j = __builtin_ctz(again), y = std::max<int64_t>(labels[r + j], 0);
      if (y >= classes) return r + j;
      ranks[r + j] = rank_of_row(x + j * stride, classes, y);
    }
    r += count;
  }
  return end;
}

// Mines one image: the least rank goes to all but its positives and its hardest negatives. `keys` and
// `scratch` have room for its priors and a vector more. Returns its positives.
template <class I>
int64_t mine(const int64_t* labels, const mining::Mining& mining, I* ranks, I* keys, I* scratch) {
  constexpr int64_t lanes = kLanes<I>;
  const int64_t n = mining.num_priors;
  const Keys<I> made = make_keys(ranks, labels, n, keys, [](Vec<I> rank) { return rank; });
  const int64_t k = negatives_to_mark(made.positives, made.negatives, mining);
  I bound = kAbsent<I>;  // keys above are mined, and the first `equal` of those equal to the cut
  Cut<I> cut{};
  int64_t equal = 0;
  if (k == 0) {
    bound = std::numeric_limits<I>::max();
  } else if (k < made.negatives) {
    cut = find_cut(made, k, scratch);
    bound = cut.wanted == cut.ties ? cut.key - 1 : cut.key;
    equal = cut.wanted == cut.ties ? 0 : cut.wanted;
  }
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const LabelMasks<Vec<I>> is = label_masks<I>(labels + i);
    const Vec<I> kept = ~(is.zero | is.negative) | (load<I>(keys + i) > bound);
    store(ranks + i, kept ? load<I>(ranks + i) : Vec<I>{} + kAbsent<I>);
  }
  for (; i < n; ++i) {
    if (labels[i] <= 0 && keys[i] <= bound) ranks[i] = kAbsent<I>;
  }
  for (i = 0; equal > 0; i += lanes) {
    for (unsigned bits = mask_bits(load<I>(keys + i) == cut.key); bits && equal > 0; bits &= bits - 1, --equal) {
      ranks[i + __builtin_ctz(bits)] = cut.key;
    }
  }
  return made.positives;
}

// f(i) for each rank that is not the least, in order.
template <class I, class F>
void for_each_kept(const I* ranks, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<I> <= n; i += kLanes<I>) {
    for (unsigned bits = mask_bits(load<I>(ranks + i) != kAbsent<I>); bits; bits &= bits - 1)
      f(i + __builtin_ctz(bits));
  }
  for (; i < n; ++i) {
    if (ranks[i] != kAbsent<I>) f(i);
  }
}

template <class T>
ImageSums sum_image(int64_t image, const multibox_loss::Rows& deltas, const multibox_loss::Rows& targets,
                    const int64_t* labels, const multibox_loss::Loss& loss, IntOf<T>* ranks, IntOf<T>* keys,
                    IntOf<T>* scratch) {
  const int64_t n = loss.mining.num_priors;
  const int64_t positives = mine(labels, loss.mining, ranks, keys, scratch);
  OrderedSum loc(n), conf(n);
  for_each_kept(ranks, n, [&](int64_t i) {
    conf.add(i, loss_of_rank<T>(ranks[i]));
    if (labels[i] <= 0) return;
    double delta[4], target[4];
    load_four(deltas, image, i, delta);
    load_four(targets, image, i, target);
    double l[4];
    for (int d = 0; d < 4; ++d) l[d] = smooth_l1(delta[d] - target[d], loss.beta);
    loc.add(i, (l[0] + l[1]) + (l[2] + l[3]));
  });
  return {positives, loc.total(), conf.total()};
}

// ---- backward -----------------------------------------------------------------------------------

// The gradients of the rows [begin, end) that are not 0; the others are left as they are.
template <class S>
void logits_gradient(const multibox_loss::Rows& logits, const int64_t* labels, const IntOf<ComputedIn<S>>* ranks,
                     const int64_t* divisors, const multibox_loss::Loss& loss, double scale, int64_t begin, int64_t end,
                     S* gradient, const multibox_loss::Strides& strides) {
  using T = ComputedIn<S>;
  const int64_t n = loss.mining.num_priors, classes = loss.classes;
  const RowReader<S> reader(logits, classes);
  const std::unique_ptr<T[]> made(new T[classes]);
  for_each_kept(ranks + begin, end - begin, [&](int64_t i) {
    const int64_t r = begin + i, y = std::max<int64_t>(labels[r], 0);
    S* to = gradient + r / n * strides.image + r % n * strides.prior;
    if (y < classes) {
      gradient_of_row(reader.rows(r / n, r % n, 1), classes, y, ranks[r], T(scale / double(divisors[r / n])),
                      made.get());
    } else {
      std::fill_n(made.get(), classes, std::numeric_limits<T>::quiet_NaN());
    }
    for (int64_t c = 0; c < classes; ++c) to[c * strides.last] = S(made[c]);
  });
}

template <class S>
void deltas_gradient(const multibox_loss::Rows& deltas, const multibox_loss::Rows& targets, const int64_t* labels,
                     const int64_t* divisors, const multibox_loss::Loss& loss, double scale, int64_t begin, int64_t end,
                     S* gradient, const multibox_loss::Strides& strides) {
  using T = ComputedIn<S>;
  const int64_t n = loss.mining.num_priors;
  for (int64_t r = begin; r < end; ++r) {
    if (labels[r] <= 0) continue;
    double delta[4], target[4];
    load_four(deltas, r / n, r % n, delta);
    load_four(targets, r / n, r % n, target);
    S* to = gradient + r / n * strides.image + r % n * strides.prior;
    for (int d = 0; d < 4; ++d) {
      const double slope = smooth_l1_slope(delta[d] - target[d], loss.beta);
      to[d * strides.last] = S(T(loss.alpha * scale / double(divisors[r / n]) * slope));
    }
  }
}

// Zeros that go past the caches: the memory is not read first, and little of it is looked at again soon.
inline void fill_zero(char* p, int64_t bytes) {
#if SSD_EXT_X86
  const int64_t first = std::min<int64_t>(-reinterpret_cast<intptr_t>(p) & 63, bytes);
  memset(p, 0, first);
  int64_t i = first;
  for (; i + 64 <= bytes; i += 64) {
    for (int part = 0; part < 64; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(p + i + part), _mm_setzero_si128());
  }
  memset(p + i, 0, bytes - i);
  _mm_sfence();
#else
  memset(p, 0, bytes);
#endif
}
