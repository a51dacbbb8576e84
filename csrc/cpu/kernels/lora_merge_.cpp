// The merge kernels for one instruction set. Formulas, shapes and layout: lora_merge_.h.
#include "lora_merge_.h"

#include <type_traits>

#include "skinny.h"
#include "vec.h"

namespace peft_ext {
namespace {

// The signed integer of T's width.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, int64_t, std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;

// Sign-magnitude bits of a float to integers in the floats' order, and back: a bijection.
template <class I>
inline I flip_negative(I bits) {
  constexpr I kMagnitude = static_cast<I>(~(I(1) << (8 * sizeof(I) - 1)));
  return bits < 0 ? static_cast<I>(bits ^ kMagnitude) : bits;
}

template <class I>
using Unsigned = std::make_unsigned_t<I>;

template <class I>
inline I wrapping_add(I a, I b) {
  return static_cast<I>(static_cast<Unsigned<I>>(a) + static_cast<Unsigned<I>>(b));
}

template <class T>
struct Scratch {
  Scratch(void* memory, int64_t columns)
      : delta(static_cast<Acc<T>*>(memory)),
        merged(reinterpret_cast<T*>(delta + columns)),
        recovered(merged + columns) {}

  Acc<T>* delta;
  T* merged;
  T* recovered;
};

template <class T>
T* weight_row(const LoraMerge& problem, int64_t row) {
  return static_cast<T*>(problem.weight) + row * problem.row_stride;
}

template <class T>
void compute_delta(const LoraMerge& problem, int64_t row, Acc<T>* delta) {
  using C = Acc<T>;
  std::memset(delta, 0, problem.columns * sizeof(C));
  const Left<C> left{static_cast<const C*>(problem.left) + row * problem.left_row_stride, problem.left_row_stride,
                     problem.left_inner_stride};
  rank_update<C>(delta, problem.columns, delta, problem.columns, 1, problem.columns, left,
                 static_cast<const C*>(problem.right), problem.columns, problem.inner);
}

// target = round(source + sign delta).
template <class T>
void shift_row(T* target, const T* source, const Acc<T>* delta, Acc<T> sign, int64_t columns) {
  using C = Acc<T>;
  int64_t k = 0;
  for (; k + kLanes<C> <= columns; k += kLanes<C>) store(target + k, load(source + k) + sign * load(delta + k));
  for (; k < columns; ++k) target[k] = from_acc<T>(to_acc(source[k]) + sign * delta[k]);
}

template <class T>
int64_t merge(const LoraMerge& problem, int64_t row, void* outliers, void* memory) {
  using I = Bits<T>;
  const int64_t columns = problem.columns;
  const Scratch<T> scratch(memory, columns);
  T* weight = weight_row<T>(problem, row);
  compute_delta<T>(problem, row, scratch.delta);
  shift_row<T>(scratch.merged, weight, scratch.delta, 1, columns);
  shift_row<T>(scratch.recovered, scratch.merged, scratch.delta, -1, columns);
  int8_t* residual = problem.residual + row * columns;
  // Two loops: the first has no branch and becomes vector code, the second runs for the rare row with an outlier.
  int64_t misfits = 0;
  for (int64_t k = 0; k < columns; ++k) {
    const I wanted = flip_negative(bit_cast<I>(weight[k])), got = flip_negative(bit_cast<I>(scratch.recovered[k]));
    const I distance = static_cast<I>(static_cast<Unsigned<I>>(wanted) - static_cast<Unsigned<I>>(got));
    const bool is_number = to_acc(scratch.recovered[k]) == to_acc(scratch.recovered[k]);
    const bool fits = (distance > kOutlier) & (distance < -kOutlier) & is_number;
    residual[k] = fits ? static_cast<int8_t>(distance) : kOutlier;
    misfits += !fits;
  }
  int64_t count = 0;
  for (int64_t k = 0; count < misfits; ++k) {
    if (residual[k] == kOutlier) static_cast<T*>(outliers)[count++] = weight[k];
  }
  std::memcpy(weight, scratch.merged, columns * sizeof(T));
  return count;
}

template <class T>
int64_t unmerge(const LoraMerge& problem, int64_t row, const void* outliers, void* memory) {
  using I = Bits<T>;
  const int64_t columns = problem.columns;
  const Scratch<T> scratch(memory, columns);
  T* weight = weight_row<T>(problem, row);
  compute_delta<T>(problem, row, scratch.delta);
  shift_row<T>(scratch.recovered, weight, scratch.delta, -1, columns);
  const int8_t* residual = problem.residual + row * columns;
  int64_t marked = 0;
  for (int64_t k = 0; k < columns; ++k) {
    const I got = flip_negative(bit_cast<I>(scratch.recovered[k]));
    weight[k] = bit_cast<T>(flip_negative(wrapping_add(got, static_cast<I>(residual[k]))));
    marked += residual[k] == kOutlier;
  }
  int64_t count = 0;
  for (int64_t k = 0; count < marked; ++k) {
    if (residual[k] == kOutlier) weight[k] = static_cast<const T*>(outliers)[count++];
  }
  return count;
}

template <class T>
constexpr MergeKernels kernels() {
  return {merge<T>, unmerge<T>};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const MergeKernels merge_kernels[kNumStorages];
const MergeKernels merge_kernels[kNumStorages] = {kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                                                  kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
