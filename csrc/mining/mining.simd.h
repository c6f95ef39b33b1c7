// CPU kernel of hard_negatives; compiled once per SIMD level.

// The bools of one comparison, in the low bytes: byte i is lane i.
template <class Mask>
inline __attribute__((always_inline)) uint64_t bools_of(Mask m) {
  static_assert(sizeof(m) / sizeof(m[0]) <= 8);
  const uint64_t bit = (mask_bits(m) * 0x0101010101010101u) & 0x8040201008040201u;  // bit i of byte i, if lane i
  return (bit + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

template <class I>
void mark_above(const I* keys, int64_t n, I bound, bool* mask) {
  constexpr int64_t lanes = kLanes<I>;
  const auto step = [&](int64_t i, int64_t count) {
    const Vec<I> above = load<I>(keys + i) > bound;
    if constexpr (lanes > 8) {
      typedef int8_t Bools __attribute__((vector_size(lanes)));
      const Bools bools = __builtin_convertvector(above, Bools) & 1;
      memcpy(mask + i, &bools, count);
    } else {
      const uint64_t bools = bools_of(above);
      memcpy(mask + i, &bools, count);
    }
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) step(i, lanes);
  if (i < n) step(i, n - i);
}

template <class I>
void mark_first_equal(const I* keys, I key, int64_t count, bool* mask) {
  for (int64_t i = 0; count > 0; i += kLanes<I>) {
    for (unsigned bits = mask_bits(load<I>(keys + i) == key); bits && count > 0; bits &= bits - 1, --count) {
      mask[i + __builtin_ctz(bits)] = true;
    }
  }
}

// One image. `keys` and `scratch` have room for n keys and a vector more.
template <class T>
void hard_negatives(const T* loss, const int64_t* labels, bool* mask, const mining::Mining& mining, IntOf<T>* keys,
                    IntOf<T>* scratch) {
  using I = IntOf<T>;
  const int64_t n = mining.num_priors;
  const Keys<I> made = make_keys(loss, labels, n, keys, [](Vec<T> v) { return order_key_nan_greatest(v); });
  const int64_t k = negatives_to_mark(made.positives, made.negatives, mining);
  if (k == 0) {
    memset(mask, 0, n);
  } else if (k == made.negatives) {
    mark_above(keys, n, kAbsent<I>, mask);
  } else {
    const Cut<I> cut = find_cut(made, k, scratch);
    const bool all_ties = cut.wanted == cut.ties;
    mark_above(keys, n, I(all_ties ? cut.key - 1 : cut.key), mask);
    if (!all_ties) mark_first_equal(keys, cut.key, cut.wanted, mask);
  }
}
