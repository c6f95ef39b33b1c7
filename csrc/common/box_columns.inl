// Boxes as a structure of arrays, for vector loads. Included by for_each_simd_level.h.

// Row i of a [n, 4] array.
template <class T>
Box<T> box_at(const T* rows, int64_t i) {
  return {rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]};
}
template <class T>
CenterBox<T> prior_at(const T* rows, int64_t i) {
  return {rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]};
}

template <class T>
struct BoxColumns {
  // Vectors of any SIMD level may read whole blocks: up to `padded`, a multiple of kBlock. The
  // padding boxes lie at the origin and have no area, so they overlap nothing.
  static constexpr int64_t kBlock = 64;

  int64_t size = 0, padded = 0;
  T *x1 = nullptr, *y1 = nullptr, *x2 = nullptr, *y2 = nullptr, *areas = nullptr;

  explicit BoxColumns(int64_t n) : size(n), padded((n + kBlock - 1) / kBlock * kBlock), storage_(new T[5 * padded]) {
    T** columns[] = {&x1, &y1, &x2, &y2, &areas};
    for (int c = 0; c < 5; ++c) *columns[c] = storage_.get() + c * padded;
    for (int64_t i = n; i < padded; ++i) set(i, {T(0), T(0), T(0), T(0)});
  }

  BoxColumns(const T* rows, int64_t n) : BoxColumns(n) {  // of a [n, 4] array
    for (int64_t i = 0; i < n; ++i) set(i, box_at(rows, i));
  }

  Box<T> at(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }

  void set(int64_t i, const Box<T>& b) {
    x1[i] = b.x1;
    y1[i] = b.y1;
    x2[i] = b.x2;
    y2[i] = b.y2;
    areas[i] = area(b);
  }

 private:
  std::unique_ptr<T[]> storage_;
};
