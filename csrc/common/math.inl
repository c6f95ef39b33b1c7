// exp and log as explicit sequences of IEEE operations, the same on the host, on the device and in
// every SIMD width, so that what is selected by them agrees to the bit. Build with
// -ffp-contract=off and -fmad=false: a fused multiply-add would round differently.
//
// V is float, double, or a GCC vector of either. Included by box.h and for_each_simd_level.h.

template <class V>
struct LaneTraits {  // GCC vectors: a comparison yields the integer vector of the same width
  using Scalar = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;
  using Int = decltype(std::declval<V>() < std::declval<V>());
};
template <>
struct LaneTraits<float> {
  using Scalar = float;
  using Int = int32_t;
};
template <>
struct LaneTraits<double> {
  using Scalar = double;
  using Int = int64_t;
};
template <class V>
using ScalarOf = typename LaneTraits<V>::Scalar;
template <class V>
using IntOf = typename LaneTraits<V>::Int;

// The same value in every lane.
template <class V>
SSD_EXT_HD V splat(ScalarOf<V> x) {
  return x - V{};
}

template <class To, class From>
SSD_EXT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
SSD_EXT_HD V from_int(IntOf<V> i) {
  if constexpr (std::is_arithmetic_v<V>) {
    return static_cast<V>(i);
  } else {
#if !defined(__CUDACC__)
    return __builtin_convertvector(i, V);
#endif
  }
}

// b where either is NaN: the rule of the x86 instruction, spelled out so that every backend keeps it. GCC 12
// does not find that instruction for AVX-512.
template <class V>
SSD_EXT_HD V min_of(V a, V b) {
#if defined(SSD_EXT_SIMD_LEVEL) && SSD_EXT_SIMD_LEVEL == 2
  if constexpr (sizeof(V) == 64 && sizeof(ScalarOf<V>) == 4) {
    return bit_cast<V>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
  } else if constexpr (sizeof(V) == 64) {
    return bit_cast<V>(_mm512_min_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
  }
#endif
  return a < b ? a : b;
}
template <class V>
SSD_EXT_HD V max_of(V a, V b) {
#if defined(SSD_EXT_SIMD_LEVEL) && SSD_EXT_SIMD_LEVEL == 2
  if constexpr (sizeof(V) == 64 && sizeof(ScalarOf<V>) == 4) {
    return bit_cast<V>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
  } else if constexpr (sizeof(V) == 64) {
    return bit_cast<V>(_mm512_max_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
  }
#endif
  return a > b ? a : b;
}

namespace detail {

// Of the bits, where a signed shift might overflow.
template <class I>
SSD_EXT_HD I shift_left(I bits, int by) {
  if constexpr (std::is_integral_v<I>) {
    return I(std::make_unsigned_t<I>(bits) << by);
  } else {
    return bits << by;
  }
}

// 2^k, for k in the range of normal numbers; any number for another k, as it comes of a NaN.
template <class V>
SSD_EXT_HD V pow2(IntOf<V> k) {
  if constexpr (std::is_same_v<ScalarOf<V>, float>) {
    return bit_cast<V>(shift_left(k + 127, 23));
  } else {
    return bit_cast<V>(shift_left(k + 1023, 52));
  }
}

// p * 2^n for a whole number n near 1.5 * 2^m in `magic`: n = shifted - magic. In two steps, so that
// denormal and infinite results are rounded once; AVX-512 has an instruction that does the same.
template <class V>
SSD_EXT_HD V scale(V p, V shifted, ScalarOf<V> magic) {
#if defined(SSD_EXT_SIMD_LEVEL) && SSD_EXT_SIMD_LEVEL == 2
  if constexpr (sizeof(V) == 64 && sizeof(magic) == 4) {
    return bit_cast<V>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(shifted - magic)));
  } else if constexpr (sizeof(V) == 64) {
    return bit_cast<V>(_mm512_scalef_pd(bit_cast<__m512d>(p), bit_cast<__m512d>(shifted - magic)));
  }
#endif
  const IntOf<V> n = bit_cast<IntOf<V>>(shifted) - bit_cast<IntOf<ScalarOf<V>>>(magic), half = n >> 1;
  return p * pow2<V>(half) * pow2<V>(n - half);
}

// Degree-5 minimax polynomial after Cody-Waite reduction (Cephes expf). kNear: the result is a normal number, so that
// the power of two can be added to its exponent.
template <bool kNear, class V>
SSD_EXT_HD V exp_f32(V x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const V z = x * 1.44269504088896341f + magic;
  const V n = z - magic;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  if constexpr (kNear) return bit_cast<V>(bit_cast<IntOf<V>>(p) + shift_left(bit_cast<IntOf<V>>(z), 23));
  return scale<V>(p, z, magic);
}

// Remez approximation of r * (exp(r) + 1) / (exp(r) - 1) (fdlibm e_exp.c).
template <class V>
SSD_EXT_HD V exp_f64(V x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const V z = x * 1.44269504088896338700e+00 + magic;
  const V n = z - magic;
  const V hi = x - n * 6.93147180369123816490e-01;
  const V lo = n * 1.90821492927058770002e-10;
  const V r = hi - lo;
  const V t = r * r;
  V p = t * 4.13813679705723846039e-08 - 1.65339022054652515390e-06;
  p = p * t + 6.61375632143793436117e-05;
  p = p * t - 2.77777777770155933842e-03;
  p = p * t + 1.66666666666666019037e-01;
  const V c = r - t * p;
  const V y = 1.0 - ((lo - (r * c) / (2.0 - c)) - hi);
  return scale<V>(y, z, magic);
}

// Cephes logf on m in [sqrt(1/2), sqrt(2)).
template <class V>
SSD_EXT_HD V log_f32(V m, V e) {
  const V f = m - 1.f;
  const V f2 = f * f;
  V p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * f2;
  p = p + e * -2.12194440e-4f;
  p = p - f2 * 0.5f;
  return f + p + e * 0.693359375f;
}

// fdlibm e_log.c on m in [sqrt(1/2), sqrt(2)).
template <class V>
SSD_EXT_HD V log_f64(V m, V e) {
  const V f = m - 1.0;
  const V s = f / (2.0 + f);
  const V z = s * s;
  const V w = z * z;
  const V even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const V odd = z * (6.666666666666735130e-01 +
                     w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  const V half = f * f * 0.5;
  const V tail = s * (half + (even + odd)) + e * 1.90821492927058770002e-10;
  return e * 6.93147180369123816490e-01 - ((half - tail) - f);
}

}  // namespace detail

// e^x within 2 ulp (1 ulp in double); exp(-inf) = 0, exp(inf) = inf, NaN stays NaN.
template <class V>
SSD_EXT_HD V exp(V x) {
  constexpr bool single = std::is_same_v<ScalarOf<V>, float>;
  const V low = splat<V>(single ? -104.f : -746.0), high = splat<V>(single ? 89.f : 710.0);
  x = min_of(high, max_of(low, x));  // a NaN passes
  if constexpr (single) {
    return detail::exp_f32<false>(x);
  } else {
    return detail::exp_f64(x);
  }
}

// The bits of exp(x) for |x| <= kNearExponent, which needs neither bounds nor care in scaling.
constexpr float kNearExponent = 86;
SSD_EXT_HD float exp_near(float x) { return detail::exp_f32<true>(x); }

// Natural logarithm within 2 ulp (1 ulp in double); log(0) = -inf, log(x < 0) = NaN, log(inf) = inf.
template <class V>
SSD_EXT_HD V log(V x) {
  using T = ScalarOf<V>;
  using Int = IntOf<V>;
  constexpr bool single = std::is_same_v<T, float>;
  const V zero = splat<V>(0), inf = splat<V>(std::numeric_limits<T>::infinity());
  const auto denormal = x < splat<V>(std::numeric_limits<T>::min());
  const T up = single ? T(33554432.0) : T(18014398509481984.0);  // 2^25, 2^54
  const V y = denormal ? x * up : x;
  const V e0 = denormal ? splat<V>(single ? T(-25) : T(-54)) : zero;
  V result;
  // Exponent and mantissa about sqrt(1/2). The sign is cleared first, since no sum may overflow; what
  // comes of a negative x is replaced below.
  if constexpr (single) {
    const Int shifted = (bit_cast<Int>(y) & 0x7fffffff) - 0x3f3504f3;
    const V mantissa = bit_cast<V>((shifted & 0x007fffff) + 0x3f3504f3);
    result = detail::log_f32(mantissa, from_int<V>(shifted >> 23) + e0);
  } else {
    const Int shifted = (bit_cast<Int>(y) & 0x7fffffffffffffff) - 0x3fe6a09e667f3bcd;
    const V mantissa = bit_cast<V>((shifted & 0x000fffffffffffff) + 0x3fe6a09e667f3bcd);
    result = detail::log_f64(mantissa, from_int<V>(shifted >> 52) + e0);
  }
  result = x < inf ? result : x;  // inf and NaN
  result = x < zero ? splat<V>(std::numeric_limits<T>::quiet_NaN()) : result;
  return x == zero ? -inf : result;
}

// log(1 + x) for x >= 0 within 2 ulp, also where 1 + x rounds to 1; log1p(inf) = inf.
template <class V>
SSD_EXT_HD V log1p(V x) {
  const V one = splat<V>(1), sum = one + x;
  const V lost = x - (sum - one);  // what the addition rounded away
  return sum < splat<V>(std::numeric_limits<ScalarOf<V>>::infinity()) ? log(sum) + lost / sum : x;
}

// 1 / (1 + e^-x)
template <class V>
SSD_EXT_HD V sigmoid(V x) {
  const V one = splat<V>(1);
  return one / (one + exp(-x));
}
