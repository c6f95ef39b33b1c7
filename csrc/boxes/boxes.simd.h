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

// Rows begin .. end of out[n, m].
template <class T>
void box_iou(const T* a, const BoxColumns<T>& b, T* out, int64_t begin, int64_t end) {
  using V = Vec<T>;
  for (int64_t i = begin; i < end; ++i) {
    const Box<T> one = box_at(a, i);
    const Box<V> box{splat<V>(one.x1), splat<V>(one.y1), splat<V>(one.x2), splat<V>(one.y2)};
    const V box_area = splat<V>(area(one));
    for (int64_t j = 0; j < b.size; j += kLanes<T>) {
      const Box<V> other{load<T>(b.x1 + j), load<T>(b.y1 + j), load<T>(b.x2 + j), load<T>(b.y2 + j)};
      const V value = iou_from(intersection(box, other), box_area, load<T>(b.area + j));
      T* to = out + i * b.size + j;
      if (j + kLanes<T> <= b.size) {
        store(to, value);
      } else {
        store_first(to, b.size - j, value);
      }
    }
  }
}
