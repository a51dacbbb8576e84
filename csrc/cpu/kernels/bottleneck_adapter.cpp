// The bottleneck adapter's kernels for one instruction set. Formulas, shapes and layout: bottleneck_adapter.h.
#include "bottleneck_adapter.h"

#include "skinny.h"
#include "transpose.h"
#include "vec.h"

namespace peft_ext {
namespace {

template <class C>
struct Rows {
  C* data;
  int64_t stride;
};

// A call's scratch memory: three blocks of full rows, three of hidden rows.
template <class C>
struct Workspace {
  Workspace(const BottleneckProblem& problem, void* memory) {
    const BottleneckWorkspace sizes(problem);
    auto* next = static_cast<C*>(memory);
    for (C** rows : {&x, &grad_y, &full}) {
      *rows = next;
      next += sizes.rows;
    }
    for (C** rows : {&hidden, &derivative, &grad_hidden}) {
      *rows = next;
      next += sizes.hidden;
    }
  }

  C* x;
  C* grad_y;
  C* full;
  C* hidden;
  C* derivative;
  C* grad_hidden;
};

template <class C>
C sum_of(Vec<C> value) {
  C sum = 0;
  for (int lane = 0; lane < kLanes<C>; ++lane) sum += value[lane];
  return sum;
}

// Calls each(column, kWidth) for whole vectors of columns, then for the single ones that are left.
template <class C, class Each>
inline void for_columns(int64_t columns, const Each& each) {
  int64_t j = 0;
  for (; j + kLanes<C> <= columns; j += kLanes<C>) each(j, Vec<C>{});
  for (; j < columns; ++j) each(j, C{});
}

inline float load_as(const float* source, float) {
  return *source;
}
inline double load_as(const double* source, double) {
  return *source;
}
inline float load_as(const BFloat16* source, float) {
  return to_acc(*source);
}
inline float load_as(const Half* source, float) {
  return to_acc(*source);
}
template <class T>
inline Vec<Acc<T>> load_as(const T* source, Vec<Acc<T>>) {
  return load(source);
}
template <class T>
inline void store_as(T* target, Acc<T> value) {
  *target = from_acc<T>(value);
}
template <class T>
inline void store_as(T* target, Vec<Acc<T>> value) {
  store(target, value);
}

inline float total(float value) {
  return value;
}
inline double total(double value) {
  return value;
}
inline float total(Vec<float> value) {
  return sum_of<float>(value);
}
inline double total(Vec<double> value) {
  return sum_of<double>(value);
}

template <class T>
void widen_row(Acc<T>* target, const T* source, int64_t columns) {
  for_columns<Acc<T>>(columns, [&](int64_t j, auto lanes) { store_as(target + j, load_as(source + j, lanes)); });
}

// target = (source - mean) / deviation; returns 1 / deviation.
template <class T>
Acc<T> normalize_row(Acc<T>* target, const T* source, int64_t columns, double eps) {
  using C = Acc<T>;
  Vec<C> sums = {};
  C tail = 0;
  const auto add = [&](auto value) {
    if constexpr (std::is_same_v<decltype(value), C>) {
      tail += value;
    } else {
      sums += value;
    }
  };
  for_columns<C>(columns, [&](int64_t j, auto lanes) { add(load_as(source + j, lanes)); });
  const C mean = (total(sums) + tail) / C(columns);
  sums = Vec<C>{};
  tail = 0;
  for_columns<C>(columns, [&](int64_t j, auto lanes) {
    const auto centred = load_as(source + j, lanes) - mean;
    add(centred * centred);
  });
  const C variance = (total(sums) + tail) / C(columns);
  const C inverse = C(1) / static_cast<C>(__builtin_sqrt(static_cast<double>(variance) + eps));
  for_columns<C>(columns,
                 [&](int64_t j, auto lanes) { store_as(target + j, (load_as(source + j, lanes) - mean) * inverse); });
  return inverse;
}

// grad of the row before normalize_row, in place of the grad of the one after.
template <class C>
void normalize_row_backward(C* grad, const C* normalized, C inverse, int64_t columns) {
  Vec<C> sums = {}, products = {};
  C sum_tail = 0, product_tail = 0;
  for_columns<C>(columns, [&](int64_t j, auto lanes) {
    const auto g = load_as(grad + j, lanes), product = g * load_as(normalized + j, lanes);
    if constexpr (std::is_same_v<decltype(lanes), C>) {
      sum_tail += g;
      product_tail += product;
    } else {
      sums += g;
      products += product;
    }
  });
  const C mean = (total(sums) + sum_tail) / C(columns), slope = (total(products) + product_tail) / C(columns);
  for_columns<C>(columns, [&](int64_t j, auto lanes) {
    store_as(grad + j, (load_as(grad + j, lanes) - mean - load_as(normalized + j, lanes) * slope) * inverse);
  });
}

// hidden = s act(hidden + bias), with s in the column that multiplies U's bias, and s act' to `derivative`.
template <Activation kKind, class C>
void activate_rows(C* hidden, C* derivative, const BottleneckProblem& problem, int64_t rows) {
  const auto* bias = static_cast<const C*>(problem.down_bias);
  const C scale = static_cast<C>(problem.scaling);
  for (int64_t i = 0; i < rows; ++i, hidden += problem.hidden_stride) {
    for (int64_t j = 0; j < problem.hidden_stride; j += kLanes<C>) {
      Vec<C> slope;
      const Vec<C> value = activate<kKind, C>(load(hidden + j) + load(bias + j), derivative ? &slope : nullptr);
      store(hidden + j, scale * value);
      if (derivative) store(derivative + i * problem.hidden_stride + j, scale * slope);
    }
    hidden[problem.width] = scale;
  }
}

template <class C>
void activate_block(C* hidden, C* derivative, const BottleneckProblem& problem, int64_t rows) {
  switch (problem.activation) {
    case Activation::kRelu:
      return activate_rows<Activation::kRelu>(hidden, derivative, problem, rows);
    case Activation::kGelu:
      return activate_rows<Activation::kGelu>(hidden, derivative, problem, rows);
    case Activation::kGeluNew:
      return activate_rows<Activation::kGeluNew>(hidden, derivative, problem, rows);
    case Activation::kSilu:
      return activate_rows<Activation::kSilu>(hidden, derivative, problem, rows);
    case Activation::kTanh:
      return activate_rows<Activation::kTanh>(hidden, derivative, problem, rows);
  }
}

// Rows of the storage type as they are if they can be computed with, or widened into `memory`.
template <class T>
Rows<const Acc<T>> widened(const T* source, int64_t stride, int64_t rows, int64_t columns, Acc<T>* memory) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return {source, stride};
  } else {
    for (int64_t i = 0; i < rows; ++i) widen_row(memory + i * columns, source + i * stride, columns);
    return {memory, columns};
  }
}

// What D multiplies: x or its normalised rows, with 1 / deviation of each in `inverses`.
template <class T>
Rows<const Acc<T>> input_rows(const BottleneckProblem& problem, int64_t begin, int64_t rows, Acc<T>* memory,
                              Acc<T>* inverses) {
  const T* x = static_cast<const T*>(problem.x) + begin * problem.x_stride;
  if (problem.norm != NormPlace::kPre) return widened(x, problem.x_stride, rows, problem.features, memory);
  for (int64_t i = 0; i < rows; ++i) {
    inverses[i] = normalize_row(memory + i * problem.features, x + i * problem.x_stride, problem.features, problem.eps);
  }
  return {memory, problem.features};
}

constexpr int64_t kMaxBlock = 64;

template <class C>
void compute_hidden(const BottleneckProblem& problem, Rows<const C> input, int64_t rows, C* hidden, C* derivative) {
  // The padding is computed with too, so it must not be left as it was.
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = problem.width; j < problem.hidden_stride; ++j) hidden[i * problem.hidden_stride + j] = C(0);
  }
  project(hidden, problem.hidden_stride, input.data, input.stride, rows, static_cast<const C*>(problem.down_t),
          problem.width, problem.width, problem.features, C(1));
  activate_block(hidden, derivative, problem, rows);
}

// target = source + hidden (U, c)^T; a null source is zero.
template <class T>
void add_up(const BottleneckProblem& problem, const T* source, int64_t source_stride, T* target, const Acc<T>* hidden,
            int64_t rows) {
  rank_update<T>(source, source_stride, target, problem.features, rows, problem.features,
                 Left<Acc<T>>{hidden, problem.hidden_stride, 1}, static_cast<const Acc<T>*>(problem.up_t),
                 problem.features, problem.width + 1);
}

// y = r x + N(u) * w + v, row by row; u is overwritten.
template <class T>
void post_norm(const BottleneckForward& problem, const T* x, T* y, Acc<T>* u, int64_t rows) {
  using C = Acc<T>;
  const auto* weight = static_cast<const C*>(problem.norm_weight);
  const auto* bias = static_cast<const C*>(problem.norm_bias);
  for (int64_t i = 0; i < rows; ++i, x += problem.x_stride, y += problem.features, u += problem.features) {
    normalize_row(u, u, problem.features, problem.eps);
    for_columns<C>(problem.features, [&](int64_t j, auto lanes) {
      auto value = load_as(u + j, lanes) * load_as(weight + j, lanes) + load_as(bias + j, lanes);
      if (problem.residual) value += load_as(x + j, lanes);
      store_as(y + j, value);
    });
  }
}

template <class T>
void forward(const BottleneckForward& problem, int64_t begin, int64_t end, void* memory) {
  using C = Acc<T>;
  const Workspace<C> scratch(problem, memory);
  C inverses[kMaxBlock];
  for (int64_t first = begin; first < end; first += problem.block) {
    const int64_t rows = end - first < problem.block ? end - first : problem.block;
    const T* x = static_cast<const T*>(problem.x) + first * problem.x_stride;
    T* y = static_cast<T*>(problem.y) + first * problem.features;
    const auto input = input_rows<T>(problem, first, rows, scratch.x, inverses);
    compute_hidden<C>(problem, input, rows, scratch.hidden, nullptr);
    if (problem.norm == NormPlace::kPost) {
      add_up<C>(problem, nullptr, 0, scratch.full, scratch.hidden, rows);
      post_norm(problem, x, y, scratch.full, rows);
    } else {
      add_up<T>(problem, problem.residual ? x : nullptr, problem.x_stride, y, scratch.hidden, rows);
    }
  }
}

// The gradient of u in grad_y's place, through the post-norm, and the norm's own gradients.
template <class C>
Rows<const C> post_norm_backward(const BottleneckBackward& problem, Rows<const C> grad_y, int64_t rows,
                                 const Workspace<C>& scratch, C* norm_weight, C* norm_bias) {
  const auto* weight = static_cast<const C*>(problem.norm_weight);
  add_up<C>(problem, nullptr, 0, scratch.full, scratch.hidden, rows);
  for (int64_t i = 0; i < rows; ++i) {
    C* u = scratch.full + i * problem.features;
    C* grad = scratch.grad_y + i * problem.features;
    const C* from = grad_y.data + i * grad_y.stride;
    const C inverse = normalize_row(u, u, problem.features, problem.eps);
    for_columns<C>(problem.features, [&](int64_t j, auto lanes) {
      const auto g = load_as(from + j, lanes);
      store_as(norm_weight + j, load_as(norm_weight + j, lanes) + g * load_as(u + j, lanes));
      store_as(norm_bias + j, load_as(norm_bias + j, lanes) + g);
      store_as(grad + j, g * load_as(weight + j, lanes));
    });
    normalize_row_backward(grad, u, inverse, problem.features);
  }
  return {scratch.grad_y, problem.features};
}

// grad_hidden = (grad_u U) * s act', and its sum over rows added to grad_bias.
template <class C>
void hidden_backward(const BottleneckBackward& problem, Rows<const C> grad_u, int64_t rows, const Workspace<C>& scratch,
                     C* grad_bias) {
  const int64_t stride = problem.hidden_stride;
  project(scratch.grad_hidden, stride, grad_u.data, grad_u.stride, rows, static_cast<const C*>(problem.up),
          problem.width, problem.width, problem.features, C(1));
  for (int64_t i = 0; i < rows; ++i) {
    C* grad = scratch.grad_hidden + i * stride;
    const C* slope = scratch.derivative + i * stride;
    for_columns<C>(problem.width, [&](int64_t j, auto lanes) {
      const auto value = load_as(grad + j, lanes) * load_as(slope + j, lanes);
      store_as(grad + j, value);
      store_as(grad_bias + j, load_as(grad_bias + j, lanes) + value);
    });
  }
}

template <class T>
void input_backward(const BottleneckBackward& problem, Rows<const Acc<T>> input, const Acc<T>* inverses, int64_t first,
                    int64_t rows, const Workspace<Acc<T>>& scratch) {
  using C = Acc<T>;
  T* grad_x = static_cast<T*>(problem.grad_x) + first * problem.features;
  const T* grad_y = static_cast<const T*>(problem.grad_y) + first * problem.grad_y_stride;
  const Left<C> left{scratch.grad_hidden, problem.hidden_stride, 1};
  const auto* down = static_cast<const C*>(problem.down);
  if (problem.norm != NormPlace::kPre) {
    rank_update<T>(problem.residual ? grad_y : nullptr, problem.grad_y_stride, grad_x, problem.features, rows,
                   problem.features, left, down, problem.features, problem.width);
    return;
  }
  rank_update<C>(nullptr, 0, scratch.full, problem.features, rows, problem.features, left, down, problem.features,
                 problem.width);
  for (int64_t i = 0; i < rows; ++i) {
    C* grad = scratch.full + i * problem.features;
    normalize_row_backward(grad, input.data + i * input.stride, inverses[i], problem.features);
    for_columns<C>(problem.features, [&](int64_t j, auto lanes) {
      auto value = load_as(grad + j, lanes);
      if (problem.residual) value += load_as(grad_y + i * problem.grad_y_stride + j, lanes);
      store_as(grad_x + i * problem.features + j, value);
    });
  }
}

// sums [outs, features] (+)= left [rows, outs]^T right [rows, features].
template <class C>
void add_product(C* sums, bool accumulate, const C* left, int64_t left_stride, int64_t outs, Rows<const C> right,
                 int64_t rows, int64_t features) {
  rank_update<C>(accumulate ? sums : nullptr, features, sums, features, outs, features, Left<C>{left, 1, left_stride},
                 right.data, right.stride, rows);
}

template <class T>
void backward(const BottleneckBackward& problem, int64_t begin, int64_t end, void* sums, void* memory) {
  using C = Acc<T>;
  const Workspace<C> scratch(problem, memory);
  const BottleneckGrads layout(problem);
  C* grads = static_cast<C*>(sums);
  for (int64_t j = layout.down_bias; j < layout.elements; ++j) grads[j] = C(0);
  C inverses[kMaxBlock];
  for (int64_t first = begin; first < end; first += problem.block) {
    const int64_t rows = end - first < problem.block ? end - first : problem.block;
    const auto input = input_rows<T>(problem, first, rows, scratch.x, inverses);
    compute_hidden<C>(problem, input, rows, scratch.hidden, scratch.derivative);
    auto grad_u = widened(static_cast<const T*>(problem.grad_y) + first * problem.grad_y_stride, problem.grad_y_stride,
                          rows, problem.features, scratch.grad_y);
    if (problem.norm == NormPlace::kPost) {
      grad_u =
          post_norm_backward<C>(problem, grad_u, rows, scratch, grads + layout.norm_weight, grads + layout.norm_bias);
    }
    if (problem.needs_up) {
      add_product<C>(grads + layout.up_t, first > begin, scratch.hidden, problem.hidden_stride, problem.width + 1,
                     grad_u, rows, problem.features);
    }
    if (!problem.needs_down && !problem.needs_down_bias && !problem.grad_x) continue;
    hidden_backward<C>(problem, grad_u, rows, scratch, grads + layout.down_bias);
    if (problem.needs_down) {
      add_product<C>(grads + layout.down, first > begin, scratch.grad_hidden, problem.hidden_stride, problem.width,
                     input, rows, problem.features);
    }
    if (problem.grad_x) input_backward<T>(problem, input, inverses, first, rows, scratch);
  }
}

template <class T>
void transpose_matrix(const void* source, int64_t rows, int64_t columns, void* target) {
  transpose(static_cast<const Acc<T>*>(source), columns, rows, columns, static_cast<Acc<T>*>(target), rows);
}

template <class T>
constexpr BottleneckKernels kernels() {
  return {forward<T>, backward<T>, transpose_matrix<T>};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const BottleneckKernels bottleneck_kernels[kNumStorages];
const BottleneckKernels bottleneck_kernels[kNumStorages] = {kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                                                            kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
