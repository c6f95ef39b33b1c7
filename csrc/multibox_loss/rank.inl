// The arithmetic of ranks and of smooth L1, one for every backend; multibox_loss.h says what a rank is.
// Included by multibox_loss.simd.h and multibox_loss.cu.

// Larger sums are ranked by the loss itself: what is divided by them would lose its last digits.
template <class T>
constexpr T kLargestSum = T(18446744073709551616.0);  // 2^64

// V is T or a vector of it.
template <class V>
SSD_EXT_HD IntOf<V> rank_of_sum(V sum) {
  using T = ScalarOf<V>;
  return bit_cast<IntOf<V>>(sum) - bit_cast<IntOf<T>>(std::numeric_limits<T>::infinity());
}

template <class T>
SSD_EXT_HD T sum_of_rank(IntOf<T> rank) {
  using Bits = std::make_unsigned_t<IntOf<T>>;  // other ranks come here too, and must not overflow
  return bit_cast<T>(Bits(rank) + bit_cast<Bits>(std::numeric_limits<T>::infinity()));
}

// With top the greatest logit, at_label = x[y] and sum over all c of exp(x[c] - top).
template <class T>
SSD_EXT_HD IntOf<T> rank_of_large_loss(T top, T at_label, T sum) {
  const T loss = T((double(top) - double(at_label)) + log(double(sum)));
  return loss == loss ? bit_cast<IntOf<T>>(loss) : std::numeric_limits<IntOf<T>>::max();
}

template <class T>
SSD_EXT_HD double loss_of_rank(IntOf<T> rank) {
  return rank < 0 ? log1p(double(sum_of_rank<T>(rank))) : double(bit_cast<T>(rank));
}

// Smooth L1 (Girshick 2015, eq. 3) of e = delta - target, and its derivative.
SSD_EXT_HD double smooth_l1(double e, double beta) {
  const double size = e < 0 ? -e : e;
  return size < beta ? 0.5 * e * e / beta : size - 0.5 * beta;
}
SSD_EXT_HD double smooth_l1_slope(double e, double beta) {
  const double size = e < 0 ? -e : e;
  return size < beta ? e / beta : e > 0 ? 1 : e < 0 ? -1 : e;
}
