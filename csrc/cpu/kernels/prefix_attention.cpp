// The attention kernels for one instruction set. Formulas, shapes and layout: prefix_attention.h.
#include "prefix_attention.h"

#include "amx.h"
#include "dropout.h"
#include "skinny.h"
#include "transpose.h"
#include "vec.h"

namespace peft_ext {
namespace {

constexpr int64_t kFewRows = PrefixAttentionPlan::kFewRows;

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
template <int kRight, class C, class T>
inline void dot_rows(C* out, const C* left, const T* right, int64_t right_stride, int64_t count) {
  Vec<C> sums[kRight] = {};
  int64_t d = 0;
  for (; d + kLanes<C> <= count; d += kLanes<C>) {
    const Vec<C> factor = load(left + d);
    for (int j = 0; j < kRight; ++j) sums[j] += factor * load(right + j * right_stride + d);
  }
  for (int j = 0; j < kRight; ++j) {
    C sum = sum_lanes<C>(sums[j]);
    for (int64_t tail = d; tail < count; ++tail) sum += left[tail] * to_acc(right[j * right_stride + tail]);
    out[j] = sum;
  }
}

// out [rows, count] = left [rows, dim] right [count, dim]^T for few rows: right is read once, where it lies.
template <class T>
void dots(Acc<T>* out, int64_t out_stride, const Acc<T>* left, int64_t rows, const T* right, int64_t right_stride,
          int64_t count, int64_t dim) {
  constexpr int kRight = 8, kAhead = 3 * kRight;
  int64_t j = 0;
  const auto advance = [&](auto tile) {
    constexpr int kCount = decltype(tile)::value;
    const T* block = right + j * right_stride;
    for (int64_t i = 0; i < rows; ++i) {
      dot_rows<kCount>(out + i * out_stride + j, left + i * dim, block, right_stride, dim);
    }
    j += kCount;
  };
  for (; j + kRight <= count;) {
    // Rows of one head lie far apart, so that the hardware does not see where the next ones are.
    for (int i = 0; i < kRight && j + kAhead + i < count; ++i) {
      const char* next = reinterpret_cast<const char*>(right + (j + kAhead + i) * right_stride);
      for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(next + byte);
    }
    advance(Constant<kRight>{});
  }
  while (j < count) advance(Constant<1>{});
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

template <class T>
struct Work {
  using C = Acc<T>;

  Work(const PrefixAttention& problem, void* memory) : plan(problem) {
    C* next = static_cast<C*>(memory);
    const auto take = [&next](int64_t elements) {
      C* taken = next;
      next += elements;
      return taken;
    };
    const int64_t rows = plan.rows, tokens = plan.tokens * problem.dim;
    scores = take(rows * plan.width);
    gradients = take(rows * plan.width);
    q = take(rows * problem.dim);
    grad_out = take(rows * problem.dim);
    product = take(rows * problem.dim);
    sums = take(rows);
    deltas = take(rows);
    keys_t = take(tokens);
    values_t = take(tokens);
    if (plan.copies) {
      keys = take(tokens);
      values = take(tokens);
      grad_keys = take(tokens);
      grad_values = take(tokens);
    }
    keep = reinterpret_cast<uint8_t*>(next);
  }

  PrefixAttentionPlan plan;
  C *scores, *gradients, *q, *grad_out, *product, *sums, *deltas, *keys_t, *values_t;
  C *keys = nullptr, *values = nullptr, *grad_keys = nullptr, *grad_values = nullptr;
  uint8_t* keep;
};

// [count, dim] of one batch entry and head in the accumulation type.
template <class T>
struct Rows {
  const Acc<T>* data;
  int64_t stride;
};

// Where they lie; or, narrower ones always and others where `dense` is wanted, a dense copy in `target`: rows that lie
// a power of two apart fall into few sets of the cache.
template <class T>
Rows<T> rows_of(const Strided<const void*>& tensor, int64_t b, int64_t h, int64_t count, int64_t dim, bool dense,
                Acc<T>* target) {
  const T* source = row_of<T>(tensor, b, h, 0);
  if constexpr (std::is_same_v<T, Acc<T>>) {
    if (!dense || tensor.row_stride == dim) return {source, tensor.row_stride};
  }
  for (int64_t i = 0; i < count; ++i) scale_row(target + i * dim, source + i * tensor.row_stride, dim, Acc<T>(1));
  return {target, dim};
}

template <class T>
void gather(const Strided<const void*>& source, const Block& block, int64_t dim, Acc<T> factor, Acc<T>* target) {
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    scale_row(target + row * dim, row_of<T>(source, b, h, t), dim, factor);
  });
}

// How many keys query t sees.
inline int64_t visible_keys(const PrefixAttention& problem, int64_t t) {
  if (!problem.causal) return problem.keys;
  const int64_t last = t + 1 + problem.keys - problem.queries;
  return last < 0 ? 0 : last;
}

constexpr int64_t kPanel = PrefixAttentionPlan::kPanel;

// out [rows, columns] = left [rows, dim] right, whose panels of kPanel columns lie `panel_step` apart.
template <class C>
void multiply_panels(C* out, int64_t out_stride, const C* left, int64_t rows, int64_t dim, const C* right,
                     int64_t right_stride, int64_t panel_step, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t count = columns - j < kPanel ? columns - j : kPanel;
    project<C>(out + j, out_stride, left, dim, rows, right + j / kPanel * panel_step, right_stride, count, dim, 1);
  }
}

// Transposed, as panels [dim, kPanel].
template <class T>
void pack_panels(const Rows<T>& rows, int64_t tokens, int64_t dim, Acc<T>* panels) {
  for (int64_t j = 0; j < tokens; j += kPanel) {
    const int64_t count = tokens - j < kPanel ? tokens - j : kPanel;
    transpose<Acc<T>>(rows.data + j * rows.stride, rows.stride, count, dim, panels + j * dim, kPanel);
  }
}

// out = rows of the block times [prefix; keys]^T, the first `tokens` keys of each batch entry. The prefix comes
// transposed, [dim, prefix]; the keys as panels where they are `packed`, else they are packed here, as many as count.
template <class T>
void multiply_columns(const PrefixAttention& problem, const Block& block, const Acc<T>* left, const Acc<T>* prefix_t,
                      const Strided<const void*>& keys, int64_t kv_head, bool packed, int64_t tokens, Acc<T>* panels,
                      Acc<T>* wide, Acc<T>* out, int64_t width) {
  using C = Acc<T>;
  const int64_t dim = problem.dim, segment = block.segment();
  multiply_panels<C>(out, width, left, block.rows(), dim, prefix_t, problem.prefix, kPanel, problem.prefix);
  if (tokens == 0) return;
  for (int64_t i = 0; i < block.batch; ++i) {
    C* target = out + i * segment * width + problem.prefix;
    const C* rows = left + i * segment * dim;
    if (segment < kFewRows) {
      dots<T>(target, width, rows, segment, row_of<T>(keys, block.begin + i, kv_head, 0), keys.row_stride, tokens, dim);
      continue;
    }
    if (!packed) {
      pack_panels<T>(rows_of<T>(keys, block.begin + i, kv_head, tokens, dim, false, wide), tokens, dim, panels);
    }
    multiply_panels<C>(target, width, rows, segment, dim, panels, kPanel, kPanel * dim, tokens);
  }
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

template <class T>
void apply_mask(const PrefixAttention& problem, const Block& block, int64_t columns, Acc<T>* scores, int64_t width) {
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    mask_row(problem, b, h, t, problem.prefix, columns, width, scores + row * width);
  });
}

template <class T>
void draw_keep_masks(const PrefixAttention& problem, const Block& block, Work<T>& work) {
  if (problem.dropout.threshold == 0) return;
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    row_mask(work.keep + row * work.plan.mask_stride, (b * problem.heads + h) * problem.queries + t,
             problem.prefix + problem.keys, problem.dropout);
  });
}

template <class C>
inline int64_t whole_vectors(int64_t columns) {
  return (columns + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// A row's exponentials in place of its scores (whole vectors of columns); returns their sum and the maximum.
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

template <class C>
RowSum<C> exponentiate(C* line, int64_t columns) {
  const C maximum = row_maximum(line, columns);
  const C shift = maximum == -kInfinity<C> ? C(0) : maximum;  // Nothing visible: all exponentials are 0.
  Vec<C> sums{};
  for (int64_t j = 0; j < columns; j += kLanes<C>) {
    const Vec<C> value = exp_vector<C>(load(line + j) - shift);
    sums += value;
    store(line + j, value);
  }
  return {sum_lanes<C>(sums), maximum};
}

template <class C>
void drop_row(C* line, int64_t columns, const uint8_t* keep, C scale) {
  for (int64_t j = 0; j < columns; j += kLanes<C>) {
    store(line + j, select_kept<C>(load(line + j) * scale, keep, j));
  }
}

// Whether all rows of a block are one batch entry's, so that packing its keys once serves all its blocks.
inline bool shares_keys(const PrefixAttentionPlan& plan, const Block& block) {
  return plan.batch == 1 && block.segment() >= kFewRows;
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

template <class T>
void forward_block(const PrefixAttentionForward& problem, const Block& block, int64_t kv_head, const Rows<T>* values,
                   Work<T>& work) {
  using C = Acc<T>;
  const int64_t dim = problem.dim, width = work.plan.width, segment = block.segment(), prefix = problem.prefix;
  const int64_t tokens = visible_keys(problem, block.query + block.queries - 1), columns = prefix + tokens;
  gather<T>(problem.q, block, dim, static_cast<C>(problem.scale), work.q);
  multiply_columns<T>(problem, block, work.q, static_cast<const C*>(problem.prefix_key_t) + kv_head * dim * prefix,
                      problem.k, kv_head, values != nullptr, tokens, work.keys_t, work.keys, work.scores, width);
  apply_mask<T>(problem, block, columns, work.scores, width);
  draw_keep_masks<T>(problem, block, work);
  const int64_t vectors = whole_vectors<C>(columns);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    C* line = work.scores + row * width;
    const RowSum<C> found = exponentiate(line, vectors);
    work.sums[row] = found.sum;
    static_cast<C*>(problem.lse)[(b * problem.heads + h) * problem.queries + t] =
        found.maximum + static_cast<C>(__builtin_log(found.sum));
    if (problem.dropout.threshold != 0) {
      drop_row(line, vectors, work.keep + row * work.plan.mask_stride, static_cast<C>(problem.dropout.scale));
    }
  });
  project<C>(work.product, dim, work.scores, width, block.rows(),
             static_cast<const C*>(problem.prefix_value) + kv_head * prefix * dim, dim, dim, prefix, 1);
  for (int64_t i = 0; tokens > 0 && i < block.batch; ++i) {
    const Rows<T> right =
        values ? *values
               : rows_of<T>(problem.v, block.begin + i, kv_head, tokens, dim, segment >= kFewRows, work.values);
    project<C>(work.product + i * segment * dim, dim, work.scores + i * segment * width + prefix, width, segment,
               right.data, right.stride, dim, tokens, 1, true);
  }
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    const C sum = work.sums[row];
    scale_row(row_of<T>(problem.out, b, h, t), work.product + row * dim, dim, sum == 0 ? C(0) : 1 / sum);
  });
}

#if defined(__AMX_BF16__)

struct TileWork {
  TileWork(const PrefixAttentionForward& problem, void* memory) : plan(problem) {
    auto* next = static_cast<float*>(memory);
    const auto take = [&next](int64_t elements) {
      float* taken = next;
      next += elements;
      return taken;
    };
    const auto take_half = [&take](int64_t values) { return reinterpret_cast<BFloat16*>(take(values / 2)); };
    scores = take(plan.rows * plan.width);
    weights = take_half(2 * plan.rows * plan.width);
    q = take_half(plan.rows * plan.dim);
    copy = take_half(plan.keys * plan.dim);
    keys = take_half(plan.keys * plan.dim);
    values = take_half(plan.keys * plan.dim);
    products = take(plan.products);
    of_prefix = take(2 * plan.rows * plan.dim);
    of_keys = take(2 * plan.rows * plan.dim);
    sums = take(plan.rows);
  }

  PrefixAttentionTiles plan;
  float* scores;
  BFloat16* weights;  // [2 rows, width]: the exponentials' first eight bits, then their next.
  BFloat16* q;
  BFloat16* copy;
  BFloat16* keys;    // Right operand of q k^T.
  BFloat16* values;  // Right operand of weights v.
  float* products;
  float *of_prefix, *of_keys;  // [2 rows, dim]: the weights' parts times the values.
  float* sums;
};

inline void add_row(float* target, const float* source, int64_t count) {
  int64_t d = 0;
  for (; d + kLanes<float> <= count; d += kLanes<float>) store(target + d, load(target + d) + load(source + d));
  for (; d < count; ++d) target[d] += source[d];
}

// The right operands of one batch entry.
void pack_entry(const PrefixAttentionForward& problem, int64_t b, int64_t kv_head, const TileWork& work) {
  const PrefixAttentionTiles& plan = work.plan;
  const auto padded_entry = [&](const Strided<const void*>& tensor) {
    return padded_rows(work.copy, row_of<BFloat16>(tensor, b, kv_head, 0), tensor.row_stride, problem.keys,
                       problem.dim);
  };
  const PaddedRows k = padded_entry(problem.k);
  for (int64_t j = 0; j < plan.keys; j += kTileOuts) {
    // Pairs of neighbours are words.
    for (int64_t i = 0; i < plan.dim; i += kTileInner) {
      alignas(64) float words[kTileOuts * kTileInner / 2];
      for (int64_t key = 0; key < kTileOuts; ++key) {
        std::memcpy(words + key * kTileInner / 2, k.data + (j + key) * k.stride + i, kTileInner * sizeof(BFloat16));
      }
      transpose(words, kTileInner / 2, kTileOuts, kTileInner / 2,
                reinterpret_cast<float*>(work.keys + j * plan.dim + i * kTileOuts), kTileOuts);
    }
  }
  const PaddedRows v = padded_entry(problem.v);
  for (int64_t j = 0; j < plan.dim; j += 2 * kTileOuts) {
    pack_pairs(work.values + j * plan.keys, v.data + j, v.stride, plan.keys);
  }
}

// As exponentiate, of `factor` times the scores, in two parts; whole tiles of columns.
RowSum<float> exponentiate_parts(const float* line, int64_t columns, float factor, BFloat16* first, BFloat16* second) {
  const float maximum = factor * row_maximum(line, columns);
  const float shift = maximum == -kInfinity<float> ? 0.0f : maximum;
  Vec<float> sums{}, more_sums{};
  for (int64_t j = 0; j < columns; j += kTileInner) {
    const Vec<float> low = exp_vector<float>(factor * load(line + j) - shift);
    const Vec<float> high = exp_vector<float>(factor * load(line + j + kLanes<float>) - shift);
    sums += low;
    more_sums += high;
    _mm512_storeu_si512(first + j, first_parts(low, high));
    _mm512_storeu_si512(second + j, first_parts(without_first_part(low), without_first_part(high)));
  }
  return {sum_lanes<float>(sums + more_sums), maximum};
}

// out = left right of whole tiles, where right is one of TileWork's.
void multiply_all(float* out, int64_t out_stride, const BFloat16* left, int64_t left_stride, int64_t rows,
                  const BFloat16* right, int64_t right_stride, int64_t outs, int64_t inner) {
  for_tiles(rows, outs, [&](int64_t i, int64_t j, auto m, auto n) {
    multiply_tiles<decltype(m)::value, decltype(n)::value>(out + i * out_stride + j, out_stride, left + i * left_stride,
                                                           left_stride, right + j * right_stride,
                                                           kTileOuts * right_stride, inner);
  });
}

void forward_block_tiles(const PrefixAttentionForward& problem, const Block& block, int64_t kv_head,
                         const TileWork& work) {
  const PrefixAttentionTiles& plan = work.plan;
  const int64_t dim = problem.dim, width = plan.width, prefix = problem.prefix, rows = padded(block.rows(), kTileRows);
  const int64_t tokens = visible_keys(problem, block.query + block.queries - 1), seen = padded(tokens, kTileInner);
  const int64_t columns = plan.prefix + seen;
  clear(work.q, plan.rows * plan.dim);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    std::memcpy(work.q + row * plan.dim, row_of<BFloat16>(problem.q, b, h, t), dim * sizeof(BFloat16));
  });
  const auto* key_tiles = static_cast<const BFloat16*>(problem.prefix_key_tiles);
  key_tiles += kv_head * padded(problem.parts * prefix, kTileOuts) * plan.dim;
  project_by_tiles(work.scores, width, work.q, plan.dim, block.rows(), key_tiles, prefix, problem.parts, dim, 1,
                   work.products);
  multiply_all(work.scores + plan.prefix, width, work.q, plan.dim, rows, work.keys, plan.dim, seen, plan.dim);

  // An added mask is not multiplied by the scale; nor does the largest score stay it by a negative one.
  const bool scales_first = problem.scale <= 0 || (problem.mask.data && !problem.mask.is_bool);
  const float scale = static_cast<float>(problem.scale);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    float* line = work.scores + row * width;
    if (scales_first) scale_row(line, line, columns, scale);
    for (int64_t j = prefix; j < plan.prefix; ++j) line[j] = -kInfinity<float>;
    mask_row(problem, b, h, t, plan.prefix, plan.prefix + tokens, columns, line);
    const RowSum<float> found =
        exponentiate_parts(line, columns, scales_first ? 1.0f : scale, work.weights + row * width,
                           work.weights + (plan.rows + row) * width);
    work.sums[row] = found.sum;
    static_cast<float*>(problem.lse)[(b * problem.heads + h) * problem.queries + t] =
        found.maximum + static_cast<float>(__builtin_log(found.sum));
  });

  // Both parts of the weights at once, as so many rows more.
  if (prefix > 0) {
    const auto* value_tiles = static_cast<const BFloat16*>(problem.prefix_value_tiles);
    value_tiles += kv_head * padded(problem.parts * dim, kTileOuts) * plan.prefix;
    project_by_tiles(work.of_prefix, plan.dim, work.weights, width, 2 * plan.rows, value_tiles, dim, problem.parts,
                     prefix, 1, work.products);
  }
  multiply_all(work.of_keys, plan.dim, work.weights + plan.prefix, width, 2 * plan.rows, work.values, plan.keys,
               plan.dim, seen);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    const float sum = work.sums[row], factor = sum == 0 ? 0.0f : 1 / sum;
    float* line = work.of_keys + row * plan.dim;
    add_row(line, line + plan.rows * plan.dim, plan.dim);
    for (int64_t part = 0; prefix > 0 && part < 2; ++part) {
      add_row(line, work.of_prefix + (part * plan.rows + row) * plan.dim, dim);
    }
    scale_row(row_of<BFloat16>(problem.out, b, h, t), line, dim, factor);
  });
}

#endif

template <class T>
void forward(const PrefixAttentionForward& problem, int64_t kv_head, int64_t begin, int64_t end, void* memory) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (problem.parts) {
      const TileWork work(problem, memory);
      return with_tiles([&] {
        for_blocks(problem, work.plan, kv_head, begin, end, [&](const Block& block, bool first, bool) {
          if (first) pack_entry(problem, block.begin, kv_head, work);
          forward_block_tiles(problem, block, kv_head, work);
        });
      });
    }
  }
#endif
  Work<T> work(problem, memory);
  Rows<T> values{};
  for_blocks(problem, work.plan, kv_head, begin, end, [&](const Block& block, bool first, bool) {
    const bool shared = shares_keys(work.plan, block);
    if (shared && first) {
      const int64_t keys = problem.keys, dim = problem.dim;
      pack_panels<T>(rows_of<T>(problem.k, block.begin, kv_head, keys, dim, false, work.keys), keys, dim, work.keys_t);
      values = rows_of<T>(problem.v, block.begin, kv_head, keys, dim, true, work.values);
    }
    forward_block<T>(problem, block, kv_head, shared ? &values : nullptr, work);
  });
}

// Where the gradient of one batch entry's keys or values is summed: in place, or in `dense` until it is complete.
template <class T>
struct Sum {
  Acc<T>* data;
  int64_t stride;
  bool in_place;
};

template <class T>
Sum<T> sum_of(const Strided<void*>& gradient, int64_t b, int64_t kv_head, int64_t dim, Acc<T>* dense) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    const bool in_place = !dense || gradient.row_stride == dim;
    if (in_place) return {row_of<T>(gradient, b, kv_head, 0), gradient.row_stride, true};
  }
  return {dense, dim, false};
}

// gradient [tokens, dim] += weights [segment, tokens]^T rows [segment, dim]; begins at 0 in the first block of a batch
// entry, and is stored in the last.
template <class T>
void add_gradient(const PrefixAttention& problem, const Strided<void*>& gradient, int64_t b, int64_t kv_head,
                  int64_t tokens, const Acc<T>* weights, int64_t width, const Acc<T>* rows, int64_t segment, bool first,
                  bool last, Acc<T>* dense) {
  using C = Acc<T>;
  const int64_t dim = problem.dim;
  const Sum<T> sum = sum_of<T>(gradient, b, kv_head, dim, dense);
  const int64_t untouched = first ? tokens : problem.keys;
  for (int64_t j = untouched; j < problem.keys; ++j) std::memset(sum.data + j * sum.stride, 0, dim * sizeof(C));
  rank_update<C>(first ? nullptr : sum.data, sum.stride, sum.data, sum.stride, tokens, dim, Left<C>{weights, 1, width},
                 rows, dim, segment);
  if (!last || sum.in_place) return;
  for (int64_t j = 0; j < problem.keys; ++j) {
    scale_row(row_of<T>(gradient, b, kv_head, j), sum.data + j * sum.stride, dim, C(1));
  }
}

// From scores and grad_out v^T in place: drop(p), whose product with grad_out is dv, and ds.
template <class T>
void differentiate_rows(const PrefixAttentionBackward& problem, const Block& block, int64_t columns, Work<T>& work) {
  using C = Acc<T>;
  const int64_t vectors = whole_vectors<C>(columns);
  const bool dropping = problem.dropout.threshold != 0;
  const C keep_scale = static_cast<C>(problem.dropout.scale);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    C* scores = work.scores + row * work.plan.width;
    C* gradients = work.gradients + row * work.plan.width;
    const uint8_t* keep = work.keep + row * work.plan.mask_stride;
    const C lse = static_cast<const C*>(problem.lse)[(b * problem.heads + h) * problem.queries + t];
    const C shift = lse == -kInfinity<C> ? C(0) : lse, delta = work.deltas[row];
    for (int64_t j = columns; j < vectors; ++j) gradients[j] = 0;
    for (int64_t j = 0; j < vectors; j += kLanes<C>) {
      const Vec<C> p = exp_vector<C>(load(scores + j) - shift);
      Vec<C> dropped = p, gradient = load(gradients + j);
      if (dropping) {
        dropped = select_kept<C>(p * keep_scale, keep, j);
        gradient = select_kept<C>(gradient * keep_scale, keep, j);
      }
      store(scores + j, dropped);
      store(gradients + j, p * (gradient - delta));
    }
  });
}

template <class T>
void backward_block(const PrefixAttentionBackward& problem, const Block& block, int64_t kv_head, bool first, bool last,
                    const Rows<T>* keys, Acc<T>* grad_prefix_key, Acc<T>* grad_prefix_value, Work<T>& work) {
  using C = Acc<T>;
  const int64_t dim = problem.dim, width = work.plan.width, segment = block.segment(), prefix = problem.prefix;
  const bool needs_tokens = problem.grad_q.data || problem.grad_k.data || problem.grad_v.data;
  const int64_t tokens = needs_tokens ? visible_keys(problem, block.query + block.queries - 1) : 0;
  const int64_t prefix_head = kv_head * prefix * dim;

  gather<T>(problem.q, block, dim, static_cast<C>(problem.scale), work.q);
  gather<T>(problem.grad_out, block, dim, C(1), work.grad_out);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    dot_rows<1>(work.deltas + row, work.grad_out + row * dim, row_of<T>(problem.out, b, h, t), 0, dim);
  });
  multiply_columns<T>(problem, block, work.q, static_cast<const C*>(problem.prefix_key_t) + prefix_head, problem.k,
                      kv_head, keys != nullptr, tokens, work.keys_t, work.keys, work.scores, width);
  multiply_columns<T>(problem, block, work.grad_out, static_cast<const C*>(problem.prefix_value_t) + prefix_head,
                      problem.v, kv_head, keys != nullptr, tokens, work.values_t, work.values, work.gradients, width);
  apply_mask<T>(problem, block, prefix + tokens, work.scores, width);
  draw_keep_masks<T>(problem, block, work);
  differentiate_rows<T>(problem, block, prefix + tokens, work);

  const auto add_to_prefix = [&](C* gradient, const C* weights, const C* rows) {
    if (!gradient) return;
    C* sum = gradient + prefix_head;
    rank_update<C>(sum, dim, sum, dim, prefix, dim, Left<C>{weights, 1, width}, rows, dim, block.rows());
  };
  add_to_prefix(grad_prefix_key, work.gradients, work.q);
  add_to_prefix(grad_prefix_value, work.scores, work.grad_out);
  if (problem.grad_q.data) {
    project<C>(work.product, dim, work.gradients, width, block.rows(),
               static_cast<const C*>(problem.prefix_key) + prefix_head, dim, dim, prefix, 1);
  }
  for (int64_t i = 0; needs_tokens && i < block.batch; ++i) {
    const int64_t b = block.begin + i, row = i * segment;
    const C *scores = work.scores + row * width + prefix, *gradients = work.gradients + row * width + prefix;
    if (problem.grad_v.data) {
      add_gradient<T>(problem, problem.grad_v, b, kv_head, tokens, scores, width, work.grad_out + row * dim, segment,
                      first, last, work.grad_values);
    }
    if (problem.grad_k.data) {
      add_gradient<T>(problem, problem.grad_k, b, kv_head, tokens, gradients, width, work.q + row * dim, segment, first,
                      last, work.grad_keys);
    }
    if (problem.grad_q.data) {
      const Rows<T> right =
          keys ? *keys : rows_of<T>(problem.k, b, kv_head, tokens, dim, segment >= kFewRows, work.keys);
      project<C>(work.product + row * dim, dim, gradients, width, segment, right.data, right.stride, dim, tokens, 1,
                 true);
    }
  }
  if (!problem.grad_q.data) return;
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    scale_row(row_of<T>(problem.grad_q, b, h, t), work.product + row * dim, dim, static_cast<C>(problem.scale));
  });
}

template <class T>
void backward(const PrefixAttentionBackward& problem, int64_t kv_head, int64_t begin, int64_t end,
              void* grad_prefix_key, void* grad_prefix_value, void* memory) {
  Work<T> work(problem, memory);
  Rows<T> keys{};
  const bool needs_tokens = problem.grad_q.data || problem.grad_k.data || problem.grad_v.data;
  for_blocks(problem, work.plan, kv_head, begin, end, [&](const Block& block, bool first, bool last) {
    const bool shared = needs_tokens && shares_keys(work.plan, block);
    if (shared && first) {
      const int64_t b = block.begin, count = problem.keys, dim = problem.dim;
      keys = rows_of<T>(problem.k, b, kv_head, count, dim, true, work.keys);
      pack_panels<T>(keys, count, dim, work.keys_t);
      pack_panels<T>(rows_of<T>(problem.v, b, kv_head, count, dim, false, work.values), count, dim, work.values_t);
    }
    backward_block<T>(problem, block, kv_head, first, last, shared ? &keys : nullptr,
                      static_cast<Acc<T>*>(grad_prefix_key), static_cast<Acc<T>*>(grad_prefix_value), work);
  });
}

template <class T>
constexpr PrefixAttentionKernels kernels() {
  return {forward<T>, backward<T>};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const PrefixAttentionKernels prefix_attention_kernels[kNumStorages];
const PrefixAttentionKernels prefix_attention_kernels[kNumStorages] = {kernels<float>(), kernels<double>(),
                                                                       kernels<BFloat16>(), kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
