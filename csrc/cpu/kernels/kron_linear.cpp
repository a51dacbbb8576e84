// The Kronecker kernels for one instruction set. Formulas, shapes and layout: kron_linear.h.
#include "kron_linear.h"

#include "kron_linear_amx.h"
#include "skinny.h"
#include "vec.h"

namespace peft_ext {
namespace {

template <class C>
struct Rows {
  const C* data;
  int64_t stride;
};

// f(data, hidden, count, data_stride, hidden_stride) for the slices of `width` elements that each row consists of,
// whose hidden vectors of `inner` elements lie side by side: all at once where the rows have no gaps.
template <class F>
inline void each_slice(int64_t rows, int64_t slices, int64_t width, int64_t stride, int64_t inner, const F& f) {
  if (stride == slices * width) return f(0, 0, rows * slices, width, inner);
  for (int64_t i = 0; i < slices; ++i) f(i * width, i * inner, rows, stride, slices * inner);
}

// hidden = data factor, slice by slice.
template <class C>
void project_slices(C* hidden, Rows<C> data, int64_t rows, int64_t slices, int64_t width, int64_t inner,
                    const void* factor) {
  each_slice(rows, slices, width, data.stride, inner,
             [&](int64_t at, int64_t hidden_at, int64_t count, int64_t stride, int64_t hidden_stride) {
               project<C>(hidden + hidden_at, hidden_stride, data.data + at, stride, count,
                          static_cast<const C*>(factor), inner, inner, width, 1);
             });
}

// total [inner, width] (+)= hidden^T data over all slices.
template <class C>
void add_outer_slices(C* total, bool first, const C* hidden, Rows<C> data, int64_t rows, int64_t slices, int64_t width,
                      int64_t inner) {
  each_slice(rows, slices, width, data.stride, inner,
             [&](int64_t at, int64_t hidden_at, int64_t count, int64_t stride, int64_t hidden_stride) {
               rank_update<C>(first && at == 0 ? nullptr : total, width, total, width, inner, width,
                              Left<C>{hidden + hidden_at, 1, hidden_stride}, data.data + at, stride, count);
             });
}

// data = hidden factor_t (+ bias), slice by slice.
template <class T>
void expand_slices(T* data, int64_t stride, const Acc<T>* bias, const Acc<T>* hidden, int64_t rows, int64_t slices,
                   int64_t width, int64_t inner, const void* factor_t) {
  using C = Acc<T>;
  const C* right = static_cast<const C*>(factor_t);
  if (bias) {
    for (int64_t i = 0; i < slices; ++i) {
      rank_update<T, C>(bias + i * width, 0, data + i * width, stride, rows, width,
                        Left<C>{hidden + i * inner, slices * inner, 1}, right, width, inner);
    }
    return;
  }
  each_slice(rows, slices, width, stride, inner,
             [&](int64_t at, int64_t hidden_at, int64_t count, int64_t data_stride, int64_t hidden_stride) {
               rank_update<T>(nullptr, 0, data + at, data_stride, count, width,
                              Left<C>{hidden + hidden_at, hidden_stride, 1}, right, width, inner);
             });
}

// f(width, at) for pieces of [0, count) as wide as vectors allow.
template <class C, class F>
inline void each_piece(int64_t count, const F& f) {
  int64_t at = 0;
  for (; at + kLanes<C> <= count; at += kLanes<C>) f(Constant<kLanes<C>>{}, at);
  if constexpr (kLanes<C> > 8) {
    for (; at + 8 <= count; at += 8) f(Constant<8>{}, at);
  }
  if constexpr (kLanes<C> > 4) {
    for (; at + 4 <= count; at += 4) f(Constant<4>{}, at);
  }
  for (; at < count; ++at) f(Constant<1>{}, at);
}

template <class C, int kWidth>
struct PieceType {
  using type = Lanes<C, kWidth>;
};
template <class C>
struct PieceType<C, 1> {
  using type = C;
};

// target[m,j,:] = sum_i mix . source[m,i,:], the mix of (i, j) at i * source_step + j * target_step.
template <class C>
void mix_slices(C* target, int64_t targets, int64_t target_step, const C* source, int64_t sources, int64_t source_step,
                const C* mix, int64_t rows, int64_t inner) {
  each_piece<C>(inner, [&](auto width, int64_t at) {
    using V = typename PieceType<C, decltype(width)::value>::type;
    for (int64_t m = 0; m < rows; ++m) {
      const C* row = source + m * sources * inner + at;
      C* to = target + m * targets * inner + at;
      int64_t j = 0;
      const auto advance = [&](auto tile) {
        constexpr int kTile = decltype(tile)::value;
        V sums[kTile] = {};
        for (int64_t i = 0; i < sources; ++i) {
          const V value = load_unaligned<V>(row + i * inner);
          const C* factors = mix + i * source_step + j * target_step + at;
          for (int s = 0; s < kTile; ++s) sums[s] += value * load_unaligned<V>(factors + s * target_step);
        }
        for (int s = 0; s < kTile; ++s) std::memcpy(to + (j + s) * inner, &sums[s], sizeof(V));
        j += kTile;
      };
      while (j + 4 <= targets) advance(Constant<4>{});
      while (j < targets) advance(Constant<1>{});
    }
  });
}

// total[p,q,:] (+)= sum_m z[m,p,:] . gw[m,q,:].
template <class C>
void add_mix_grad(C* total, bool first, const C* z, int64_t a_in, const C* gw, int64_t a_out, int64_t rows,
                  int64_t inner) {
  each_piece<C>(inner, [&](auto width, int64_t at) {
    using V = typename PieceType<C, decltype(width)::value>::type;
    for (int64_t p = 0; p < a_in; ++p) {
      int64_t q = 0;
      const auto advance = [&](auto tile) {
        constexpr int kTile = decltype(tile)::value;
        V sums[kTile] = {};
        for (int64_t m = 0; m < rows; ++m) {
          const V value = load_unaligned<V>(z + (m * a_in + p) * inner + at);
          for (int s = 0; s < kTile; ++s) sums[s] += value * load_unaligned<V>(gw + (m * a_out + q + s) * inner + at);
        }
        for (int s = 0; s < kTile; ++s) {
          C* target = total + (p * a_out + q + s) * inner + at;
          if (!first) sums[s] += load_unaligned<V>(target);
          std::memcpy(target, &sums[s], sizeof(V));
        }
        q += kTile;
      };
      while (q + 4 <= a_out) advance(Constant<4>{});
      while (q < a_out) advance(Constant<1>{});
    }
  });
}

// Rows of the storage type as rows of the accumulation type: the same ones where these are one type.
template <class T>
Rows<Acc<T>> widened(const void* rows, int64_t stride, int64_t begin, int64_t count, int64_t columns, Acc<T>* memory) {
  using C = Acc<T>;
  const T* source = static_cast<const T*>(rows) + begin * stride;
  if constexpr (std::is_same_v<T, C>) {
    return {source, stride};
  } else {
    for (int64_t i = 0; i < count; ++i) {
      int64_t k = 0;
      for (; k + kLanes<C> <= columns; k += kLanes<C>) store(memory + i * columns + k, load(source + i * stride + k));
      for (; k < columns; ++k) memory[i * columns + k] = to_acc(source[i * stride + k]);
    }
    return {memory, columns};
  }
}

// A call's scratch memory.
template <class C>
struct Workspace {
  Workspace(const KronProblem& problem, void* memory) {
    const KronWorkspace sizes(problem);
    x = static_cast<C*>(memory);
    grad_y = x + sizes.x;
    z = grad_y + sizes.grad_y;
    grad_z = z + sizes.z;
    w = grad_z + sizes.z;
    grad_w = w + sizes.w;
  }

  C *x, *grad_y, *z, *grad_z, *w, *grad_w;
};

template <class T>
void forward_block(const KronForward& problem, Workspace<Acc<T>>& work, int64_t begin, int64_t rows) {
  using C = Acc<T>;
  const int64_t a_in = problem.a_in, a_out = problem.a_out, b_in = problem.b_in, b_out = problem.b_out;
  const int64_t inner = problem.inner;
  const Rows<C> x = widened<T>(problem.x, problem.x_stride, begin, rows, a_in * b_in, work.x);
  project_slices<C>(work.z, x, rows, a_in, b_in, inner, problem.s);
  mix_slices<C>(work.w, a_out, inner, work.z, a_in, a_out * inner, static_cast<const C*>(problem.mix), rows, inner);
  expand_slices<T>(static_cast<T*>(problem.y) + begin * problem.y_stride, problem.y_stride,
                   static_cast<const Acc<T>*>(problem.bias), work.w, rows, a_out, b_out, inner, problem.t);
}

template <class T>
void backward_block(const KronBackward& problem, const KronFactorGrads& grads, Workspace<Acc<T>>& work, int64_t begin,
                    int64_t rows, bool first) {
  using C = Acc<T>;
  const int64_t a_in = problem.a_in, a_out = problem.a_out, b_in = problem.b_in, b_out = problem.b_out;
  const int64_t inner = problem.inner;
  const C* mix = static_cast<const C*>(problem.mix);
  const Rows<C> grad_y = widened<T>(problem.grad_y, problem.grad_y_stride, begin, rows, a_out * b_out, work.grad_y);
  Rows<C> x{};
  if (grads.mix || grads.s_t || grads.t) {
    x = widened<T>(problem.x, problem.x_stride, begin, rows, a_in * b_in, work.x);
  }
  if (grads.mix || grads.t) project_slices<C>(work.z, x, rows, a_in, b_in, inner, problem.s);
  if (grads.t) {
    mix_slices<C>(work.w, a_out, inner, work.z, a_in, a_out * inner, mix, rows, inner);
    add_outer_slices<C>(static_cast<C*>(grads.t), first, work.w, grad_y, rows, a_out, b_out, inner);
  }
  if (!grads.mix && !grads.s_t && !problem.grad_x) return;
  project_slices<C>(work.grad_w, grad_y, rows, a_out, b_out, inner, problem.t_t);
  if (grads.mix) {
    add_mix_grad<C>(static_cast<C*>(grads.mix), first, work.z, a_in, work.grad_w, a_out, rows, inner);
  }
  if (!grads.s_t && !problem.grad_x) return;
  mix_slices<C>(work.grad_z, a_in, a_out * inner, work.grad_w, a_out, inner, mix, rows, inner);
  if (grads.s_t) add_outer_slices<C>(static_cast<C*>(grads.s_t), first, work.grad_z, x, rows, a_in, b_in, inner);
  if (problem.grad_x) {
    expand_slices<T>(static_cast<T*>(problem.grad_x) + begin * problem.grad_x_stride, problem.grad_x_stride, nullptr,
                     work.grad_z, rows, a_in, b_in, inner, problem.s_t);
  }
}

template <class T>
void forward(const KronForward& problem, int64_t begin, int64_t end, void* memory) {
  Workspace<Acc<T>> work(problem, memory);
  for (int64_t row = begin; row < end; row += problem.block) {
    forward_block<T>(problem, work, row, row + problem.block < end ? problem.block : end - row);
  }
}

template <class T>
void backward(const KronBackward& problem, const KronFactorGrads& grads, int64_t begin, int64_t end, void* memory) {
  Workspace<Acc<T>> work(problem, memory);
  for (int64_t row = begin; row < end; row += problem.block) {
    backward_block<T>(problem, grads, work, row, row + problem.block < end ? problem.block : end - row, row == begin);
  }
}

template <class T>
constexpr KronKernels kernels() {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {forward<T>, backward<T>, pack_product, multiply_product, product_grad};
  }
#endif
  return {forward<T>, backward<T>, nullptr, nullptr, nullptr};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const KronKernels kron_kernels[kNumStorages];
const KronKernels kron_kernels[kNumStorages] = {kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                                                kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
