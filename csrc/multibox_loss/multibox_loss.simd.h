// CPU kernels of multibox_loss; compiled once per SIMD level. S is a type that tensors hold, T the one it is
// computed in.

#include "multibox_loss/rank.inl"

template <class S>
using ComputedIn = std::conditional_t<std::is_same_v<S, double>, double, float>;

// ---- a rough exponential -------------------------------------------------------------------------

constexpr int kMostBase = 4096;  // of class 0's logit: of greater ones, rough differences would be too rough

// e^(x - base) to about one part in 500 between 2^-126 and 2^127 (2^-1022, 2^1023), beyond those bounds on the
// right side of them; NaN stays NaN. Degree-2 minimax polynomials of 2^f, f in [0, 1) or [-1/2, 1/2]. Where there
// are fused multiply-adds they may serve here: what is rough decides nothing by itself.
template <class V>
inline __attribute__((always_inline)) V rough_exp(V x, V base) {
  using T = ScalarOf<V>;
  constexpr bool single = sizeof(T) == 4;
  constexpr T log2e = T(1.4426950408889634);
#if SSD_EXT_SIMD_LEVEL == 2
  constexpr T c0 = T(1.00172449), c1 = T(0.65763630), c2 = T(0.33718934);
  const V scaled = base * -log2e;
  if constexpr (single) {
    const __m512 t = _mm512_fmadd_ps(bit_cast<__m512>(x), _mm512_set1_ps(log2e), bit_cast<__m512>(scaled));
    const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 p = _mm512_fmadd_ps(_mm512_fmadd_ps(f, _mm512_set1_ps(c2), _mm512_set1_ps(c1)), f, _mm512_set1_ps(c0));
    return bit_cast<V>(_mm512_scalef_ps(p, t));
  } else {
    const __m512d t = _mm512_fmadd_pd(bit_cast<__m512d>(x), _mm512_set1_pd(log2e), bit_cast<__m512d>(scaled));
    const __m512d f = _mm512_reduce_pd(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512d p =
        _mm512_fmadd_pd(_mm512_fmadd_pd(f, _mm512_set1_pd(c2), _mm512_set1_pd(c1)), f, _mm512_set1_pd(c0));
    return bit_cast<V>(_mm512_scalef_pd(p, t));
  }
#else
  constexpr T magic = single ? T(12582912) : T(6755399441055744);  // leaves the rounded integer in the low bits
  const V low = splat<V>(single ? T(-126) : T(-1022)), high = splat<V>(single ? T(127) : T(1023));
  const V t = min_of(high, max_of(low, (x - base) * log2e));  // a NaN passes
  const V z = t + magic, f = t - (z - magic);
  const V p = (f * T(0.23842886) + T(0.70344823)) * f + T(1.00044316);
  const auto exponent = (bit_cast<IntOf<V>>(z) << (single ? 23 : 52)) + bit_cast<IntOf<T>>(T(1));
  return p * bit_cast<V>(exponent);
#endif
}

// ---- one row of logits --------------------------------------------------------------------------

// Sum over foreground classes c != omitted of exp(x[c] - base), in kLanes partial sums.
template <bool kRough, class T>
inline __attribute__((always_inline)) Vec<T> foreground_sums(const T* x, int64_t classes, T base, int64_t omitted = 0) {
  using V = Vec<T>;
  using I = IntOf<T>;
  constexpr int lanes = kLanes<T>, parts = multibox_loss::kWays / lanes;
  constexpr T nothing = -std::numeric_limits<T>::infinity();  // whose exponential is 0
  const V bases = splat<V>(base);
  V sums[parts] = {};
  const auto add = [&](int part, int64_t c, V logits) {
    if (omitted) logits = iota<I>() == I(omitted - c) ? splat<V>(nothing) : logits;
    sums[part] += kRough ? rough_exp(logits, bases) : exp(logits - bases);
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
  Vec<T> sums[kLanes<T>] = {foreground_sums<false>(x, classes, base, omitted)};
  const T foreground = sums_of_lanes<T>(sums)[0];
  return omitted ? foreground + exp(x[0] - base) : foreground;
}

// For rows whose sum over c != y is too large.
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
  if (sum <= kLargestSum<T>) return rank_of_sum(sum);
  const Softmax<T> softmax = softmax_of(x, classes);
  return rank_of_large_loss(softmax.top, x[y], softmax.sum);
}

// The gradient of scale * loss.
template <class T>
void gradient_of_row(const T* x, int64_t classes, int64_t y, IntOf<T> rank, T scale, T* gradient) {
  T base, factor, at_label;
  if (rank < 0) {
    const T sum = sum_of_rank<T>(rank);
    base = x[y];
    factor = scale / (1 + sum);
    at_label = -sum * factor;
  } else {
    const Softmax<T> softmax = softmax_of(x, classes);
    base = softmax.top;
    factor = scale / softmax.sum;
    at_label = exp(x[y] - base) * factor - scale;
  }
  const auto step = [&](Vec<T> logits) { return exp(logits - base) * factor; };
  int64_t c = 0;
  for (; c + kLanes<T> <= classes; c += kLanes<T>) store(gradient + c, step(load<T>(x + c)));
  if (c < classes) store_first(gradient + c, classes - c, step(load_first<T>(x + c, classes - c, base)));
  gradient[y] = at_label;
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

  bool in_place() const { return in_place_; }
  int64_t stride() const { return in_place_ ? strides_.prior : classes_; }

  // Valid until the next call with the same slot; slot + count <= kLanes.
  const T* rows(int64_t image, int64_t prior, int64_t count, int64_t slot = 0) const {
    const S* from = data_ + image * strides_.image + prior * strides_.prior;
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) return from;
    }
    T* to = copies_.get() + slot * classes_;
    if (strides_.last == 1) {
      for (int64_t j = 0; j < count; ++j, from += strides_.prior) {
        for (int64_t c = 0; c < classes_; ++c) to[j * classes_ + c] = T(from[c]);
      }
    } else {
      for (int64_t c = 0; c < classes_; ++c, from += strides_.last) {
        for (int64_t j = 0; j < count; ++j) to[j * classes_ + c] = T(from[j * strides_.prior]);
      }
    }
    return to;
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

// Asks for the n elements from p on.
template <class T>
inline __attribute__((always_inline)) void prefetch(const T* p, int64_t n) {
  for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
  }
}

// ---- forward ------------------------------------------------------------------------------------
//
// Few negatives are mined, so a sum that is right to one part in kPrecision is enough for nearly all: those
// who may be among the k largest then get their exact ranks. With every rough sum A within
// (1 - e) S <= A <= (1 + e) S + d of the exact S, and T the k-th largest A, at least k negatives have
// S >= (T - d) / (1 + e); so who is among the k largest has A >= (1 - e) / (1 + e) (T - d).

constexpr double kPrecision = 256;  // twice as rough as the arithmetic below is
template <class T>
constexpr T kEnough = std::is_same_v<T, float> ? T(1e37) : T(1e307);  // rough sums stop here; NaN counts as this

// Class 0's logits allow for a rough sum.
template <class V>
inline __attribute__((always_inline)) auto is_near(V base) {
  return min_of(base, -base) >= -splat<V>(kMostBase);
}

// Turns rough sums, or NaN, of rows whose class 0 has logits `base` into what is kept of them: bits in order. A row
// whose base is NaN or infinite has a loss that is one, too, so it may count as the greatest.
template <class V>
inline __attribute__((always_inline)) IntOf<V> rough_rank(V sum, V base) {
  const V enough = splat<V>(kEnough<ScalarOf<V>>);
  sum = base - base == V{} ? sum : enough;
  return bit_cast<IntOf<V>>(min_of(sum, enough));
}

// Rough sums over foreground classes of the rows [begin, end) of all images' rows, as rough_rank.
template <class S>
void rank_roughly(const multibox_loss::Rows& logits, const multibox_loss::Loss& loss, int64_t begin, int64_t end,
                  IntOf<ComputedIn<S>>* ranks) {
  using T = ComputedIn<S>;
  using V = Vec<T>;
  constexpr int64_t lanes = kLanes<T>, together = 4;
  const int64_t n = loss.mining.num_priors, classes = loss.classes;
  const RowReader<S> reader(logits, classes);
  const int64_t stride = reader.stride();
  for (int64_t r = begin; r < end;) {
    const int64_t left = std::min(end - r, n - r % n);
    if constexpr (std::is_same_v<S, T>) {
      const T* x = static_cast<const T*>(logits.data) + r / n * logits.strides.image + r % n;
      const auto all_near = [&] {
        bool near = true;
        for (int64_t j = 0; j < together; ++j) near &= mask_bits(is_near(load<T>(x + j * lanes))) == (1u << lanes) - 1;
        return near;
      };
      // Priors lie side by side.
      if (logits.strides.prior == 1 && !reader.in_place() && left >= together * lanes && all_near()) {
        V sums[together] = {};
        for (int64_t c = 1; c < classes; ++c) {
          for (int64_t j = 0; j < together; ++j) {
            sums[j] += rough_exp(load<T>(x + c * logits.strides.last + j * lanes), load<T>(x + j * lanes));
          }
        }
        for (int64_t j = 0; j < together; ++j, r += lanes) {
          store(ranks + r, rough_rank(sums[j], load<T>(x + j * lanes)));
        }
        continue;
      }
    }
    const int64_t count = std::min(lanes, left);
    const T* x = reader.rows(r / n, r % n, count);
    V sums[lanes];
    T bases[lanes];
    for (int64_t j = 0; j < lanes; ++j) {
      const T* row = x + std::min(j, count - 1) * stride;
      bases[j] = row[0];
      sums[j] = std::abs(row[0]) <= kMostBase ? foreground_sums<true>(row, classes, row[0])
                                              : foreground_sums<false>(row, classes, row[0]);
    }
    store_first(ranks + r, count, rough_rank(sums_of_lanes<T>(sums), load<T>(bases)));
    r += count;
  }
}

// The least rough_rank that one of the k largest sums may have, given the k-th largest.
template <class T>
IntOf<T> least_candidate(IntOf<T> kth, int64_t classes) {
  const double e = 1 / kPrecision + double(classes) * std::numeric_limits<T>::epsilon();  // of the additions, too
  const double d = double(classes + multibox_loss::kWays) * 4 * double(std::numeric_limits<T>::min());
  const double least = (1 - e) / (1 + e) * (double(bit_cast<T>(kth)) - d);
  return least > 0 ? bit_cast<IntOf<T>>(T(least * (1 - 1e-6))) : 0;
}

// Writes the exact ranks of the negatives priors[0 .. count) of an image.
template <class S>
void rank_negatives(const RowReader<S>& reader, int64_t image, const int64_t* priors, int64_t count, int64_t classes,
                    IntOf<ComputedIn<S>>* ranks) {
  using T = ComputedIn<S>;
  constexpr int64_t lanes = kLanes<T>;
  for (; count > 0; count -= lanes, priors += lanes) {
    Vec<T> sums[lanes];
    const T* rows[lanes];
    T bases[lanes];
    for (int64_t j = 0; j < lanes; ++j) {
      rows[j] = j < count ? reader.rows(image, priors[j], 1, j) : rows[0];
      if (reader.in_place() && j + lanes < count) prefetch(reader.rows(image, priors[j + lanes], 1), classes);
      bases[j] = rows[j][0];
      sums[j] = foreground_sums<false>(rows[j], classes, bases[j]);
    }
    const Vec<T> base = load<T>(bases), sum = sums_of_lanes<T>(sums) + (base - base);
    IntOf<T> made[lanes];
    store(made, rank_of_sum(sum));
    unsigned large = ~mask_bits(sum <= splat<Vec<T>>(kLargestSum<T>)) & ((1u << std::min(count, lanes)) - 1);
    for (; large; large &= large - 1) {
      const int64_t j = __builtin_ctz(large);
      made[j] = rank_of_row(rows[j], classes, 0);
    }
    for (int64_t j = 0; j < std::min(count, lanes); ++j) ranks[priors[j]] = made[j];
  }
}

// What an image's call needs beside its outputs: room for its priors, and a vector more in the first two.
template <class I>
struct Room {
  I *keys, *scratch;
  int64_t *kept, *negatives;
};

struct Settled {
  int64_t kept;  // priors listed in Room::kept, in order: positives and, until mined, candidates
  multibox_loss::Counts counts;
  int64_t bad = -1;  // if not, the first prior whose label is no class
};

// Mines one image: rough ranks become exact ones of its positives and hardest negatives, and the least
// integer of the others.
template <class S>
Settled mine(const RowReader<S>& reader, int64_t image, const int64_t* labels, const multibox_loss::Loss& loss,
             IntOf<ComputedIn<S>>* ranks, const Room<IntOf<ComputedIn<S>>>& room) {
  using T = ComputedIn<S>;
  using I = IntOf<T>;
  constexpr int64_t lanes = kLanes<I>;
  const int64_t n = loss.mining.num_priors, classes = loss.classes;
  const Keys<I> rough = make_keys(ranks, labels, n, room.keys, [](Vec<I> rank) { return rank; });
  const int64_t k = negatives_to_mark(rough.positives, rough.negatives, loss.mining);
  const I least = k == 0                 ? std::numeric_limits<I>::max()
                  : k == rough.negatives ? 0
                                         : least_candidate<T>(find_cut(rough, k, room.scratch).key, classes);

  int64_t kept = 0, candidates = 0;
  const auto keep = [&](int64_t i) {
    room.kept[kept++] = i;
    if (labels[i] == 0) room.negatives[candidates++] = i;
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const LabelMasks<Vec<I>> is = label_masks<I>(labels + i);
    const Vec<I> candidate = ~is.negative & ~(is.zero & (load<I>(ranks + i) < least));
    store(ranks + i, Vec<I>{} + kAbsent<I>);
    for (unsigned bits = mask_bits(candidate); bits; bits &= bits - 1) keep(i + __builtin_ctz(bits));
  }
  for (; i < n; ++i) {
    if (labels[i] > 0 || (labels[i] == 0 && ranks[i] >= least)) keep(i);
    ranks[i] = kAbsent<I>;
  }

  for (i = 0; i < kept; ++i) {
    const int64_t p = room.kept[i];
    if (labels[p] == 0) continue;
    if (labels[p] >= classes) return {0, {}, p};
    ranks[p] = rank_of_row(reader.rows(image, p, 1), classes, labels[p]);
  }
  rank_negatives(reader, image, room.negatives, candidates, classes, ranks);

  if (k < candidates) {
    I least_key = std::numeric_limits<I>::max(), greatest = kAbsent<I>;
    for (i = 0; i < candidates; ++i) {
      const I key = ranks[room.negatives[i]];
      room.keys[i] = key;
      least_key = std::min(least_key, key);
      greatest = std::max(greatest, key);
    }
    store(room.keys + candidates, Vec<I>{} + kAbsent<I>);
    const int64_t size = (candidates + lanes - 1) / lanes * lanes;
    const Cut<I> cut = find_cut(Keys<I>{room.keys, size, candidates, 0, least_key, greatest}, k, room.scratch);
    int64_t ties = cut.wanted;
    for (i = 0; i < candidates; ++i) {
      I& rank = ranks[room.negatives[i]];
      if (rank < cut.key || (rank == cut.key && --ties < 0)) rank = kAbsent<I>;
    }
  }
  return {kept, {rough.positives, k}};
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

// Mines and sums up one image. On a label that is no class, its positives are -1 - the prior.
template <class S>
ImageSums sum_image(const multibox_loss::Rows& logits, const multibox_loss::Rows& deltas,
                    const multibox_loss::Rows& targets, const int64_t* labels, const multibox_loss::Loss& loss,
                    int64_t image, IntOf<ComputedIn<S>>* ranks, const Room<IntOf<ComputedIn<S>>>& room) {
  using T = ComputedIn<S>;
  const int64_t n = loss.mining.num_priors;
  const Settled settled = mine(RowReader<S>(logits, loss.classes), image, labels, loss, ranks, room);
  if (settled.bad >= 0) return {{-1 - settled.bad, 0}, 0, 0};
  OrderedSum loc(n), conf(n);
  for (int64_t j = 0; j < settled.kept; ++j) {
    const int64_t i = room.kept[j];
    if (ranks[i] == kAbsent<IntOf<T>>) continue;
    conf.add(i, loss_of_rank<T>(ranks[i]));
    if (labels[i] <= 0) continue;
    double delta[4], target[4], term = 0;
    load_four(deltas, image, i, delta);
    load_four(targets, image, i, target);
    for (int d = 0; d < 4; ++d) term += smooth_l1(delta[d] - target[d], loss.beta);
    loc.add(i, term);
  }
  return {settled.counts, loc.total(), conf.total()};
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
  std::vector<int64_t> kept;
  for_each_kept(ranks + begin, end - begin, [&](int64_t i) { kept.push_back(begin + i); });
  const auto gradient_at = [&](int64_t r) { return gradient + r / n * strides.image + r % n * strides.prior; };
  constexpr size_t ahead = 4;  // rows lie far apart: those to come are fetched while others are computed
  for (size_t j = 0; j < kept.size(); ++j) {
    if (j + ahead < kept.size() && reader.in_place() && strides.last == 1) {
      const int64_t r = kept[j + ahead];
      prefetch(reader.rows(r / n, r % n, 1), classes);
      prefetch(gradient_at(r), classes);
    }
    const int64_t r = kept[j], y = std::max<int64_t>(labels[r], 0);
    S* to = gradient_at(r);
    T* row = made.get();
    if constexpr (std::is_same_v<S, T>) {
      if (strides.last == 1) row = to;
    }
    if (y < classes) {
      gradient_of_row(reader.rows(r / n, r % n, 1), classes, y, ranks[r], T(scale / double(divisors[r / n])), row);
    } else {
      std::fill_n(row, classes, std::numeric_limits<T>::quiet_NaN());
    }
    if (row != made.get()) continue;
    for (int64_t c = 0; c < classes; ++c) to[c * strides.last] = S(row[c]);
  }
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
