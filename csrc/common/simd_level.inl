// All that a kernel file may use, defined for the SIMD level being compiled.
// clang-format off: each file builds on those before it
#include "common/math.inl"
#include "common/box.inl"
#include "common/order_key.inl"
#include "common/box_columns.inl"
#include "common/vec.inl"
#include "common/select_largest.inl"
#include "common/overlap.inl"
// clang-format on
