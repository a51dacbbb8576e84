// The LoRA kernels for one instruction set. Formulas, shapes and layout: lora_linear.h.
#include "lora_linear.h"

#include "dropout.h"
#include "few_rows.h"
#include "skinny.h"
#include "transpose.h"
#include "vec.h"

namespace peft_ext {
namespace {

template <class T>
constexpr bool kIsAcc = sizeof(T) == sizeof(Acc<T>);

// Rows of the storage type as rows of the accumulation type, dropped by `mask` if there is one.
template <class T>
void widen_row(Acc<T>* target, const T* source, int64_t columns, const uint8_t* mask, Acc<T> scale) {
  using C = Acc<T>;
  int64_t k = 0;
  for (; k + kLanes<C> <= columns; k += kLanes<C>) {
    const Vec<C> value = load(source + k);
    store(target + k, mask ? select_kept<C>(value * scale, mask, k) : value);
  }
  for (; k < columns; ++k) {
    const C value = to_acc(source[k]);
    target[k] = !mask ? value : kept(mask, k) ? value * scale : C(0);
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
  Workspace(const LoraProblem& problem, void* memory)
      : block(problem.block), ranks(problem.groups * problem.rank), mask_stride(mask_bytes(problem.in_features)) {
    const LoraWorkspace sizes(problem);
    x = static_cast<C*>(memory);
    grad_y = x + sizes.x;
    hidden = grad_y + sizes.grad_y;
    grad_hidden = hidden + sizes.hidden;
    mask = reinterpret_cast<uint8_t*>(grad_hidden + sizes.hidden);
  }

  int64_t block;
  int64_t ranks;  // Row stride of the hidden products.
  int64_t mask_stride;
  C* x;
  C* grad_y;
  C* hidden;
  C* grad_hidden;
  uint8_t* mask;
};

template <class T>
void draw_masks(const LoraProblem& problem, Workspace<T>& work, const Block& block) {
  if (problem.dropout.threshold == 0) return;
  for (int64_t i = 0; i < block.rows; ++i) {
    row_mask(work.mask + i * work.mask_stride, block[i], problem.in_features, problem.dropout);
  }
}

// drop(x) of the block: x itself where it can be read as it is.
template <class T>
Rows<Acc<T>> dropped_input(const LoraProblem& problem, Workspace<T>& work, const Block& block) {
  using C = Acc<T>;
  const T* x = static_cast<const T*>(problem.x);
  const bool dropping = problem.dropout.threshold != 0;
  if constexpr (kIsAcc<T>) {
    if (!dropping && !block.numbers) return {x + block.first * problem.x_stride, problem.x_stride};
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    const uint8_t* mask = dropping ? work.mask + i * work.mask_stride : nullptr;
    widen_row<T>(work.x + i * problem.in_features, x + block[i] * problem.x_stride, problem.in_features, mask,
                 static_cast<C>(problem.dropout.scale));
  }
  return {work.x, problem.in_features};
}

template <class T>
Rows<Acc<T>> widened_grad(const LoraBackward& problem, Workspace<T>& work, const Block& block) {
  const T* grad_y = static_cast<const T*>(problem.grad_y);
  if constexpr (kIsAcc<T>) {
    if (!block.numbers) return {grad_y + block.first * problem.grad_y_stride, problem.grad_y_stride};
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    widen_row<T>(work.grad_y + i * problem.out_features, grad_y + block[i] * problem.grad_y_stride,
                 problem.out_features, nullptr, 1);
  }
  return {work.grad_y, problem.out_features};
}

// hidden = s drop(x) A^T.
template <class T>
void project_input(const LoraProblem& problem, Workspace<T>& work, Rows<Acc<T>> x, int64_t rows) {
  using C = Acc<T>;
  const C scaling = static_cast<C>(problem.scaling);
  if (problem.few_rows) {
    dots<C>(work.hidden, work.ranks, x.data, x.stride, rows, static_cast<const C*>(problem.lora_A), work.ranks,
            problem.in_features, scaling);
  } else {
    project<C>(work.hidden, work.ranks, x.data, x.stride, rows, static_cast<const C*>(problem.lora_A_t), work.ranks,
               work.ranks, problem.in_features, scaling);
  }
}

// grad_hidden = s grad_y B, group by group.
template <class T>
void project_grad(const LoraBackward& problem, Workspace<T>& work, Rows<Acc<T>> grad_y, int64_t rows) {
  using C = Acc<T>;
  const C* lora_B = static_cast<const C*>(problem.lora_B);
  for (int64_t g = 0; g < problem.groups; ++g) {
    project<C>(work.grad_hidden + g * problem.rank, work.ranks, grad_y.data + problem.columns[g], grad_y.stride, rows,
               lora_B + g * problem.width * problem.rank, problem.rank, problem.rank, problem.width,
               static_cast<C>(problem.scaling));
  }
}

template <class T>
void forward_block(const LoraForward& problem, Workspace<T>& work, const Block& block) {
  using C = Acc<T>;
  const int64_t rank = problem.rank, width = problem.width;
  draw_masks(problem, work, block);
  project_input<T>(problem, work, dropped_input(problem, work, block), block.rows);
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
    Mask<C> mask;
    if (problem.dropout.threshold != 0) {
      mask = Mask<C>{work.mask + place * work.mask_stride, work.mask_stride, static_cast<C>(problem.dropout.scale)};
    }
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
  draw_masks(problem, work, block);
  const Rows<C> grad_y = widened_grad(problem, work, block);
  const Rows<C> x = problem.needs_A || problem.needs_B ? dropped_input(problem, work, block) : Rows<C>{};
  if (problem.needs_A || problem.grad_x) project_grad<T>(problem, work, grad_y, rows);
  if (problem.needs_B) project_input<T>(problem, work, x, rows);
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

template <class T>
void forward(const LoraForward& problem, int64_t begin, int64_t end, void* memory) {
  Workspace<T> work(problem, memory);
  for (int64_t row = begin; row < end; row += work.block) {
    forward_block<T>(problem, work, block_at(problem, row, row + work.block < end ? work.block : end - row));
  }
}

template <class T>
void backward(const LoraBackward& problem, int64_t begin, int64_t end, void* grad_A, void* grad_B, void* memory) {
  Workspace<T> work(problem, memory);
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
  widen_row<T>(static_cast<Acc<T>*>(work.target), static_cast<const T*>(work.source), work.count, nullptr, 1);
}

template <class T>
constexpr LoraKernels kernels() {
  return {forward<T>, backward<T>, low_rank_sum<T>, transpose_factor<T>, widen_factor<T>};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const LoraKernels lora_kernels[kNumStorages];
const LoraKernels lora_kernels[kNumStorages] = {kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                                                kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
