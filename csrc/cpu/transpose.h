// The transposition of a square of vectors, for the sources that are compiled once per instruction set.
//
// Example:
//
//   floats<kLanes> rows[kLanes];
//   for (int i = 0; i < kLanes; ++i) rows[i] = load<kLanes>(x + i * ld);
//   transpose_square(rows);  // rows[j] = x[j], x[ld + j], x[2 * ld + j], ...
#pragma once

#include "vectors.h"

namespace densenet_fast {
namespace {

template <int... LANE>
struct LaneNumbers {};
template <int LEFT, int... LANE>
struct LanesUpTo : LanesUpTo<LEFT - 1, LEFT - 1, LANE...> {};
template <int... LANE>
struct LanesUpTo<0, LANE...> : LaneNumbers<LANE...> {};

// Exchanges the off-diagonal halves of the squares of 2 * DISTANCE lanes of two rows that are so far apart
template <int DISTANCE, typename V, int... LANE>
inline void exchange(V& first, V& second, LaneNumbers<LANE...>) {
  constexpr int kCount = sizeof...(LANE);
  const V upper = __builtin_shufflevector(first, second, (LANE & DISTANCE ? kCount + LANE - DISTANCE : LANE)...);
  second = __builtin_shufflevector(first, second, (LANE & DISTANCE ? kCount + LANE : LANE + DISTANCE)...);
  first = upper;
}

template <int DISTANCE, typename V>
inline void exchange_all(V* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & DISTANCE)) {
      exchange<DISTANCE>(rows[i], rows[i + DISTANCE], LanesUpTo<kLanes>());
    }
  }
}

// rows[i][j] becomes rows[j][i], of vectors of kLanes
template <typename V>
inline void transpose_square(V* rows) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  if constexpr (kLanes > 4) exchange_all<4>(rows);
  if constexpr (kLanes > 8) exchange_all<8>(rows);
}

}  // namespace
}  // namespace densenet_fast
