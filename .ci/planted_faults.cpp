// Faults for planted_faults.py, compiled as the extension is in the sanitizer stage.
#include <cstdint>

#include "boxes/boxes.h"
#define SSD_EXT_SIMD_FILE "boxes/boxes.simd.h"
#include "common/for_each_simd_level.h"

// The kernel of `encode` on `count` rows, however many the buffers hold.
extern "C" void encode_rows(const float* rows, const float* priors, float* deltas, int64_t count) {
  using namespace ssd_ext;
  const boxes::Coding coding{count, count, 0.1, 0.2, 0};
  SSD_EXT_SIMD_CALL(encode<float>, rows, priors, deltas, coding, 0, count);
}

extern "C" int32_t successor(int32_t x) { return x + 1; }
