// What the attention kernels do with rows and blocks of queries, on vectors as on AMX. Shapes and layout:
// prefix_attention.h.
#pragma once

#include "dropout.h"
#include "prefix_attention.h"
#include "vec.h"

namespace peft_ext {
namespace {

template <class C>
constexpr C kInfinity = static_cast<C>(__builtin_inf());

// --- the exponential ---

template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Unsigned = uint32_t;
  static constexpr float kRound = 0x1.8p23f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f, kLowest = -87.0f;
  static constexpr int kMantissa = 23, kDegree = 6;
};
template <>
struct ExpConstants<double> {
  using Unsigned = uint64_t;
  static constexpr double kRound = 0x1.8p52, kLn2High = 0x1.62e42fefa0000p-1, kLn2Low = 0x1.cf79abc9e3b3ap-40,
                          kLowest = -708.0;
  static constexpr int kMantissa = 52, kDegree = 13;
};

// 1 / n!
template <class C>
constexpr C taylor(int n) {
  double factorial = 1;
  for (int i = 2; i <= n; ++i) factorial *= i;
  return static_cast<C>(1 / factorial);
}

// exp(x) for x <= 0 or nearly so: 2^n times the Taylor series of the rest, of at most ln(2) / 2. What would be
// subnormal is 0.
template <class C>
inline Vec<C> exp_vector(Vec<C> x) {
  using K = ExpConstants<C>;
  using Bits = Vec<typename K::Unsigned>;  // Of what is too low, the exponent wraps around and is thrown away.
  const Vec<C> shifted = x * static_cast<C>(0x1.71547652b82fep0) + K::kRound;
  const Vec<C> n = shifted - K::kRound;
  const Vec<C> rest = x - n * K::kLn2High - n * K::kLn2Low;
  Vec<C> sum = Vec<C>{} + taylor<C>(K::kDegree);
  for (int degree = K::kDegree - 1; degree >= 0; --degree) sum = sum * rest + taylor<C>(degree);
  const Bits exponent = (bit_cast<Bits>(shifted) << K::kMantissa) + bit_cast<Bits>(Vec<C>{} + 1);
  return x < K::kLowest ? Vec<C>{} : sum * bit_cast<Vec<C>>(exponent);
}

// By halves, so that the additions do not wait for one another.
template <class C>
inline C sum_lanes(Vec<C> value) {
  C lanes[kLanes<C>];
  store(lanes, value);
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// --- rows ---

template <class T>
const T* row_of(const Strided<const void*>& tensor, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(tensor.data) + b * tensor.batch_stride + h * tensor.head_stride + t * tensor.row_stride;
}

template <class T>
T* row_of(const Strided<void*>& tensor, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(tensor.data) + b * tensor.batch_stride + h * tensor.head_stride + t * tensor.row_stride;
}

// target = factor source, of `count` elements.
template <class To, class From, class C>
inline void scale_row(To* target, const From* source, int64_t count, C factor) {
  int64_t d = 0;
  for (; d + kLanes<C> <= count; d += kLanes<C>) store(target + d, factor * load(source + d));
  for (; d < count; ++d) target[d] = from_acc<To>(factor * to_acc(source[d]));
}

// The products of `left` [count] with kRight rows of `right`, each summed in a vector of its own.
template <int kRight, class C, class L, class T>
inline void dot_rows(C* out, const L* left, const T* right, int64_t right_stride, int64_t count) {
  Vec<C> sums[kRight] = {};
  int64_t d = 0;
  for (; d + kLanes<C> <= count; d += kLanes<C>) {
    const Vec<C> factor = load(left + d);
    for (int j = 0; j < kRight; ++j) sums[j] += factor * load(right + j * right_stride + d);
  }
  for (int j = 0; j < kRight; ++j) {
    C sum = sum_lanes<C>(sums[j]);
    for (int64_t tail = d; tail < count; ++tail) sum += to_acc(left[tail]) * to_acc(right[j * right_stride + tail]);
    out[j] = sum;
  }
}

// --- a block of queries ---

struct Block {
  int64_t begin, batch;  // Batch entries.
  int64_t head, heads;
  int64_t query, queries;

  int64_t segment() const { return heads * queries; }  // Rows of one batch entry.
  int64_t rows() const { return batch * segment(); }

  template <class Visit>
  void for_rows(const Visit& visit) const {
    int64_t row = 0;
    for (int64_t b = begin; b < begin + batch; ++b) {
      for (int64_t h = head; h < head + heads; ++h) {
        for (int64_t t = query; t < query + queries; ++t) visit(row++, b, h, t);
      }
    }
  }
};

// How many keys query t sees.
inline int64_t visible_keys(const PrefixAttention& problem, int64_t t) {
  if (!problem.causal) return problem.keys;
  const int64_t last = t + 1 + problem.keys - problem.queries;
  return last < 0 ? 0 : last;
}

// The scores of a row + mask, with -inf from the first column on that it does not see. The keys' columns are
// [first, end), those up to `width` are padding.
template <class C>
void mask_row(const PrefixAttention& problem, int64_t b, int64_t h, int64_t t, int64_t first, int64_t end,
              int64_t width, C* line) {
  const AttentionMask& mask = problem.mask;
  const int64_t visible = std::min(first + visible_keys(problem, t), end);
  for (int64_t j = visible; j < width; ++j) line[j] = -kInfinity<C>;
  if (!mask.data) return;
  const int64_t offset = b * mask.batch_stride + h * mask.head_stride + t * mask.row_stride;
  C* tokens = line + first;
  const int64_t count = visible - first;
  if (mask.is_bool) {
    const uint8_t* shown = static_cast<const uint8_t*>(mask.data) + offset;
    for (int64_t j = 0; j < count; ++j) tokens[j] = shown[j] ? tokens[j] : -kInfinity<C>;
  } else {
    const C* added = static_cast<const C*>(mask.data) + offset;
    for (int64_t j = 0; j < count; ++j) tokens[j] += added[j];
  }
}

template <class Work>
void draw_keep_masks(const PrefixAttention& problem, const Block& block, const Work& work) {
  if (problem.dropout.threshold == 0) return;
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    row_mask(work.keep + row * work.plan.mask_stride, (b * problem.heads + h) * problem.queries + t, 0,
             problem.prefix + problem.keys, problem.dropout);
  });
}

// Of a row's exponentials, and its largest score.
template <class C>
struct RowSum {
  C sum, maximum;
};

template <class C>
C row_maximum(const C* line, int64_t columns) {
  Vec<C> largest = Vec<C>{} - kInfinity<C>;
  for (int64_t j = 0; j < columns; j += kLanes<C>) {
    const Vec<C> value = load(line + j);
    largest = largest < value || value != value ? value : largest;
  }
  C maximum = largest[0];
  for (int lane = 1; lane < kLanes<C>; ++lane) maximum = maximum < largest[lane] ? largest[lane] : maximum;
  return maximum;
}

template <class Plan, class Visit>
void for_blocks(const PrefixAttention& problem, const Plan& plan, int64_t kv_head, int64_t begin, int64_t end,
                const Visit& visit) {
  const int64_t group = problem.heads / problem.kv_heads;
  for (int64_t b = begin; b < end; b += plan.batch) {
    const int64_t batch = end - b < plan.batch ? end - b : plan.batch;
    for (int64_t h = 0; h < group; h += plan.heads) {
      for (int64_t t = 0; t < problem.queries; t += plan.queries) {
        const int64_t queries = problem.queries - t < plan.queries ? problem.queries - t : plan.queries;
        const bool first = h == 0 && t == 0;
        const bool last = h + plan.heads == group && t + queries == problem.queries;
        visit(Block{b, batch, kv_head * group + h, plan.heads, t, queries}, first, last);
      }
    }
  }
}

}  // namespace
}  // namespace peft_ext
