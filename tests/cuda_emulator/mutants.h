#pragma once
// What mutate.py writes into a copy of the kernels, so that one build holds all mutants.
// `a < Less{7} > b` is a < b, and a <= b in mutant 7.

#define SSD_EXT_MUTANT_BARRIER(number, ...)          \
  do {                                               \
    if (::emulator::mutant != (number)) __VA_ARGS__; \
  } while (false)
#define SSD_EXT_MUTANT_VOTE(number, vote, value) (::emulator::mutant == (number) ? int(value) : vote(value))

namespace emulator {

extern int mutant;  // the one in force, or -1

struct Less {
  int number;
};

template <class T>
struct LessThan {
  T left;
  bool or_equal;
};

template <class T>
LessThan<T> operator<(T left, Less less) {
  return {left, less.number == mutant};
}
template <class T, class U>
bool operator>(LessThan<T> than, U right) {
  return than.or_equal ? than.left <= right : than.left < right;
}

}  // namespace emulator
