// The vector type of the SIMD level being compiled, and what GCC's vector extension lacks.
// Included by for_each_simd_level.h inside the level's namespace.

constexpr int kVecBytes = SSD_EXT_SIMD_LEVEL == 2 ? 64 : SSD_EXT_SIMD_LEVEL == 1 ? 32 : 16;

// At least four lanes, so that a box (four coordinates) never straddles two vectors.
template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(T)) < 4 ? 4 : kVecBytes / int(sizeof(T));

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kLanes<T> * sizeof(T))));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline __attribute__((always_inline)) Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline __attribute__((always_inline)) void store(T* p, V v) {
  static_assert(std::is_same_v<T, ScalarOf<V>>);
  __builtin_memcpy(p, &v, sizeof v);
}

template <class V, class T>
inline __attribute__((always_inline)) void store_first(T* p, int64_t n, V v) {
  __builtin_memcpy(p, &v, n * sizeof(T));
}

// 0, 1, 2, ...
template <class T, int... I>
inline __attribute__((always_inline)) Vec<T> iota_of(std::integer_sequence<int, I...>) {
  return Vec<T>{T(I)...};
}
template <class T>
inline __attribute__((always_inline)) Vec<T> iota() {
  return iota_of<T>(std::make_integer_sequence<int, kLanes<T>>{});
}

// p[0] .. p[n - 1], and `rest` in the lanes from n on; any n. Nothing else is read.
template <class T>
inline __attribute__((always_inline)) Vec<T> load_first(const T* p, int64_t n, T rest) {
#if SSD_EXT_SIMD_LEVEL == 2
  const unsigned mask = n <= 0 ? 0 : n < kLanes<T> ? (1u << n) - 1 : (1u << kLanes<T>)-1;
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_mask_loadu_ps(_mm512_set1_ps(rest), __mmask16(mask), p));
  } else {
    return bit_cast<Vec<T>>(_mm512_mask_loadu_pd(_mm512_set1_pd(rest), __mmask8(mask), p));
  }
#elif SSD_EXT_SIMD_LEVEL == 1
  using I = IntOf<T>;
  const Vec<I> mask = iota<I>() < I(n < 0 ? 0 : n < kLanes<T> ? n : kLanes<T>);
  if constexpr (sizeof(T) == 4) {
    return mask ? bit_cast<Vec<T>>(_mm256_maskload_ps(p, bit_cast<__m256i>(mask))) : splat<Vec<T>>(rest);
  } else {
    return mask ? bit_cast<Vec<T>>(_mm256_maskload_pd(p, bit_cast<__m256i>(mask))) : splat<Vec<T>>(rest);
  }
#else
  T lanes[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i < n ? p[i] : rest;
  return load<T>(lanes);
#endif
}

// Bit i is lane i of a comparison's result (all ones or all zeros in each lane).
template <class Mask>
inline __attribute__((always_inline)) unsigned mask_bits(Mask m) {
#if SSD_EXT_SIMD_LEVEL == 2
  if constexpr (sizeof(m) == 64 && sizeof(m[0]) == 4) return _mm512_movepi32_mask(bit_cast<__m512i>(m));
  if constexpr (sizeof(m) == 64 && sizeof(m[0]) == 8) return _mm512_movepi64_mask(bit_cast<__m512i>(m));
#elif SSD_EXT_SIMD_LEVEL == 1
  if constexpr (sizeof(m) == 32 && sizeof(m[0]) == 4) return _mm256_movemask_ps(bit_cast<__m256>(m));
  if constexpr (sizeof(m) == 32 && sizeof(m[0]) == 8) return _mm256_movemask_pd(bit_cast<__m256d>(m));
#elif SSD_EXT_X86
  if constexpr (sizeof(m) == 16 && sizeof(m[0]) == 4) return _mm_movemask_ps(bit_cast<__m128>(m));
#endif
  unsigned bits = 0;
  for (unsigned i = 0; i < sizeof(m) / sizeof(m[0]); ++i) bits |= unsigned(m[i] != 0) << i;
  return bits;
}

// mask_bits(a > b), without the detour by a vector that GCC 12 makes on AVX-512.
template <class V>
inline __attribute__((always_inline)) unsigned greater_bits(V a, V b) {
#if SSD_EXT_SIMD_LEVEL == 2
  if constexpr (std::is_same_v<V, Vec<float>>) {
    return _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_GT_OQ);
  } else if constexpr (std::is_same_v<V, Vec<double>>) {
    return _mm512_cmp_pd_mask(bit_cast<__m512d>(a), bit_cast<__m512d>(b), _CMP_GT_OQ);
  }
#endif
  return mask_bits(a > b);
}

// The blocks of kBlock lanes at even and at odd places of two vectors, in order.
template <class V>
struct Halves {
  V first, second;
};

template <int kBlock, class V, int... I>
inline __attribute__((always_inline)) Halves<V> even_and_odd_of(V v0, V v1, std::integer_sequence<int, I...>) {
  return {__builtin_shufflevector(v0, v1, (I + I / kBlock * kBlock)...),
          __builtin_shufflevector(v0, v1, (I + I / kBlock * kBlock + kBlock)...)};
}
template <int kBlock = 1, class V>
inline __attribute__((always_inline)) Halves<V> even_and_odd(V v0, V v1) {
  return even_and_odd_of<kBlock>(v0, v1, std::make_integer_sequence<int, int(sizeof(V) / sizeof(v0[0]))>{});
}

// The sum of the lanes of each of kLanes vectors: lane j belongs to v[j], which is lost. Within a vector
// each half is added to the other, then the halves of that, down to one lane.
template <class T, int kBlock = kLanes<T> / 2>
inline __attribute__((always_inline)) Vec<T> sums_of_lanes(Vec<T>* v) {
  for (int i = 0; i < kBlock; ++i) {
    const auto halves = even_and_odd<kBlock>(v[2 * i], v[2 * i + 1]);
    v[i] = halves.first + halves.second;
  }
  if constexpr (kBlock == 1) {
    return v[0];
  } else {
    return sums_of_lanes<T, kBlock / 2>(v);
  }
}

// Boxes in two vectors, as they lie in memory, against their two halves. With box k's four values
// (a, b, c, d), `first` holds the pairs (a, b) of all boxes and `second` the pairs (c, d), both in
// one order; so the arithmetic between is the same in every lane.
template <class V, int... I>
inline __attribute__((always_inline)) Halves<V> split_of(V v0, V v1, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return {__builtin_shufflevector(v0, v1, ((I & 2 ? n : 0) + (I & ~3) + (I & 1))...),
          __builtin_shufflevector(v0, v1, ((I & 2 ? n : 0) + (I & ~3) + (I & 1) + 2)...)};
}
template <class V>
inline __attribute__((always_inline)) Halves<V> split(V v0, V v1) {
  return split_of(v0, v1, std::make_integer_sequence<int, int(sizeof(V) / sizeof(ScalarOf<V>))>{});
}

// The inverse: two vectors of boxes again.
template <class V, int... I>
inline __attribute__((always_inline)) void join_of(Halves<V> h, V& v0, V& v1, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  v0 = __builtin_shufflevector(h.first, h.second, ((I & 2 ? n : 0) + (I & ~3) + (I & 1))...);
  v1 = __builtin_shufflevector(h.first, h.second, ((I & 2 ? n : 0) + (I & ~3) + (I & 1) + 2)...);
}
template <class V>
inline __attribute__((always_inline)) void join(Halves<V> h, V& v0, V& v1) {
  join_of(h, v0, v1, std::make_integer_sequence<int, int(sizeof(V) / sizeof(ScalarOf<V>))>{});
}

// kLanes rows of a [n, 4] array as four columns.
template <class T>
inline __attribute__((always_inline)) CenterBox<Vec<T>> load_columns(const T* rows) {
  const auto a = even_and_odd(load<T>(rows), load<T>(rows + kLanes<T>));
  const auto b = even_and_odd(load<T>(rows + 2 * kLanes<T>), load<T>(rows + 3 * kLanes<T>));
  const auto even = even_and_odd(a.first, b.first), odd = even_and_odd(a.second, b.second);
  return {even.first, odd.first, even.second, odd.second};
}

template <class T>
inline __attribute__((always_inline)) Box<Vec<T>> broadcast(const Box<T>& b) {
  return {splat<Vec<T>>(b.x1), splat<Vec<T>>(b.y1), splat<Vec<T>>(b.x2), splat<Vec<T>>(b.y2)};
}

template <class T>
inline __attribute__((always_inline)) Box<Vec<T>> load_boxes(const BoxColumns<T>& c, int64_t i) {
  return {load<T>(c.x1 + i), load<T>(c.y1 + i), load<T>(c.x2 + i), load<T>(c.y2 + i)};
}
