// What the host hands to the LoRA kernels: raw pointers and sizes.
//
//   forward   y       = source + s drop(x) A^T B^T
//   backward  grad_A += s (grad_y B)^T drop(x),  grad_B^T += s (drop(x) A^T)^T grad_y,
//             grad_x += mask . s (grad_y B) A / (1 - p), or =
//
// Shapes    x, grad_x [rows, in_features]; y, grad_y [rows, out_features]. The output may hold several groups of
//           `width` columns from columns[g] on, each with its own A and B of `rank` rows and columns.
// Factors   lora_A [groups, rank, in_features] and lora_B [groups, width, rank] where they lie, and transposed by
//           the host: lora_A_t [in_features, groups * rank], lora_B_t [groups, rank, width]. `few_rows` does
//           without the transposed ones (few_rows.h), in one block, and gives grad_B instead of grad_B^T.
//           On AMX, tiles of these serve instead (tiles.h), named by the right operand that they are; those of B, B^T
//           and A are in as many pieces as there are groups.
// Layout    rows are contiguous, with a row stride; x, y and their gradients are of the storage type,
//           everything else of the accumulation type (float; double for float64 storage).
// Numbers   the rows of a call may lie scattered over the tensors, by `row_numbers`: a block that is not in one run is
//           gathered first, and y and grad_x are updated run by run. Dropout goes by the number.
// Work      a call serves the rows [begin, end), in blocks that stay in the second-level cache: x and
//           grad_y are read once from memory. The host splits the rows over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "tiles.h"

namespace peft_ext {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // round(65536 p): 0 keeps everything, 65536 nothing.
  double scale = 1.0;      // 65536 / (65536 - threshold), or 0.
};

// Below this, transposing the factors costs more than it brings (measured on one core with AVX-512).
constexpr int64_t kLoraFewRows = 8;

struct LoraProblem {
  bool widen;  // Whether the storage type is narrower than the accumulation type.
  bool few_rows;
  int64_t block;  // Rows that are worked on at a time.
  int64_t in_features;
  int64_t out_features;
  int64_t rank;
  int64_t groups;
  int64_t width;
  const int64_t* columns;
  const void* lora_A;
  const void* lora_A_t;
  const void* lora_B;
  const void* lora_B_t;
  int parts;  // Of the factors' values in tiles, which then are all that is needed of them; 0: no tiles.
  const void* lora_A_t_tiles;  // For the hidden product.
  double scaling;
  Dropout dropout;
  const void* x;
  int64_t x_stride;
  const int64_t* row_numbers;  // Which rows of the tensors the rows of a call are, ascending; null: the same.
};

struct LoraForward : LoraProblem {
  const void* lora_B_t_tiles;
  void* y;
  int64_t y_stride;
  const void* source;  // y itself, the bias (of stride 0), or null for zeros.
  int64_t source_stride;
};

struct LoraBackward : LoraProblem {
  const void* lora_A_tiles;
  const void* lora_B_tiles;
  const void* grad_y;
  int64_t grad_y_stride;
  void* grad_x;  // Null where it is not to be updated.
  int64_t grad_x_stride;
  bool starts_grad_x;  // It is written, not added to.
  bool needs_A;
  bool needs_B;
};

// target = source + left right: [rows, columns] += [rows, inner] [inner, columns].
struct LowRankSum {
  const void* source;
  int64_t source_stride;
  void* target;
  int64_t target_stride;
  int64_t columns;
  const void* left;
  int64_t left_row_stride;
  int64_t left_inner_stride;
  const void* right;  // Row stride is columns.
  int64_t inner;
};

// target [columns, rows] = source [rows, columns]^T.
struct Transpose {
  const void* source;
  int64_t rows;
  int64_t columns;  // Also the row stride of source.
  void* target;
  int64_t target_stride;
};

// target [count] of the accumulation type = source [count].
struct Widening {
  const void* source;
  int64_t count;
  void* target;
};

struct LoraKernels {
  void (*forward)(const LoraForward&, int64_t begin, int64_t end, void* workspace);
  // Writes grad_A [groups, rank, in_features] and grad_B [groups, width, rank] or its transpose.
  void (*backward)(const LoraBackward&, int64_t begin, int64_t end, void* grad_A, void* grad_B, void* workspace);
  void (*low_rank_sum)(const LowRankSum&, int64_t begin, int64_t end);
  void (*transpose)(const Transpose&);
  void (*widen)(const Widening&);
  // Of source^T, and of source; null where there is no AMX.
  void (*pack_tiles)(const TilePacking&);
  void (*pack_tile_lines)(const TilePacking&);
};

// Rows of a block: whole register tiles, at most what fits the second-level cache.
inline int64_t lora_block_rows(int64_t in_features, int64_t out_features) {
  constexpr int64_t kElements = 144 * 1024, kTile = 8;
  const int64_t fit = kElements / std::max<int64_t>(in_features + out_features, 1);
  return std::clamp<int64_t>(fit / kTile * kTile, kTile, 64);
}

// Accumulation-type elements of workspace that one call of forward or backward needs: blocks of x and grad_y where
// they cannot be read as they are, of the two hidden products, and of the mask. Forward is done with x after each
// register tile.
struct LoraWorkspace {
  static constexpr int64_t kProjectRows = 8, kProjectTerms = 256;

  LoraWorkspace(const LoraProblem& problem, bool backward) {
    const bool dropping = problem.dropout.threshold != 0;
    // A row's mask is one bit an element, rounded up to whole vectors of Philox blocks.
    constexpr int64_t kMaskRounding = 4;
    mask = dropping ? problem.block * (problem.in_features / 32 + kMaskRounding) : 0;
    hidden = problem.block * problem.groups * problem.rank;
    if (problem.parts) {
      // Values of bfloat16, two in a float.
      const int64_t rows = padded(problem.block, kTileInner), terms = problem.rank * TileTerms(problem.parts).count;
      const int64_t lines = outer_parts(problem.parts) * problem.rank;
      x = rows * padded(problem.in_features, kTileInner) / 2;
      if (backward) grad_y = rows * padded(problem.width, kTileInner) / 2;
      left = rows * std::max(padded(terms, kTileInner), backward ? padded(lines, kTileRows) : 0) / 2;
      products = rows * padded(problem.parts * problem.groups * problem.rank, kTileOuts);
      return;
    }
    const bool copying = problem.widen || problem.row_numbers;
    const int64_t row =
        backward || problem.few_rows ? problem.in_features : std::min(problem.in_features, kProjectTerms);
    const int64_t rows = backward ? problem.block : std::min(problem.block, kProjectRows);
    if (dropping || copying) x = rows * row;
    if (backward && copying) grad_y = problem.block * problem.out_features;
  }

  int64_t elements() const { return x + grad_y + left + products + 2 * hidden + mask; }

  int64_t hidden, mask;
  int64_t x = 0, grad_y = 0;
  int64_t left = 0, products = 0;  // Operands and results of tiles.
};

}  // namespace peft_ext
