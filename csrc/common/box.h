#pragma once
// The arithmetic that every backend shares: exp and log, boxes, ordering keys.
//
// Its files are bodies without a namespace. This header gives them to scalar and device code, as
// ssd_ext::iou and so on. Vector code gets its own copy at each SIMD level: GCC breaks a vector
// operation up where the function that holds it was defined for a narrower target, even if it is
// inlined into one for a wider target.
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/macros.h"

namespace ssd_ext {

#include "common/math.inl"
// math.inl comes first
#include "common/box.inl"
#include "common/order_key.inl"

}  // namespace ssd_ext
