// What the host hands to the attention kernels: raw pointers and sizes.
//
//   forward   out = drop(softmax(scale q [Pk; k]^T + mask)) [Pv; v]
//   backward  with p the softmax, m its dropout mask / (1 - p_drop), delta = sum over d of grad_out out:
//             dv = (p m)^T grad_out, ds = p (m (grad_out v^T) - delta), dq = scale ds k, dk = scale ds^T q
//
// Shapes    q, out [batch, heads, queries, dim]; k, v [batch, kv_heads, keys, dim]; prefix [kv_heads, prefix, dim];
//           query head h reads key head h / (heads / kv_heads). Columns of the scores: the prefix, then the keys.
// Layout    dim is contiguous, everything else strided. q, k, v, out and their gradients are of the storage type,
//           everything else of the accumulation type (float; double for float64 storage).
// Causal    query t sees keys up to t + keys - queries (the last query sees all), and always the whole prefix.
//           A query that sees nothing gives 0.
// Work      a task is one key head of some batch entries. Its scores are formed for a block of queries at a time,
//           over all columns, which fits the second-level cache. Few queries (decoding): a block holds several batch
//           entries, which share the products with the prefix. The host splits the tasks over threads; what a task
//           computes depends on sizes only.
// AMX       bfloat16 where a head has enough queries: q, k, v and grad_out are bfloat16 already, the prefix is taken to
//           all it has, p and ds to 16 bits and, for the gradients of a float prefix, to 24 (amx.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "lora_linear.h"
#include "tiles.h"

namespace peft_ext {

// [batch, heads, length, dim] with dim contiguous.
template <class Pointer>
struct Strided {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// [batch, heads, queries, keys] with keys contiguous; strides are 0 where it is broadcast.
struct AttentionMask {
  const void* data = nullptr;
  bool is_bool = false;  // Else of the accumulation type, added to the scores.
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

struct PrefixAttention {
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t queries;
  int64_t keys;
  int64_t prefix;
  int64_t dim;
  double scale;
  bool causal;
  bool widen;  // Whether the storage type is narrower than the accumulation type.
  Dropout dropout;
  AttentionMask mask;
  Strided<const void*> q, k, v;
  // [kv_heads, prefix, dim] contiguous, and [kv_heads, dim, prefix]: forward wants the transposed keys and the values
  // as they are, backward all four.
  const void* prefix_key;
  const void* prefix_value;
  const void* prefix_key_t;
  const void* prefix_value_t;
  // On AMX the same as right operands in tiles, of values in so many parts; 0: no tiles. Backward wants no
  // prefix_value_tiles.
  int parts;
  const void* prefix_key_tiles;
  const void* prefix_value_tiles;
  const void* prefix_key_t_tiles;
  const void* prefix_value_t_tiles;
};

struct PrefixAttentionForward : PrefixAttention {
  Strided<void*> out;
  void* lse;  // [batch, heads, queries]: log of the sum of the exponentials.
};

struct PrefixAttentionBackward : PrefixAttention {
  Strided<const void*> out, grad_out;
  const void* lse;
  Strided<void*> grad_q, grad_k, grad_v;  // Null where they are not needed.

  bool needs_tokens() const { return grad_q.data || grad_k.data || grad_v.data; }
};

struct PrefixAttentionKernels {
  // Both serve key head `kv_head` of the batch entries [begin, end).
  void (*forward)(const PrefixAttentionForward&, int64_t kv_head, int64_t begin, int64_t end, void* workspace);
  // Adds to grad_prefix_key and _value [kv_heads, prefix, dim], which begin at 0; null where they are not needed.
  void (*backward)(const PrefixAttentionBackward&, int64_t kv_head, int64_t begin, int64_t end, void* grad_prefix_key,
                   void* grad_prefix_value, void* workspace);
};

// How queries are gathered into blocks, and the elements of workspace that a task needs.
struct PrefixAttentionPlan {
  static constexpr int64_t kLane = 16;     // At least a vector of any instruction set.
  static constexpr int64_t kTileRows = 8;  // Of the register tile.
  // Columns of a panel: one of transposed keys stays in the first-level cache while all rows of a block meet it.
  static constexpr int64_t kPanel = 64;
  static constexpr int64_t kFewRows = 4;  // Below, packing a batch entry's keys costs more than it brings.

  explicit PrefixAttentionPlan(const PrefixAttention& problem) {
    constexpr int64_t kScores = 64 * 1024, kMaxRows = 64;
    const int64_t columns = problem.prefix + problem.keys;
    width = (columns + kLane - 1) / kLane * kLane;
    tokens = (problem.keys + kPanel - 1) / kPanel * kPanel;
    const int64_t fit = kScores / std::max<int64_t>(width, 1) / kTileRows * kTileRows;
    const int64_t most = std::clamp<int64_t>(fit, kTileRows, kMaxRows);
    const int64_t segment = std::max<int64_t>(problem.heads / problem.kv_heads * problem.queries, 1);
    heads = segment <= most ? problem.heads / problem.kv_heads : 1;
    queries = std::min(problem.queries, most);
    batch = std::min(problem.batch, segment <= most ? most / segment : 1);
    rows = batch * heads * queries;
    copies = problem.widen || heads * queries >= kFewRows;
    mask_stride = problem.dropout.threshold == 0 ? 0 : (columns + 511) / 512 * 64;
  }

  int64_t elements(const PrefixAttention& problem) const {
    const int64_t scores = 2 * rows * width, gathered = 4 * rows * problem.dim, statistics = 2 * rows;
    return scores + gathered + statistics + rows * mask_stride / 4 + (copies ? 6 : 2) * tokens * problem.dim;
  }

  // A block: so many batch entries, heads and queries at most.
  int64_t batch, heads, queries, rows;
  int64_t width;        // Row stride of the scores.
  int64_t tokens;       // Keys in whole panels.
  bool copies;          // Keys, values and their gradients are worked on as dense copies.
  int64_t mask_stride;  // Bytes of a row's dropout mask.
};

// As the plan, where the products run on AMX. The keys' columns begin at a whole tile.
struct PrefixAttentionTiles {
  static constexpr int64_t kMostRows = 64;

  explicit PrefixAttentionTiles(const PrefixAttention& problem)
      : dim(padded(problem.dim, kTileInner)),
        prefix(padded(problem.prefix, kTileInner)),
        keys(padded(problem.keys, kTileInner)),
        width(prefix + keys),
        parts(outer_parts(problem.parts)) {
    constexpr int64_t kScores = 128 * 1024;
    const int64_t most =
        std::clamp(kScores / std::max<int64_t>(width, 1) / kTileInner * kTileInner, kTileInner, kMostRows);
    const int64_t group = problem.heads / problem.kv_heads;
    heads = group;
    while (heads > 1 && (heads * problem.queries > most || group % heads != 0)) --heads;
    queries = std::min(problem.queries, most);
    rows = padded(heads * queries, kTileInner);
    depth = parts * rows;
    products = rows * padded(problem.parts * std::max(problem.prefix, problem.dim), kTileOuts);
    mask_stride = problem.dropout.threshold == 0 ? 0 : (problem.prefix + problem.keys + 511) / 512 * 64;
  }

  // Values of bfloat16 are two in a float.
  int64_t forward_elements() const {
    return rows * (2 * width + dim / 2 + 2 * dim + 2 + mask_stride / 4) + 3 * keys * dim / 2 + products;
  }
  int64_t backward_elements() const {
    const int64_t of_rows = rows * (width + dim) + depth * width;
    return forward_elements() + of_rows + keys * dim / 2 + 2 * dim * width + kTileOuts * dim;
  }

  int64_t dim, prefix, keys, width;
  int64_t parts;                      // Of p and ds in the sums of the prefix.
  int64_t batch = 1, heads, queries;  // As in PrefixAttentionPlan.
  int64_t rows;                       // Of a block, in whole tiles.
  int64_t depth;                      // Of its rows in parts.
  int64_t products;
  int64_t mask_stride;  // Bytes of a row's dropout mask.
};

}  // namespace peft_ext
