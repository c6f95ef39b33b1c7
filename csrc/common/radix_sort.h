#pragma once
// Stable sort of 64-bit entries by their upper 32 bits, least significant digit first.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace ssd_ext {

// Entries whose upper halves are equal stay in order; fewer than 2^32 of them.
inline void sort_by_upper_half(std::vector<uint64_t>& entries) {
  const size_t n = entries.size();
  if (n <= 48) {
    std::stable_sort(entries.begin(), entries.end(), [](uint64_t a, uint64_t b) { return a >> 32 < b >> 32; });
    return;
  }
  uint32_t low = ~0u, high = 0;
  for (const uint64_t e : entries) {
    low = std::min(low, static_cast<uint32_t>(e >> 32));
    high = std::max(high, static_cast<uint32_t>(e >> 32));
  }
  if (low == high) return;
  // Only the bits in which keys differ from the least are sorted by: scores of one range need fewer
  // digits. Digits are as wide as their tables are worth clearing for n entries.
  const int bits = 32 - __builtin_clz(high - low), widest = n < 4096 ? 9 : 11;
  const int digits = (bits + widest - 1) / widest, width = (bits + digits - 1) / digits;
  const uint32_t size = 1u << width, mask = size - 1;
  std::vector<uint32_t> counts(digits * size, 0);
  for (const uint64_t e : entries) {
    uint32_t key = static_cast<uint32_t>(e >> 32) - low;
    for (int d = 0; d < digits; ++d, key >>= width) ++counts[d * size + (key & mask)];
  }
  std::vector<uint64_t> other(n);
  for (int d = 0; d < digits; ++d) {
    uint32_t* position = counts.data() + d * size;
    uint32_t start = 0;
    for (uint32_t b = 0; b < size; ++b) {
      const uint32_t count = position[b];
      position[b] = start;
      start += count;
    }
    for (const uint64_t e : entries) {
      other[position[(static_cast<uint32_t>(e >> 32) - low) >> (d * width) & mask]++] = e;
    }
    entries.swap(other);
  }
}

}  // namespace ssd_ext
