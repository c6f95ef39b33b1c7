// The k negatives of largest key in an image: what hard_negatives and multibox_loss select by. Keys are
// signed integers in the order of the losses, such as order_key_nan_greatest gives. Included by
// for_each_simd_level.h.

// The key of what is no negative: less than that of any loss.
template <class I>
constexpr I kAbsent = std::numeric_limits<I>::min();

template <class I>
inline __attribute__((always_inline)) int64_t sum_of(I counts) {
  int64_t sum = 0;
  for (unsigned i = 0; i < sizeof(counts) / sizeof(counts[0]); ++i) sum += counts[i];
  return sum;
}

template <class I>
struct LabelMasks {  // all ones where true
  I zero, negative;
};

// The labels that go with one vector of I.
template <class I>
inline __attribute__((always_inline)) LabelMasks<Vec<I>> label_masks(const int64_t* labels) {
  if constexpr (sizeof(I) == 8) {
    const Vec<int64_t> v = load<int64_t>(labels);
    return {v == 0, v < 0};
  } else {  // low and high words apart, so that a label has the width of a key
    const int32_t* words = reinterpret_cast<const int32_t*>(labels);
    const Halves<Vec<int32_t>> v = even_and_odd(load<int32_t>(words), load<int32_t>(words + kLanes<int32_t>));
    return {(v.first | v.second) == 0, v.second < 0};
  }
}

template <class I>
struct Keys {  // of one image, size of them, a whole number of vectors
  const I* keys;
  int64_t size;
  int64_t negatives, positives;
  I least, greatest;  // of the negatives
};

// Writes the key of each negative, and kAbsent for the other priors and the rest of the last vector.
// key_of makes a vector of keys of a vector of values.
template <class T, class I, class KeyOf>
Keys<I> make_keys(const T* values, const int64_t* labels, int64_t n, I* keys, const KeyOf& key_of) {
  using VI = Vec<I>;
  constexpr int64_t lanes = kLanes<I>;
  VI zeros{}, ignored{}, least = VI{} + std::numeric_limits<I>::max(), greatest = VI{} + kAbsent<I>;
  const auto step = [&](const T* from, const int64_t* label, I* to) {
    const LabelMasks<VI> is = label_masks<I>(label);
    const VI key = key_of(load<T>(from));
    const VI kept = is.zero ? key : VI{} + kAbsent<I>;
    const VI bound = is.zero ? key : least;
    zeros -= is.zero;
    ignored -= is.negative;
    least = bound < least ? bound : least;
    greatest = kept > greatest ? kept : greatest;
    store(to, kept);
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) step(values + i, labels + i, keys + i);
  if (i < n) {
    T last_values[lanes] = {};
    int64_t last_labels[lanes];
    for (int64_t j = 0; j < lanes; ++j) last_labels[j] = i + j < n ? labels[i + j] : -1;
    memcpy(last_values, values + i, (n - i) * sizeof(T));
    step(last_values, last_labels, keys + i);
    i += lanes;
  }
  // Copies, for an indexed vector would live in memory throughout the loop above.
  I leasts[lanes], greatests[lanes];
  store(leasts, least);
  store(greatests, greatest);
  return {keys,
          i,
          sum_of(zeros),
          i - sum_of(zeros) - sum_of(ignored),
          *std::min_element(leasts, leasts + lanes),
          *std::max_element(greatests, greatests + lanes)};
}

template <class I>
int64_t count_above(const I* keys, int64_t n, I bound) {
  Vec<I> count{};
  for (int64_t i = 0; i < n; i += kLanes<I>) count -= load<I>(keys + i) > bound;
  return sum_of(count);
}

#if SSD_EXT_SIMD_LEVEL == 1
struct PackOrder {  // byte j of of[bits]: the j-th set bit
  uint64_t of[256] = {};
  constexpr PackOrder() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int i = 0, j = 0; i < 8; ++i) {
        if (bits >> i & 1) of[bits] |= uint64_t(i) << 8 * j++;
      }
    }
  }
};
constexpr PackOrder kPackOrder;
#endif

// Copies the lanes of v where `mask` to the front of `to`, which has room for all; returns how many.
template <class I>
inline __attribute__((always_inline)) int64_t pack(I* to, Vec<I> v, Vec<I> mask) {
  unsigned bits = mask_bits(mask);
#if SSD_EXT_SIMD_LEVEL == 2
  if constexpr (sizeof(I) == 4) {
    store(to, bit_cast<Vec<I>>(_mm512_maskz_compress_epi32(bits, bit_cast<__m512i>(v))));
  } else {
    store(to, bit_cast<Vec<I>>(_mm512_maskz_compress_epi64(bits, bit_cast<__m512i>(v))));
  }
  return __builtin_popcount(bits);
#elif SSD_EXT_SIMD_LEVEL == 1
  // Lanes are moved as 32-bit words; a 64-bit lane is two of them.
  const unsigned words = mask_bits(bit_cast<Vec<int32_t>>(mask));
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(kPackOrder.of[words]));
  store(to, bit_cast<Vec<I>>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(v), order)));
  return __builtin_popcount(bits);
#else
  int64_t n = 0;
  for (; bits; bits &= bits - 1) to[n++] = v[__builtin_ctz(bits)];
  return n;
#endif
}

// Copies the keys from low to high to `to`, filled up with kAbsent; returns how many, whole vectors.
template <class I>
int64_t keep_between(const I* keys, int64_t n, I low, I high, I* to) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kLanes<I>) {
    const Vec<I> v = load<I>(keys + i);
    kept += pack(to + kept, v, (v >= low) & (v <= high));
  }
  store(to + kept, Vec<I>{} + kAbsent<I>);
  return (kept + kLanes<I> - 1) / kLanes<I> * kLanes<I>;
}

template <class I>
struct Cut {
  I key;           // the k-th largest
  int64_t ties;    // keys equal to it
  int64_t wanted;  // of them, among the k largest
};

// Bisection, over fewer and fewer keys: at most one pass for each bit of a key, whatever they are.
template <class I>
Cut<I> find_cut(const Keys<I>& all, int64_t k, I* scratch) {
  const I* keys = all.keys;
  int64_t size = all.size;
  I low = all.least, high = all.greatest;            // the k-th largest is in low .. high
  int64_t above_high = 0, from_low = all.negatives;  // keys > high, keys >= low
  while (low < high) {
    if (4 * (from_low - above_high) < size && size > 4 * kLanes<I>) {
      size = keep_between(keys, size, low, high, scratch);
      keys = scratch;
      k -= above_high;
      from_low -= above_high;
      above_high = 0;
    }
    const I middle = low + I((std::make_unsigned_t<I>(high) - std::make_unsigned_t<I>(low)) >> 1);
    const int64_t above = count_above(keys, size, middle);
    if (above >= k) {
      low = middle + 1;
      from_low = above;
    } else {
      high = middle;
      above_high = above;
    }
  }
  return {low, from_low - above_high, k - above_high};
}
