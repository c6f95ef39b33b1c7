// Floats as integers of the same order, for exact selection and sorting on every backend.
//
// V is float, double, or a GCC vector of either; the keys are the signed integers of that width:
//   key(a) < key(b) exactly where a < b, so -inf < ... < inf; -0 and 0 have the same key, 0.
// Every NaN, whatever its sign and payload, has one key, beyond the infinities: the greatest integer
// or the least, as the name says. The opposite extreme is the key of nothing, free to mark an absent
// element. Mining ranks a NaN loss first (nan_greatest), NMS visits a NaN score last (nan_least).
// Integer operations only: modes that flush denormals change nothing.
// Included by box.h and for_each_simd_level.h.

namespace detail {

template <class V>
SSD_EXT_HD IntOf<V> order_key(V x, IntOf<ScalarOf<V>> nan) {
  using I = IntOf<V>;
  using Scalar = IntOf<ScalarOf<V>>;
  const I bits = bit_cast<I>(x);
  const I magnitude = bits & std::numeric_limits<Scalar>::max();
  const I sign = bits >> (8 * int(sizeof(Scalar)) - 1);  // 0 or -1
  const I key = (magnitude ^ sign) - sign;
  return magnitude > bit_cast<Scalar>(std::numeric_limits<ScalarOf<V>>::infinity()) ? I{} + nan : key;
}

}  // namespace detail

template <class V>
SSD_EXT_HD IntOf<V> order_key_nan_greatest(V x) {
  return detail::order_key(x, std::numeric_limits<IntOf<ScalarOf<V>>>::max());
}

template <class V>
SSD_EXT_HD IntOf<V> order_key_nan_least(V x) {
  return detail::order_key(x, std::numeric_limits<IntOf<ScalarOf<V>>>::min());
}

// The float of a key, but 0 for -0 and -0 for a NaN that was the least.
template <class V>
SSD_EXT_HD V from_order_key(IntOf<V> key) {
  using Unsigned = std::make_unsigned_t<IntOf<V>>;
  constexpr Unsigned sign = Unsigned(1) << (8 * sizeof(V) - 1);
  return bit_cast<V>(key < 0 ? sign | (Unsigned(0) - Unsigned(key)) : Unsigned(key));
}

// A key as the unsigned integer of the same order, for radix digits.
SSD_EXT_HD uint32_t radix_key(int32_t key) { return uint32_t(key) ^ 0x80000000u; }
SSD_EXT_HD uint64_t radix_key(int64_t key) { return uint64_t(key) ^ 0x8000000000000000u; }
SSD_EXT_HD int32_t from_radix_key(uint32_t key) { return int32_t(key ^ 0x80000000u); }
SSD_EXT_HD int64_t from_radix_key(uint64_t key) { return int64_t(key ^ 0x8000000000000000u); }
