// The LoRA kernels for one instruction set. Formulas, shapes and layout: lora_linear.h.
#include "lora_linear.h"

#include "amx.h"
#include "dropout.h"
#include "few_rows.h"
#include "skinny.h"
#include "transpose.h"
#include "vec.h"

namespace peft_ext {
namespace {

template <class T>
constexpr bool kIsAcc = sizeof(T) == sizeof(Acc<T>);

// `count` elements from `column` on of a row of the storage type as the accumulation type, dropped by `mask` if there
// is one.
template <class T>
void widen_row(Acc<T>* target, const T* source, int64_t column, int64_t count, const uint8_t* mask, Acc<T> scale) {
  using C = Acc<T>;
  source += column;
  int64_t k = 0;
#pragma GCC unroll 4
  for (; k + kLanes<C> <= count; k += kLanes<C>) {
    const Vec<C> value = load(source + k);
    store(target + k, mask ? select_kept<C>(value * scale, mask, column + k) : value);
  }
  for (; k < count; ++k) {
    const C value = to_acc(source[k]);
    target[k] = !mask ? value : kept(mask, column + k) ? value * scale : C(0);
  }
}

template <class C>
struct Rows {
  const C* data;
  int64_t stride;
};

// The rows of a block in x and y.
struct Block {
  int64_t operator[](int64_t i) const { return numbers ? numbers[i] : first + i; }

  int64_t first;
  const int64_t* numbers;  // Null where they are consecutive.
  int64_t rows;
};

Block block_at(const LoraProblem& problem, int64_t begin, int64_t rows) {
  if (!problem.row_numbers) return {begin, nullptr, rows};
  const int64_t* numbers = problem.row_numbers + begin;
  const bool consecutive = numbers[rows - 1] - numbers[0] == rows - 1;
  return {numbers[0], consecutive ? nullptr : numbers, rows};
}

// Calls visit(number of the first row, its place in the block, rows) for each run of consecutive rows.
template <class Visit>
void for_each_run(const Block& block, const Visit& visit) {
  if (!block.numbers) return visit(block.first, 0, block.rows);
  for (int64_t begin = 0, end; begin < block.rows; begin = end) {
    end = begin + 1;
    while (end < block.rows && block.numbers[end] == block.numbers[end - 1] + 1) ++end;
    visit(block.numbers[begin], begin, end - begin);
  }
}

// A call's scratch memory: blocks of rows of x, grad_y, the two hidden products and the mask.
template <class T>
struct Workspace {
  using C = Acc<T>;
  Workspace(const LoraProblem& problem, bool backward, void* memory)
      : block(problem.block), ranks(problem.groups * problem.rank), mask_stride(mask_bytes(problem.in_features)) {
    const LoraWorkspace sizes(problem, backward);
    x = static_cast<C*>(memory);
    grad_y = x + sizes.x;
    left = grad_y + sizes.grad_y;
    products = left + sizes.left;
    hidden = products + sizes.products;
    grad_hidden = hidden + sizes.hidden;
    mask = reinterpret_cast<uint8_t*>(grad_hidden + sizes.hidden);
  }

  int64_t block;
  int64_t ranks;  // Row stride of the hidden products.
  int64_t mask_stride;
  C* x;
  C* grad_y;
  C* left;
  C* products;
  C* hidden;
  C* grad_hidden;
  uint8_t* mask;
};

template <class T>
void draw_mask(const LoraProblem& problem, const Workspace<T>& work, const Block& block, int64_t i) {
  row_mask(work.mask + i * work.mask_stride, block[i], 0, problem.in_features, problem.dropout);
}

template <class T>
void draw_masks(const LoraProblem& problem, const Workspace<T>& work, const Block& block) {
  if (problem.dropout.threshold == 0) return;
  for (int64_t i = 0; i < block.rows; ++i) draw_mask(problem, work, block, i);
}

// The block's mask, or none.
template <class T>
Mask<Acc<T>> mask_of(const LoraProblem& problem, const Workspace<T>& work) {
  if (problem.dropout.threshold == 0) return {};
  return {work.mask, work.mask_stride, static_cast<Acc<T>>(problem.dropout.scale)};
}

// A block's rows of x or grad_y as the products take them: of the accumulation type, and dropped if there is a mask,
// which is drawn on the way. They are read where they are, or copied first; a product copies each tile just before it
// reads it, so that memory answers while the tile before is drawn and multiplied.
template <class T>
struct Operand {
  using C = Acc<T>;

  bool is_copied() const { return !kIsAcc<T> || mask || block.numbers; }

  // What a product that is given all at once takes, once copy_all() has run.
  Rows<C> rows() const {
    if constexpr (kIsAcc<T>) {
      if (!is_copied()) return {source + block.first * source_stride, source_stride};
    }
    return {copy, columns};
  }

  void copy_rows(C* target, int64_t target_stride, int64_t row, int64_t rows, int64_t column, int64_t count) const {
    for (int64_t i = 0; i < rows; ++i) {
      uint8_t* bits = mask ? mask + (row + i) * mask_bytes(columns) : nullptr;
      if (bits) row_mask(bits, block[row + i], column, column + count, dropout);
      widen_row<T>(target + i * target_stride, source + block[row + i] * source_stride, column, count, bits,
                   static_cast<C>(dropout.scale));
    }
  }

  void copy_all() const {
    if (is_copied()) copy_rows(copy, columns, 0, block.rows, 0, columns);
  }

  // out = scale (columns [first, first + inner) of this) right [inner, outs]. With `keeps`, those columns of rows() are
  // there afterwards; else the tiles pass through one place, in the first-level cache.
  void project(C* out, int64_t out_stride, int64_t first, int64_t inner, const C* right, int64_t outs, C scale,
               bool keeps) const {
    if (!is_copied()) {
      const Rows<C> left = rows();
      return peft_ext::project<C>(out, out_stride, left.data + first, left.stride, block.rows, right, outs, outs, inner,
                                  scale);
    }
    static_assert(kProjectRows == LoraWorkspace::kProjectRows && kProjectTerms == LoraWorkspace::kProjectTerms);
    const int64_t stride = keeps ? columns : std::min(columns, kProjectTerms);
    const auto tile = [&](int64_t row, int64_t height, int64_t column, int64_t count) {
      C* target = keeps ? copy + row * stride + first + column : copy;
      copy_rows(target, stride, row, height, first + column, count);
      const T* next = block.numbers ? nullptr : source + block[row + height] * source_stride + first + column;
      return LeftTile<C, T>{target, stride, next, source_stride};
    };
    project_tiles<C>(out, out_stride, tile, block.rows, right, outs, outs, inner, scale);
  }

  const T* source;
  int64_t source_stride;
  int64_t columns;
  const Block& block;
  C* copy;
  uint8_t* mask = nullptr;  // With dropout.
  Dropout dropout = {};
};

template <class T>
Operand<T> dropped_input(const LoraProblem& problem, const Workspace<T>& work, const Block& block) {
  uint8_t* mask = problem.dropout.threshold == 0 ? nullptr : work.mask;
  return {
      static_cast<const T*>(problem.x), problem.x_stride, problem.in_features, block, work.x, mask, problem.dropout};
}

template <class T>
Operand<T> widened_grad(const LoraBackward& problem, const Workspace<T>& work, const Block& block) {
  return {static_cast<const T*>(problem.grad_y), problem.grad_y_stride, problem.out_features, block, work.grad_y};
}

// hidden = s drop(x) A^T. With `keeps_x`, drop(x) is there afterwards.
template <class T>
void project_input(const LoraProblem& problem, Workspace<T>& work, const Operand<T>& x, bool keeps_x) {
  using C = Acc<T>;
  const C scaling = static_cast<C>(problem.scaling);
  if (problem.few_rows) {
    x.copy_all();
    dots<C>(work.hidden, work.ranks, x.rows().data, x.rows().stride, x.block.rows,
            static_cast<const C*>(problem.lora_A), work.ranks, problem.in_features, scaling);
  } else {
    x.project(work.hidden, work.ranks, 0, problem.in_features, static_cast<const C*>(problem.lora_A_t), work.ranks,
              scaling, keeps_x);
  }
}

// grad_hidden = s grad_y B, group by group; the groups' columns of grad_y are there afterwards.
template <class T>
void project_grad(const LoraBackward& problem, Workspace<T>& work, const Operand<T>& grad_y) {
  using C = Acc<T>;
  const C* lora_B = static_cast<const C*>(problem.lora_B);
  for (int64_t g = 0; g < problem.groups; ++g) {
    grad_y.project(work.grad_hidden + g * problem.rank, work.ranks, problem.columns[g], problem.width,
                   lora_B + g * problem.width * problem.rank, problem.rank, static_cast<C>(problem.scaling), true);
  }
}

template <class T>
void forward_block(const LoraForward& problem, Workspace<T>& work, const Block& block) {
  using C = Acc<T>;
  const int64_t rank = problem.rank, width = problem.width;
  project_input<T>(problem, work, dropped_input(problem, work, block), false);
  for_each_run(block, [&](int64_t first, int64_t place, int64_t rows) {
    for (int64_t g = 0; g < problem.groups; ++g) {
      const int64_t column = problem.columns[g];
      T* y = static_cast<T*>(problem.y) + first * problem.y_stride + column;
      const C* hidden = work.hidden + place * work.ranks + g * rank;
      if (problem.few_rows) {
        const C* lora_B = static_cast<const C*>(problem.lora_B) + g * width * rank;
        narrow_update<T>(y, problem.y_stride, rows, width, hidden, work.ranks, lora_B, rank);
      } else {
        const C* lora_B_t = static_cast<const C*>(problem.lora_B_t) + g * rank * width;
        const T* source = static_cast<const T*>(problem.source);
        if (source) source += first * problem.source_stride + column;
        rank_update<T>(source, problem.source_stride, y, problem.y_stride, rows, width, Left<C>{hidden, work.ranks, 1},
                       lora_B_t, width, rank);
      }
    }
  });
}

// total [rank, columns] (+)= hidden^T [rank, rows] values [rows, columns].
template <class C>
void add_outer(C* total, bool first, int64_t columns, const C* hidden, int64_t hidden_stride, Rows<C> values,
               int64_t rows, int64_t rank) {
  rank_update<C>(first ? nullptr : total, columns, total, columns, rank, columns, Left<C>{hidden, 1, hidden_stride},
                 values.data, values.stride, rows);
}

// grad_x += mask . grad_hidden A / (1 - p), of group g; or =.
template <class T>
void add_to_grad_x(const LoraBackward& problem, const Workspace<T>& work, const Block& block, int64_t g) {
  using C = Acc<T>;
  const int64_t in_features = problem.in_features, rank = problem.rank;
  const C* lora_A = static_cast<const C*>(problem.lora_A) + g * rank * in_features;
  for_each_run(block, [&](int64_t first, int64_t place, int64_t rows) {
    T* grad_x = static_cast<T*>(problem.grad_x) + first * problem.grad_x_stride;
    const C* grad_hidden = work.grad_hidden + place * work.ranks + g * rank;
    Mask<C> mask = mask_of(problem, work);
    if (mask.bits) mask.bits += place * mask.stride;
    const T* source = problem.starts_grad_x && g == 0 ? nullptr : grad_x;
    rank_update<T>(source, problem.grad_x_stride, grad_x, problem.grad_x_stride, rows, in_features,
                   Left<C>{grad_hidden, work.ranks, 1}, lora_A, in_features, rank, mask);
  });
}

// `first`: the gradients of the factors are written, not added to.
template <class T>
void backward_block(const LoraBackward& problem, Workspace<T>& work, const Block& block, bool first, Acc<T>* grad_A,
                    Acc<T>* grad_B) {
  using C = Acc<T>;
  const int64_t in_features = problem.in_features, rank = problem.rank, width = problem.width, rows = block.rows;
  const Operand<T> x_operand = dropped_input(problem, work, block), grad_operand = widened_grad(problem, work, block);
  if (problem.needs_A || problem.grad_x) {
    project_grad<T>(problem, work, grad_operand);
  } else {
    grad_operand.copy_all();
  }
  if (problem.needs_B) {
    project_input<T>(problem, work, x_operand, true);
  } else if (problem.needs_A) {
    x_operand.copy_all();
  } else {
    draw_masks(problem, work, block);  // For grad_x.
  }
  const Rows<C> x = x_operand.rows(), grad_y = grad_operand.rows();
  for (int64_t g = 0; g < problem.groups; ++g) {
    const C* hidden = work.hidden + g * rank;
    if (problem.needs_A) {
      const C* grad_hidden = work.grad_hidden + g * rank;
      add_outer<C>(grad_A + g * rank * in_features, first, in_features, grad_hidden, work.ranks, x, rows, rank);
    }
    if (problem.needs_B) {
      C* group_grad = grad_B + g * rank * width;
      const Rows<C> columns{grad_y.data + problem.columns[g], grad_y.stride};
      if (problem.few_rows) {
        narrow_outer<C>(group_grad, hidden, work.ranks, rank, columns.data, columns.stride, rows, width);
      } else {
        add_outer<C>(group_grad, first, width, hidden, work.ranks, columns, rows, rank);
      }
    }
    if (problem.grad_x) add_to_grad_x<T>(problem, work, block, g);
  }
}

#if defined(__AMX_BF16__)

// drop(x), not scaled. A row's mask is drawn while memory answers for rows to come.
PaddedRows dropped_rows(const LoraProblem& problem, const Workspace<BFloat16>& work, const Block& block) {
  constexpr int64_t kAhead = 2, kLine = 64 / sizeof(BFloat16);
  const auto* rows = static_cast<const BFloat16*>(problem.x) + block.first * problem.x_stride;
  const auto draw = [&](int64_t i) {
    const BFloat16* next = rows + (i + kAhead) * problem.x_stride;
    for (int64_t k = 0; k < problem.in_features; k += kLine) __builtin_prefetch(next + k);
    draw_mask(problem, work, block, i);
  };
  return padded_rows(work.x, rows, problem.x_stride, block.rows, problem.in_features, mask_of(problem, work), draw);
}

// hidden = s drop(x) A^T, of such rows.
void project_input_tiles(const LoraProblem& problem, Workspace<BFloat16>& work, PaddedRows x, int64_t rows) {
  project_by_tiles(work.hidden, work.ranks, x.data, x.stride, rows,
                   static_cast<const BFloat16*>(problem.lora_A_t_tiles), work.ranks, problem.parts, problem.in_features,
                   static_cast<float>(problem.scaling * problem.dropout.scale), work.products);
}

// target = source + mask . values right, `right` being group g of a factor's tiles.
void update_tiles(const LoraProblem& problem, Workspace<BFloat16>& work, const float* values, int64_t rows,
                  const BFloat16* source, int64_t source_stride, BFloat16* target, int64_t target_stride, int64_t outs,
                  const void* right, int64_t g, Mask<float> mask) {
  const TileTerms terms(problem.parts);
  const int64_t inner = terms.count * problem.rank;
  const int64_t group = padded(outs, kTileOuts) * padded(inner, kTileInner);
  auto* left = reinterpret_cast<BFloat16*>(work.left);
  pack_left(left, values, work.ranks, rows, problem.rank, terms);
  update_by_tiles({source, source_stride, target, target_stride, mask, nullptr}, rows, outs, left,
                  static_cast<const BFloat16*>(right) + g * group, inner);
}

void forward_block_tiles(const LoraForward& problem, Workspace<BFloat16>& work, const Block& block) {
  project_input_tiles(problem, work, dropped_rows(problem, work, block), block.rows);
  for (int64_t g = 0; g < problem.groups; ++g) {
    const auto* source = static_cast<const BFloat16*>(problem.source);
    if (source) source += block.first * problem.source_stride + problem.columns[g];
    update_tiles(problem, work, work.hidden + g * problem.rank, block.rows, source, problem.source_stride,
                 static_cast<BFloat16*>(problem.y) + block.first * problem.y_stride + problem.columns[g],
                 problem.y_stride, problem.width, problem.lora_B_t_tiles, g, {});
  }
}

void backward_block_tiles(const LoraBackward& problem, Workspace<BFloat16>& work, const Block& block, float* grad_A,
                          float* grad_B) {
  const int64_t in_features = problem.in_features, rank = problem.rank, width = problem.width, rows = block.rows;
  const int64_t parts = outer_parts(problem.parts);
  const float dropout_scale = static_cast<float>(problem.dropout.scale);
  auto* left = reinterpret_cast<BFloat16*>(work.left);
  PaddedRows x{};
  if (problem.needs_A || problem.needs_B) {
    x = dropped_rows(problem, work, block);
  } else {
    draw_masks(problem, work, block);  // For grad_x.
  }
  if (problem.needs_B) project_input_tiles(problem, work, x, rows);
  for (int64_t g = 0; g < problem.groups; ++g) {
    float* hidden = work.hidden + g * rank;
    float* grad_hidden = work.grad_hidden + g * rank;
    const auto* group_grad =
        static_cast<const BFloat16*>(problem.grad_y) + block.first * problem.grad_y_stride + problem.columns[g];
    const PaddedRows grad_y = padded_rows(work.grad_y, group_grad, problem.grad_y_stride, rows, width);
    if (problem.needs_A || problem.grad_x) {
      const int64_t group = padded(problem.parts * rank, kTileOuts) * padded(width, kTileInner);
      project_by_tiles(grad_hidden, work.ranks, grad_y.data, grad_y.stride, rows,
                       static_cast<const BFloat16*>(problem.lora_B_tiles) + g * group, rank, problem.parts, width,
                       static_cast<float>(problem.scaling), work.products);
    }
    if (problem.needs_B) {
      pack_left_t(left, hidden, work.ranks, rows, rank, parts, 1, work.products);
      outer_by_tiles(grad_B + g * rank * width, width, left, rank, parts, grad_y.data, grad_y.stride, rows);
    }
    if (problem.needs_A) {
      pack_left_t(left, grad_hidden, work.ranks, rows, rank, parts, dropout_scale, work.products);
      outer_by_tiles(grad_A + g * rank * in_features, in_features, left, rank, parts, x.data, x.stride, rows);
    }
    if (problem.grad_x) {
      auto* grad_x = static_cast<BFloat16*>(problem.grad_x) + block.first * problem.grad_x_stride;
      update_tiles(problem, work, grad_hidden, rows, problem.starts_grad_x && g == 0 ? nullptr : grad_x,
                   problem.grad_x_stride, grad_x, problem.grad_x_stride, in_features, problem.lora_A_tiles, g,
                   mask_of(problem, work));
    }
  }
}

#endif

template <class T>
void forward(const LoraForward& problem, int64_t begin, int64_t end, void* memory) {
  Workspace<T> work(problem, false, memory);
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (problem.parts) {
      return with_tiles([&] {
        for (int64_t row = begin; row < end; row += work.block) {
          forward_block_tiles(problem, work, block_at(problem, row, std::min(work.block, end - row)));
        }
      });
    }
  }
#endif
  for (int64_t row = begin; row < end; row += work.block) {
    forward_block<T>(problem, work, block_at(problem, row, row + work.block < end ? work.block : end - row));
  }
}

template <class T>
void backward(const LoraBackward& problem, int64_t begin, int64_t end, void* grad_A, void* grad_B, void* memory) {
  Workspace<T> work(problem, true, memory);
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (problem.parts) {
      const int64_t ranks = problem.groups * problem.rank;
      if (grad_A) std::memset(grad_A, 0, ranks * problem.in_features * sizeof(float));
      if (grad_B) std::memset(grad_B, 0, ranks * problem.width * sizeof(float));
      return with_tiles([&] {
        for (int64_t row = begin; row < end; row += work.block) {
          backward_block_tiles(problem, work, block_at(problem, row, std::min(work.block, end - row)),
                               static_cast<float*>(grad_A), static_cast<float*>(grad_B));
        }
      });
    }
  }
#endif
  for (int64_t row = begin; row < end; row += work.block) {
    const Block block = block_at(problem, row, row + work.block < end ? work.block : end - row);
    backward_block<T>(problem, work, block, row == begin, static_cast<Acc<T>*>(grad_A), static_cast<Acc<T>*>(grad_B));
  }
}

template <class T>
void low_rank_sum(const LowRankSum& sum, int64_t begin, int64_t end) {
  using C = Acc<T>;
  rank_update<T>(static_cast<const T*>(sum.source) + begin * sum.source_stride, sum.source_stride,
                 static_cast<T*>(sum.target) + begin * sum.target_stride, sum.target_stride, end - begin, sum.columns,
                 Left<C>{static_cast<const C*>(sum.left) + begin * sum.left_row_stride, sum.left_row_stride,
                         sum.left_inner_stride},
                 static_cast<const C*>(sum.right), sum.columns, sum.inner);
}

template <class T>
void transpose_factor(const Transpose& work) {
  using C = Acc<T>;
  transpose(static_cast<const C*>(work.source), work.columns, work.rows, work.columns, static_cast<C*>(work.target),
            work.target_stride);
}

template <class T>
void widen_factor(const Widening& work) {
  widen_row<T>(static_cast<Acc<T>*>(work.target), static_cast<const T*>(work.source), 0, work.count, nullptr, 1);
}

#if defined(__AMX_BF16__)
constexpr auto kPackTiles = pack_right, kPackTileLines = pack_right_lines;
#else
constexpr void (*kPackTiles)(const TilePacking&) = nullptr, (*kPackTileLines)(const TilePacking&) = nullptr;
#endif

template <class T>
constexpr LoraKernels kernels() {
  return {forward<T>, backward<T>, low_rank_sum<T>, transpose_factor<T>, widen_factor<T>, kPackTiles, kPackTileLines};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const LoraKernels lora_kernels[kNumStorages];
const LoraKernels lora_kernels[kNumStorages] = {kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                                                kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
