// The attention kernels for one instruction set. Formulas, shapes and layout: prefix_attention.h.
#include "prefix_attention.h"

#include "prefix_attention_amx.h"
#include "prefix_attention_rows.h"
#include "skinny.h"
#include "transpose.h"
#include "vec.h"

namespace peft_ext {
namespace {

constexpr int64_t kFewRows = PrefixAttentionPlan::kFewRows;

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

template <class T>
void apply_mask(const PrefixAttention& problem, const Block& block, int64_t columns, Acc<T>* scores, int64_t width) {
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    mask_row(problem, b, h, t, problem.prefix, columns, width, scores + row * width);
  });
}

template <class C>
inline int64_t whole_vectors(int64_t columns) {
  return (columns + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// A row's exponentials in place of its scores (whole vectors of columns); returns their sum and the maximum.
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
  draw_keep_masks(problem, block, work);
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

template <class T>
void forward(const PrefixAttentionForward& problem, int64_t kv_head, int64_t begin, int64_t end, void* memory) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (problem.parts) return with_tiles([&] { forward_by_tiles(problem, kv_head, begin, end, memory); });
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
  const bool needs_tokens = problem.needs_tokens();
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
  draw_keep_masks(problem, block, work);
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
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (problem.parts) {
      return with_tiles(
          [&] { backward_by_tiles(problem, kv_head, begin, end, grad_prefix_key, grad_prefix_value, memory); });
    }
  }
#endif
  Work<T> work(problem, memory);
  Rows<T> keys{};
  const bool needs_tokens = problem.needs_tokens();
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
