// CPU kernels of encode, decode and box_iou; compiled once per SIMD level.

template <class T>
Halves<Vec<T>> encode_halves(Halves<Vec<T>> box, Halves<Vec<T>> prior, const boxes::Coding& coding) {
  return {encode_center(box.first, box.second, prior.first, prior.second, T(coding.center)),
          encode_size(box.first, box.second, prior.second, T(coding.size))};
}

template <class T>
Halves<Vec<T>> decode_halves(Halves<Vec<T>> delta, Halves<Vec<T>> prior, const boxes::Coding& coding) {
  const Vec<T> center = decode_center(delta.first, prior.first, prior.second, T(coding.center));
  const Vec<T> half = decode_size(delta.second, prior.second, T(coding.size), T(coding.clip)) * T(0.5);
  return {center - half, center + half};
}

// out[r] = f(rows[r], priors[r % num_priors]) for begin <= r < end, two vectors of rows at a time.
template <class T, class F>
void for_rows(const T* rows, const T* priors, T* out, int64_t num_priors, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t lanes = kLanes<T>, step = lanes / 2;
  for (int64_t r = begin; r < end;) {
    const int64_t p = r % num_priors, run = end - r < num_priors - p ? end - r : num_priors - p;
    int64_t i = 0;
    for (; i + step <= run; i += step) {
      const T *row = rows + 4 * (r + i), *prior = priors + 4 * (p + i);
      Vec<T> v0, v1;
      join(f(split(load<T>(row), load<T>(row + lanes)), split(load<T>(prior), load<T>(prior + lanes))), v0, v1);
      store(out + 4 * (r + i), v0);
      store(out + 4 * (r + i) + lanes, v1);
    }
    if (i < run) {  // the last few rows, through buffers of a whole step
      const int64_t bytes = 4 * (run - i) * sizeof(T);
      T row[2 * lanes] = {}, prior[2 * lanes] = {};
      memcpy(row, rows + 4 * (r + i), bytes);
      memcpy(prior, priors + 4 * (p + i), bytes);
      Vec<T> v0, v1;
      join(f(split(load<T>(row), load<T>(row + lanes)), split(load<T>(prior), load<T>(prior + lanes))), v0, v1);
      store(row, v0);
      store(row + lanes, v1);
      memcpy(out + 4 * (r + i), row, bytes);
    }
    r += run;
  }
}

template <class T>
void encode(const T* rows, const T* priors, T* deltas, const boxes::Coding& coding, int64_t begin, int64_t end) {
  using H = Halves<Vec<T>>;
  for_rows(rows, priors, deltas, coding.num_priors, begin, end,
           [&](H b, H p) { return encode_halves<T>(b, p, coding); });
}

template <class T>
void decode(const T* deltas, const T* priors, T* rows, const boxes::Coding& coding, int64_t begin, int64_t end) {
  using H = Halves<Vec<T>>;
  for_rows(deltas, priors, rows, coding.num_priors, begin, end,
           [&](H d, H p) { return decode_halves<T>(d, p, coding); });
}

// out[i, j] = IoU of a[i] and b[j].
template <class T>
void box_iou(const T* a, const T* b, T* out, int64_t n, int64_t m) {
  using V = Vec<T>;
  const BoxColumns<T> columns(b, m);
  const int64_t grain = 1 + 32768 / (m + 1);
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Box<V> box = broadcast(box_at(a, i));
      const V box_area = area(box);
      for (int64_t j = 0; j < m; j += kLanes<T>) {
        const V value = iou_from(intersection(box, load_boxes(columns, j)), box_area, load<T>(columns.areas + j));
        T* to = out + i * m + j;
        if (j + kLanes<T> <= m) {
          store(to, value);
        } else {
          store_first(to, m - j, value);
        }
      }
    }
  });
}
