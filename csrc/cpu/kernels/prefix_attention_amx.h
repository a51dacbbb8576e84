// The attention kernels of bfloat16 on AMX. Formulas, shapes and layout: prefix_attention.h; operands: amx.h.
//
// A block of queries is some heads of one batch entry. Rows of scores are [prefix; keys], both padded to whole tiles.
// p and ds are cut into parts, which the products take one after another along the inner dimension; dk and dv are
// summed as their transposes, for which p and ds are right operands as soon as two rows of them are known.
#pragma once

#include "amx.h"
#include "prefix_attention_rows.h"

#if defined(__AMX_BF16__)

namespace peft_ext {
namespace {

struct TileWork {
  TileWork(const PrefixAttention& problem, bool backward, void* memory) : plan(problem) {
    auto* next = static_cast<float*>(memory);
    const auto take = [&next](int64_t elements) {
      float* taken = next;
      next += elements;
      return taken;
    };
    const auto take_half = [&take](int64_t values) { return reinterpret_cast<BFloat16*>(take(values / 2)); };
    const int64_t rows = plan.rows, width = plan.width, dim = plan.dim;
    scores = take(rows * width);
    weights = take_half(2 * rows * width);
    q = take_half(rows * dim);
    product = take(rows * dim);
    of_prefix = take(rows * dim);
    shifts = take(rows);
    sums = take(rows);
    keep = reinterpret_cast<uint8_t*>(take(rows * plan.mask_stride / 4));
    copy = take_half(plan.keys * dim);
    keys_t = take_half(plan.keys * dim);
    values = take_half(plan.keys * dim);
    products = take(plan.products);
    if (!backward) return;
    gradients = take(rows * width);
    grad_out = take_half(rows * dim);
    rows_t = take_half(rows * dim);
    p_tiles = take_half(plan.depth * width);
    ds_tiles = take_half(plan.depth * width);
    keys = take_half(plan.keys * dim);
    grad_keys_t = take(dim * width);
    grad_values_t = take(dim * width);
    lines = take(kTileOuts * dim);
  }

  PrefixAttentionTiles plan;
  float* scores;
  BFloat16* weights;  // [2 rows, width]: the exponentials' or, backward, ds's first eight bits, then their next.
  BFloat16* q;
  float* product;    // [rows, dim]: weights [values or keys].
  float* of_prefix;  // [rows, dim]: one part of the weights times the prefix.
  float *shifts, *sums;
  uint8_t* keep;
  BFloat16* copy;
  BFloat16 *keys_t, *values;  // Right operands: of q k^T, and of weights v or, backward, grad_out v^T.
  float* products;
  float* gradients = nullptr;  // grad_out [Pv; v]^T.
  BFloat16* grad_out = nullptr;
  BFloat16* rows_t = nullptr;                              // [dim, rows]: left operand of dk^T and dv^T.
  BFloat16 *p_tiles = nullptr, *ds_tiles = nullptr;        // [parts rows, width]: their right operands.
  BFloat16* keys = nullptr;                                // Right operand of ds k.
  float *grad_keys_t = nullptr, *grad_values_t = nullptr;  // [dim, width].
  float* lines = nullptr;
};

inline void add_row(float* target, const float* source, int64_t count) {
  int64_t d = 0;
  for (; d + kLanes<float> <= count; d += kLanes<float>) store(target + d, load(target + d) + load(source + d));
  for (; d < count; ++d) target[d] += source[d];
}

// --- operands ---

inline PaddedRows padded_entry(const PrefixAttention& problem, const Strided<const void*>& tensor, int64_t b,
                               int64_t kv_head, const TileWork& work) {
  return padded_rows(work.copy, row_of<BFloat16>(tensor, b, kv_head, 0), tensor.row_stride, problem.keys, problem.dim);
}

// The right operand rows^T.
inline void pack_rows_t(BFloat16* target, const PaddedRows& rows, const PrefixAttentionTiles& plan) {
  for (int64_t j = 0; j < plan.keys; j += kTileOuts) {
    // Pairs of neighbours are words.
    for (int64_t i = 0; i < plan.dim; i += kTileInner) {
      alignas(64) float words[kTileOuts * kTileInner / 2];
      for (int64_t key = 0; key < kTileOuts; ++key) {
        std::memcpy(words + key * kTileInner / 2, rows.data + (j + key) * rows.stride + i,
                    kTileInner * sizeof(BFloat16));
      }
      transpose(words, kTileInner / 2, kTileOuts, kTileInner / 2,
                reinterpret_cast<float*>(target + j * plan.dim + i * kTileOuts), kTileOuts);
    }
  }
}

inline void gather_padded(const Strided<const void*>& source, const Block& block, const PrefixAttention& problem,
                          const PrefixAttentionTiles& plan, BFloat16* target) {
  clear(target, plan.rows * plan.dim);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    std::memcpy(target + row * plan.dim, row_of<BFloat16>(source, b, h, t), problem.dim * sizeof(BFloat16));
  });
}

// One key head's tiles of the prefix, [inner, outs] for each part.
inline const BFloat16* prefix_tiles(const PrefixAttention& problem, const void* tiles, int64_t kv_head, int64_t inner,
                                    int64_t outs) {
  return static_cast<const BFloat16*>(tiles) +
         kv_head * padded(problem.parts * outs, kTileOuts) * padded(inner, kTileInner);
}

// --- products ---

// out [rows, width] = left [rows, dim] [prefix; keys]^T.
inline void multiply_columns(const PrefixAttention& problem, const BFloat16* left, int64_t rows,
                             const BFloat16* prefix_tiles, const BFloat16* keys_t, int64_t seen, const TileWork& work,
                             float* out) {
  const PrefixAttentionTiles& plan = work.plan;
  project_by_tiles(out, plan.width, left, plan.dim, rows, prefix_tiles, problem.prefix, problem.parts, problem.dim, 1,
                   work.products);
  multiply_all(out + plan.prefix, plan.width, left, plan.dim, padded(rows, kTileRows), keys_t, plan.dim, seen,
               plan.dim);
}

// product = weights [prefix; keys], of both parts of the weights.
inline void multiply_weights(const PrefixAttention& problem, int64_t rows, const BFloat16* prefix_tiles,
                             const BFloat16* keys, int64_t seen, const TileWork& work) {
  const PrefixAttentionTiles& plan = work.plan;
  multiply_all(work.product, plan.dim, work.weights + plan.prefix, plan.width, padded(rows, kTileRows), keys, plan.keys,
               plan.dim, seen, {2, plan.rows * plan.width, 0});
  if (problem.prefix == 0) return;
  for (int64_t part = 0; part < 2; ++part) {
    project_by_tiles(work.of_prefix, plan.dim, work.weights + part * plan.rows * plan.width, plan.width, rows,
                     prefix_tiles, problem.dim, problem.parts, problem.prefix, 1, work.products);
    for (int64_t row = 0; row < rows; ++row) {
      add_row(work.product + row * plan.dim, work.of_prefix + row * plan.dim, problem.dim);
    }
  }
}

// --- rows ---

// What scores are still to be multiplied by once a row is masked: the scale, unless an added mask, which it does not
// apply to, or a negative one, by which the largest score does not stay it, has it applied before.
inline float scale_after_mask(const PrefixAttention& problem) {
  const auto scale = static_cast<float>(problem.scale);
  return scale <= 0 || (problem.mask.data && !problem.mask.is_bool) ? 1.0f : scale;
}

inline void mask_scores(const PrefixAttention& problem, const PrefixAttentionTiles& plan, int64_t b, int64_t h,
                        int64_t t, int64_t tokens, int64_t columns, float* line) {
  const auto scale = static_cast<float>(problem.scale);
  if (scale_after_mask(problem) != scale) scale_row(line, line, columns, scale);
  for (int64_t j = problem.prefix; j < plan.prefix; ++j) line[j] = -kInfinity<float>;
  mask_row(problem, b, h, t, plan.prefix, plan.prefix + tokens, columns, line);
}

// A row's dropout mask, which goes by columns without padding.
struct RowKeep {
  RowKeep(const PrefixAttention& problem, const TileWork& work, int64_t row)
      : bits(problem.dropout.threshold == 0 ? nullptr : work.keep + row * work.plan.mask_stride),
        prefix(work.plan.prefix),
        padding(work.plan.prefix - problem.prefix),
        scale(static_cast<float>(problem.dropout.scale)) {}

  Vec<float> drop(Vec<float> value, int64_t column) const {
    if (!bits) return value;
    const int64_t bit = column < prefix ? column : column - padding;
    const auto kept = static_cast<__mmask16>(load_unaligned<uint32_t>(bits + bit / 8) >> (bit % 8));
    return bit_cast<Vec<float>>(_mm512_maskz_mov_ps(kept, bit_cast<__m512>(value * scale)));
  }

  const uint8_t* bits;
  int64_t prefix, padding;
  float scale;
};

// --- forward ---

// As exponentiate, of `factor` times the scores, and dropped, in two parts; whole tiles of columns.
inline RowSum<float> exponentiate_parts(const float* line, int64_t columns, float factor, const RowKeep& keep,
                                        BFloat16* first, BFloat16* second) {
  const float maximum = row_maximum(line, columns);
  const float shift = maximum == -kInfinity<float> ? 0.0f : maximum;
  Vec<float> sums{}, more_sums{};
  for (int64_t j = 0; j < columns; j += kTileInner) {
    Vec<float> low = exp_vector<float>(factor * (load(line + j) - shift));
    Vec<float> high = exp_vector<float>(factor * (load(line + j + kLanes<float>) - shift));
    sums += low;
    more_sums += high;
    low = keep.drop(low, j);
    high = keep.drop(high, j + kLanes<float>);
    _mm512_storeu_si512(first + j, first_parts(low, high));
    _mm512_storeu_si512(second + j, first_parts(without_first_part(low), without_first_part(high)));
  }
  return {sum_lanes<float>(sums + more_sums), factor * maximum};
}

inline void forward_block(const PrefixAttentionForward& problem, const Block& block, int64_t kv_head,
                          const TileWork& work) {
  const PrefixAttentionTiles& plan = work.plan;
  const int64_t tokens = visible_keys(problem, block.query + block.queries - 1), seen = padded(tokens, kTileInner);
  const int64_t columns = plan.prefix + seen;
  gather_padded(problem.q, block, problem, plan, work.q);
  multiply_columns(problem, work.q, block.rows(),
                   prefix_tiles(problem, problem.prefix_key_t_tiles, kv_head, problem.dim, problem.prefix), work.keys_t,
                   seen, work, work.scores);
  draw_keep_masks(problem, block, work);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    float* line = work.scores + row * plan.width;
    BFloat16* weights = work.weights + row * plan.width;
    mask_scores(problem, plan, b, h, t, tokens, columns, line);
    const RowSum<float> found =
        exponentiate_parts(line, columns, scale_after_mask(problem), RowKeep(problem, work, row), weights,
                           weights + plan.rows * plan.width);
    work.sums[row] = found.sum;
    static_cast<float*>(problem.lse)[(b * problem.heads + h) * problem.queries + t] =
        found.maximum + static_cast<float>(__builtin_log(found.sum));
  });
  multiply_weights(problem, block.rows(),
                   prefix_tiles(problem, problem.prefix_value_tiles, kv_head, problem.prefix, problem.dim), work.values,
                   seen, work);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    const float sum = work.sums[row], factor = sum == 0 ? 0.0f : 1 / sum;
    scale_row(row_of<BFloat16>(problem.out, b, h, t), work.product + row * plan.dim, problem.dim, factor);
  });
}

inline void forward_by_tiles(const PrefixAttentionForward& problem, int64_t kv_head, int64_t begin, int64_t end,
                             void* memory) {
  const TileWork work(problem, false, memory);
  for_blocks(problem, work.plan, kv_head, begin, end, [&](const Block& block, bool first, bool) {
    if (first) {
      pack_rows_t(work.keys_t, padded_entry(problem, problem.k, block.begin, kv_head, work), work.plan);
      pack_right_rows(work.values, padded_entry(problem, problem.v, block.begin, kv_head, work), work.plan.keys,
                      work.plan.dim);
    }
    forward_block(problem, block, kv_head, work);
  });
}

// --- backward ---

struct Derivatives {
  Vec<float> p, ds;  // p as dropped.
};

// p and ds of the block, from its scores and grad_out [Pv; v]^T: ds in two parts as left operand of dq, both in `parts`
// as right operands; rows up to a whole tile are 0.
inline void differentiate(const PrefixAttention& problem, int64_t rows, int64_t columns, const TileWork& work) {
  const PrefixAttentionTiles& plan = work.plan;
  const float factor = scale_after_mask(problem);
  const int64_t tile_rows = padded(rows, kTileInner), depth = plan.parts * tile_rows;
  for (int64_t t = 0; t < tile_rows; t += 2) {
    const RowKeep keep[2] = {{problem, work, t}, {problem, work, t + 1}};
    const auto derivatives = [&](int64_t i, int64_t j) -> Derivatives {
      if (t + i >= rows) return {Vec<float>{}, Vec<float>{}};
      const int64_t at = (t + i) * plan.width + j;
      Vec<float> score = factor * load(work.scores + at);
      asm("" : "+v"(score));  // Rounded as the row's maximum was: fused with the subtraction, large ones would differ.
      const Vec<float> p = exp_vector<float>(score - work.shifts[t + i]);
      return {keep[i].drop(p, j), p * (keep[i].drop(load(work.gradients + at), j) - work.sums[t + i])};
    };
    for (int64_t j = 0; j < columns; j += kTileInner) {
      constexpr int64_t kHalf = kLanes<float>;
      Derivatives values[2][2] = {{derivatives(0, j), derivatives(0, j + kHalf)},
                                  {derivatives(1, j), derivatives(1, j + kHalf)}};
      const int64_t parts = j < plan.prefix ? plan.parts : 2;
      for (int64_t part = 0; part < parts; ++part) {
        for (int half = 0; half < 2; ++half) {
          const int64_t at = (j + half * kTileOuts) * depth + (part * tile_rows + t) * kTileOuts;
          store(reinterpret_cast<float*>(work.p_tiles + at), first_part_pairs(values[0][half].p, values[1][half].p));
          store(reinterpret_cast<float*>(work.ds_tiles + at), first_part_pairs(values[0][half].ds, values[1][half].ds));
        }
        for (int i = 0; i < 2; ++i) {
          if (part < 2) {
            _mm512_storeu_si512(work.weights + (part * plan.rows + t + i) * plan.width + j,
                                first_parts(values[i][0].ds, values[i][1].ds));
          }
          for (Derivatives& value : values[i]) value = {without_first_part(value.p), without_first_part(value.ds)};
        }
      }
    }
  }
}

// total_t [dim, width] += rows^T right, the columns of the prefix in all parts, those of the keys in two.
inline void add_products(float* total_t, const BFloat16* rows, const BFloat16* right, int64_t tile_rows, bool of_prefix,
                         int64_t seen, const TileWork& work) {
  const PrefixAttentionTiles& plan = work.plan;
  const int64_t depth = plan.parts * tile_rows, prefix = of_prefix ? plan.prefix : 0, step = tile_rows * kTileOuts;
  pack_left_columns(work.rows_t, {rows, plan.dim}, tile_rows, plan.dim);
  multiply_all<true>(total_t, plan.width, work.rows_t, tile_rows, plan.dim, right, depth, prefix, tile_rows,
                     {plan.parts, 0, step});
  multiply_all<true>(total_t + plan.prefix, plan.width, work.rows_t, tile_rows, plan.dim, right + plan.prefix * depth,
                     depth, seen, tile_rows, {2, 0, step});
}

inline void backward_block(const PrefixAttentionBackward& problem, const Block& block, int64_t kv_head,
                           bool of_prefix_key, bool of_prefix_value, const TileWork& work) {
  const PrefixAttentionTiles& plan = work.plan;
  const int64_t dim = problem.dim, prefix = problem.prefix, rows = block.rows(), tile_rows = padded(rows, kTileInner);
  const int64_t tokens = problem.needs_tokens() ? visible_keys(problem, block.query + block.queries - 1) : 0;
  const int64_t seen = padded(tokens, kTileInner), columns = plan.prefix + seen;
  gather_padded(problem.q, block, problem, plan, work.q);
  gather_padded(problem.grad_out, block, problem, plan, work.grad_out);
  multiply_columns(problem, work.q, rows, prefix_tiles(problem, problem.prefix_key_t_tiles, kv_head, dim, prefix),
                   work.keys_t, seen, work, work.scores);
  multiply_columns(problem, work.grad_out, rows,
                   prefix_tiles(problem, problem.prefix_value_t_tiles, kv_head, dim, prefix), work.values, seen, work,
                   work.gradients);
  draw_keep_masks(problem, block, work);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    const float lse = static_cast<const float*>(problem.lse)[(b * problem.heads + h) * problem.queries + t];
    work.shifts[row] = lse == -kInfinity<float> ? 0 : lse;
    dot_rows<1>(work.sums + row, work.grad_out + row * plan.dim, row_of<BFloat16>(problem.out, b, h, t), 0, dim);
    mask_scores(problem, plan, b, h, t, tokens, columns, work.scores + row * plan.width);
    for (int64_t j = prefix; j < plan.prefix; ++j) work.gradients[row * plan.width + j] = 0;
  });
  differentiate(problem, rows, columns, work);
  if (of_prefix_key || problem.grad_k.data) {
    add_products(work.grad_keys_t, work.q, work.ds_tiles, tile_rows, of_prefix_key, problem.grad_k.data ? seen : 0,
                 work);
  }
  if (of_prefix_value || problem.grad_v.data) {
    add_products(work.grad_values_t, work.grad_out, work.p_tiles, tile_rows, of_prefix_value,
                 problem.grad_v.data ? seen : 0, work);
  }
  if (!problem.grad_q.data) return;
  multiply_weights(problem, rows, prefix_tiles(problem, problem.prefix_key_tiles, kv_head, prefix, dim), work.keys,
                   seen, work);
  block.for_rows([&](int64_t row, int64_t b, int64_t h, int64_t t) {
    scale_row(row_of<BFloat16>(problem.grad_q, b, h, t), work.product + row * plan.dim, dim,
              static_cast<float>(problem.scale));
  });
}

// `count` columns of dk^T and dv^T.
inline void clear_sums(const TileWork& work, int64_t first, int64_t count) {
  for (int64_t d = 0; d < work.plan.dim; ++d) {
    const int64_t at = d * work.plan.width + first;
    std::memset(work.grad_keys_t + at, 0, count * sizeof(float));
    std::memset(work.grad_values_t + at, 0, count * sizeof(float));
  }
}

// The operands of one batch entry, and sums for its keys.
inline void begin_entry(const PrefixAttentionBackward& problem, int64_t b, int64_t kv_head, const TileWork& work) {
  const PrefixAttentionTiles& plan = work.plan;
  if (!problem.needs_tokens()) return;
  const PaddedRows k = padded_entry(problem, problem.k, b, kv_head, work);
  pack_rows_t(work.keys_t, k, plan);
  pack_right_rows(work.keys, k, plan.keys, plan.dim);
  pack_rows_t(work.values, padded_entry(problem, problem.v, b, kv_head, work), plan);
  clear_sums(work, plan.prefix, plan.keys);
}

inline void store_gradient(const PrefixAttention& problem, const Strided<void*>& gradient, int64_t b, int64_t kv_head,
                           const float* total_t, float scale, const TileWork& work) {
  if (!gradient.data) return;
  for (int64_t j = 0; j < problem.keys; j += kTileOuts) {
    const int64_t count = std::min(problem.keys - j, kTileOuts);
    transpose(total_t + work.plan.prefix + j, work.plan.width, problem.dim, count, work.lines, problem.dim);
    for (int64_t i = 0; i < count; ++i) {
      scale_row(row_of<BFloat16>(gradient, b, kv_head, j + i), work.lines + i * problem.dim, problem.dim, scale);
    }
  }
}

inline void store_prefix_gradient(const PrefixAttention& problem, void* gradient, int64_t kv_head, const float* total_t,
                                  float scale, const TileWork& work) {
  if (!gradient) return;
  const int64_t elements = problem.prefix * problem.dim;
  float* target = static_cast<float*>(gradient) + kv_head * elements;
  transpose(total_t, work.plan.width, problem.dim, problem.prefix, target, problem.dim);
  scale_row(target, target, elements, scale);
}

inline void backward_by_tiles(const PrefixAttentionBackward& problem, int64_t kv_head, int64_t begin, int64_t end,
                              void* grad_prefix_key, void* grad_prefix_value, void* memory) {
  const TileWork work(problem, true, memory);
  const auto scale = static_cast<float>(problem.scale);
  clear_sums(work, 0, work.plan.prefix);
  for_blocks(problem, work.plan, kv_head, begin, end, [&](const Block& block, bool first, bool last) {
    if (first) begin_entry(problem, block.begin, kv_head, work);
    backward_block(problem, block, kv_head, grad_prefix_key != nullptr, grad_prefix_value != nullptr, work);
    if (!last) return;
    store_gradient(problem, problem.grad_k, block.begin, kv_head, work.grad_keys_t, scale, work);
    store_gradient(problem, problem.grad_v, block.begin, kv_head, work.grad_values_t, 1, work);
  });
  store_prefix_gradient(problem, grad_prefix_key, kv_head, work.grad_keys_t, scale, work);
  store_prefix_gradient(problem, grad_prefix_value, kv_head, work.grad_values_t, 1, work);
}

}  // namespace
}  // namespace peft_ext

#endif
