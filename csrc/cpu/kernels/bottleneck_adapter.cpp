// The bottleneck adapter's kernels for one instruction set. Formulas, shapes and layout: bottleneck_adapter.h.
#include "bottleneck_adapter.h"

#include "amx.h"
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

// A call's scratch memory, as BottleneckWorkspace divides it.
template <class C>
struct Workspace {
  Workspace(const BottleneckWorkspace& sizes, void* memory)
      : x(static_cast<C*>(memory)),
        full(x + sizes.x),
        grad_y(full + sizes.full),
        hidden(grad_y + sizes.grad_y),
        derivative(hidden + sizes.hidden),
        grad_hidden(derivative + sizes.derivative),
        panel(grad_hidden + sizes.grad_hidden),
        left(panel + sizes.panel),
        products(left + sizes.left),
        up_t(products + sizes.products) {}

  C* x;
  C* full;
  C* grad_y;
  C* hidden;
  C* derivative;
  C* grad_hidden;
  C* panel;
  C* left;
  C* products;
  C* up_t;
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

// hidden = s act(hidden), with s in the column that multiplies U's bias, and s act' to `derivative`.
template <Activation kKind, class C>
void activate_rows(C* hidden, C* derivative, const BottleneckProblem& problem, int64_t rows) {
  const C scale = static_cast<C>(problem.scaling);
  for (int64_t i = 0; i < rows; ++i, hidden += problem.hidden_stride) {
    for (int64_t j = 0; j < problem.hidden_stride; j += kLanes<C>) {
      Vec<C> slope;
      const Vec<C> value = activate<kKind, C>(load(hidden + j), derivative ? &slope : nullptr);
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

// target [count, width] = columns [begin, begin + count) of D, transposed.
template <class C>
void pack_down(const BottleneckProblem& problem, int64_t begin, int64_t count, C* target) {
  transpose(static_cast<const C*>(problem.down) + begin, problem.features, problem.width, count, target, problem.width);
}

// target [width + 1, count] = rows [begin, begin + count) of (U, c), transposed.
template <class C>
void pack_up(const BottleneckProblem& problem, int64_t begin, int64_t count, C* target) {
  transpose(static_cast<const C*>(problem.up) + begin * problem.width, problem.width, count, problem.width, target,
            count);
  C* last = target + problem.width * count;
  if (problem.up_bias) {
    std::memcpy(last, static_cast<const C*>(problem.up_bias) + begin, count * sizeof(C));
  } else {
    std::memset(last, 0, count * sizeof(C));
  }
}

template <class T>
void pack(const BottleneckProblem& problem, void* down_t, void* up_t) {
  pack_down(problem, 0, problem.features, static_cast<Acc<T>*>(down_t));
  pack_up(problem, 0, problem.features, static_cast<Acc<T>*>(up_t));
}

// Calls each(begin, count) for the panels of the features.
template <class Each>
inline void for_panels(const BottleneckProblem& problem, const Each& each) {
  const int64_t lines = BottleneckWorkspace::panel_lines(problem.width);
  for (int64_t begin = 0; begin < problem.features; begin += lines) {
    each(begin, problem.features - begin < lines ? problem.features - begin : lines);
  }
}

// hidden = input D^T + b, zero in the padding.
template <class C>
void project_down(const BottleneckProblem& problem, Rows<const C> input, int64_t rows, C* hidden, C* panel) {
  const int64_t stride = problem.hidden_stride, width = problem.width;
  const auto* bias = static_cast<const C*>(problem.down_bias);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < stride; ++j) hidden[i * stride + j] = bias && j < width ? bias[j] : C(0);
  }
  if (problem.down_t) {
    project(hidden, stride, input.data, input.stride, rows, static_cast<const C*>(problem.down_t), width, width,
            problem.features, C(1), true);
    return;
  }
  for_panels(problem, [&](int64_t begin, int64_t count) {
    pack_down(problem, begin, count, panel);
    project(hidden, stride, input.data + begin, input.stride, rows, static_cast<const C*>(panel), width, width, count,
            C(1), true);
  });
}

// Rows of `width` elements from and to the padded rows of a block.
template <class C>
void load_hidden(const BottleneckProblem& problem, const C* source, int64_t rows, C* hidden) {
  for (int64_t i = 0; i < rows; ++i, hidden += problem.hidden_stride) {
    std::memcpy(hidden, source + i * problem.width, problem.width * sizeof(C));
    std::memset(hidden + problem.width, 0, (problem.hidden_stride - problem.width) * sizeof(C));
  }
}

template <class C>
void store_hidden(const BottleneckProblem& problem, const C* hidden, int64_t rows, C* target) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(target + i * problem.width, hidden + i * problem.hidden_stride, problem.width * sizeof(C));
  }
}

// target = source + hidden (U, c)^T; a null source is zero.
template <class T>
void add_up(const BottleneckProblem& problem, const T* source, int64_t source_stride, T* target, const Acc<T>* hidden,
            int64_t rows, Acc<T>* panel) {
  using C = Acc<T>;
  const Left<C> left{hidden, problem.hidden_stride, 1};
  if (problem.up_t) {
    rank_update<T>(source, source_stride, target, problem.features, rows, problem.features, left,
                   static_cast<const C*>(problem.up_t), problem.features, problem.width + 1);
    return;
  }
  for_panels(problem, [&](int64_t begin, int64_t count) {
    pack_up(problem, begin, count, panel);
    rank_update<T>(source ? source + begin : nullptr, source_stride, target + begin, problem.features, rows, count,
                   left, static_cast<const C*>(panel), count, problem.width + 1);
  });
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

#if defined(__AMX_BF16__)

const BFloat16* row_of(const void* values, int64_t row, int64_t stride) {
  return static_cast<const BFloat16*>(values) + row * stride;
}

void project_down_tiles(const BottleneckForward& problem, PaddedRows x, int64_t rows, const Workspace<float>& scratch) {
  const int64_t stride = problem.hidden_stride, width = problem.width;
  std::memset(scratch.hidden, 0, rows * stride * sizeof(float));
  project_by_tiles(scratch.hidden, stride, x.data, x.stride, rows, static_cast<const BFloat16*>(problem.down_t_tiles),
                   width, problem.parts, problem.features, 1, scratch.products);
  if (!problem.down_bias) return;
  const auto* bias = static_cast<const float*>(problem.down_bias);
  for (int64_t i = 0; i < rows; ++i) {
    float* hidden = scratch.hidden + i * stride;
    for_columns<float>(width, [&](int64_t j, auto lanes) {
      store_as(hidden + j, load_as(hidden + j, lanes) + load_as(bias + j, lanes));
    });
  }
}

void forward_tiles(const BottleneckForward& problem, int64_t begin, int64_t end, const Workspace<float>& scratch) {
  const TileTerms terms(problem.parts);
  const int64_t features = problem.features, width = problem.width;
  auto* left = reinterpret_cast<BFloat16*>(scratch.left);
  for (int64_t first = begin; first < end; first += problem.block) {
    const int64_t rows = std::min(end - first, problem.block);
    const BFloat16* x = row_of(problem.x, first, problem.x_stride);
    auto* y = static_cast<BFloat16*>(problem.y) + first * features;
    project_down_tiles(problem, padded_rows(scratch.x, x, problem.x_stride, rows, features), rows, scratch);
    if (problem.hidden) {
      store_hidden(problem, scratch.hidden, rows, static_cast<float*>(problem.hidden) + first * width);
    }
    activate_block<float>(scratch.hidden, nullptr, problem, rows);
    pack_left(left, scratch.hidden, problem.hidden_stride, rows, width, terms);
    const auto* bias = static_cast<const float*>(problem.up_bias);
    update_by_tiles({problem.residual ? x : nullptr, problem.x_stride, y, features, {}, bias}, rows, features, left,
                    static_cast<const BFloat16*>(problem.up_t_tiles), width * terms.count);
  }
}

#endif

template <class T>
void forward(const BottleneckForward& problem, int64_t begin, int64_t end, void* memory) {
  using C = Acc<T>;
  const Workspace<C> scratch(BottleneckWorkspace(problem, false), memory);
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (problem.parts) return with_tiles([&] { forward_tiles(problem, begin, end, scratch); });
  }
#endif
  C inverses[kMaxBlock];
  for (int64_t first = begin; first < end; first += problem.block) {
    const int64_t rows = end - first < problem.block ? end - first : problem.block;
    const T* x = static_cast<const T*>(problem.x) + first * problem.x_stride;
    T* y = static_cast<T*>(problem.y) + first * problem.features;
    const auto input = input_rows<T>(problem, first, rows, scratch.x, inverses);
    project_down<C>(problem, input, rows, scratch.hidden, scratch.panel);
    if (problem.hidden) {
      store_hidden(problem, scratch.hidden, rows, static_cast<C*>(problem.hidden) + first * problem.width);
    }
    activate_block<C>(scratch.hidden, nullptr, problem, rows);
    if (problem.norm == NormPlace::kPost) {
      add_up<C>(problem, nullptr, 0, scratch.full, scratch.hidden, rows, scratch.panel);
      post_norm(problem, x, y, scratch.full, rows);
    } else {
      add_up<T>(problem, problem.residual ? x : nullptr, problem.x_stride, y, scratch.hidden, rows, scratch.panel);
    }
  }
}

// The gradient of u in grad_y's place, through the post-norm, and the norm's own gradients.
template <class C>
Rows<const C> post_norm_backward(const BottleneckBackward& problem, Rows<const C> grad_y, int64_t rows,
                                 const Workspace<C>& scratch, C* norm_weight, C* norm_bias) {
  const auto* weight = static_cast<const C*>(problem.norm_weight);
  add_up<C>(problem, nullptr, 0, scratch.full, scratch.hidden, rows, scratch.panel);
  for (int64_t i = 0; i < rows; ++i) {
    C* u = scratch.full + i * problem.features;
    C* grad = scratch.grad_y + i * problem.features;
    const C* from = grad_y.data + i * grad_y.stride;
    const C inverse = normalize_row(u, u, problem.features, problem.eps);
    for_columns<C>(problem.features, [&](int64_t j, auto lanes) {
      const auto g = load_as(from + j, lanes);
      if (norm_weight) store_as(norm_weight + j, load_as(norm_weight + j, lanes) + g * load_as(u + j, lanes));
      if (norm_bias) store_as(norm_bias + j, load_as(norm_bias + j, lanes) + g);
      store_as(grad + j, g * load_as(weight + j, lanes));
    });
    normalize_row_backward(grad, u, inverse, problem.features);
  }
  return {scratch.grad_y, problem.features};
}

// sums += scale times the sum of the rows.
template <class T>
void add_rows(Acc<T>* sums, Rows<const T> source, int64_t rows, int64_t columns, Acc<T> scale) {
  using C = Acc<T>;
  for_columns<C>(columns, [&](int64_t j, auto lanes) {
    auto sum = lanes;
    for (int64_t i = 0; i < rows; ++i) sum += load_as(source.data + i * source.stride + j, lanes);
    store_as(sums + j, load_as(sums + j, lanes) + scale * sum);
  });
}

// grad_hidden *= s act'.
template <class C>
void activation_backward(const BottleneckBackward& problem, int64_t rows, const Workspace<C>& scratch) {
  for (int64_t i = 0; i < rows; ++i) {
    C* grad = scratch.grad_hidden + i * problem.hidden_stride;
    const C* slope = scratch.derivative + i * problem.hidden_stride;
    for_columns<C>(problem.width, [&](int64_t j, auto lanes) {
      store_as(grad + j, load_as(grad + j, lanes) * load_as(slope + j, lanes));
    });
  }
}

// grad_hidden = (grad_u U) * s act'.
template <class C>
void hidden_backward(const BottleneckBackward& problem, Rows<const C> grad_u, int64_t rows,
                     const Workspace<C>& scratch) {
  project(scratch.grad_hidden, problem.hidden_stride, grad_u.data, grad_u.stride, rows,
          static_cast<const C*>(problem.up), problem.width, problem.width, problem.features, C(1));
  activation_backward(problem, rows, scratch);
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

// sums [outs, columns] (+)= left [rows, outs]^T right [rows, columns].
template <class C>
void add_product(C* sums, bool accumulate, Rows<const C> left, int64_t outs, Rows<const C> right, int64_t columns,
                 int64_t rows) {
  rank_update<C>(accumulate ? sums : nullptr, columns, sums, columns, outs, columns, Left<C>{left.data, 1, left.stride},
                 right.data, right.stride, rows);
}

#if defined(__AMX_BF16__)

void backward_tiles(const BottleneckBackward& problem, int64_t begin, int64_t end, const BottleneckGrads& sums,
                    const Workspace<float>& scratch) {
  const TileTerms terms(problem.parts);
  const int64_t features = problem.features, width = problem.width, stride = problem.hidden_stride;
  const int64_t parts = outer_parts(problem.parts);
  auto* left = reinterpret_cast<BFloat16*>(scratch.left);
  auto* down_bias = static_cast<float*>(sums.down_bias);
  auto* up_bias = static_cast<float*>(sums.up_bias);
  if (sums.down) std::memset(sums.down, 0, width * features * sizeof(float));
  if (sums.up) std::memset(scratch.up_t, 0, width * features * sizeof(float));
  if (down_bias) std::memset(down_bias, 0, width * sizeof(float));
  if (up_bias) std::memset(up_bias, 0, features * sizeof(float));
  for (int64_t first = begin; first < end; first += problem.block) {
    const int64_t rows = std::min(end - first, problem.block);
    const BFloat16* x = row_of(problem.x, first, problem.x_stride);
    const BFloat16* grad_y = row_of(problem.grad_y, first, problem.grad_y_stride);
    load_hidden(problem, static_cast<const float*>(problem.hidden) + first * width, rows, scratch.hidden);
    activate_block<float>(scratch.hidden, scratch.derivative, problem, rows);
    const PaddedRows grad_u = padded_rows(scratch.grad_y, grad_y, problem.grad_y_stride, rows, features);
    if (sums.up) {
      pack_left_t(left, scratch.hidden, stride, rows, width, parts, 1, scratch.products);
      outer_by_tiles(scratch.up_t, features, left, width, parts, grad_u.data, grad_u.stride, rows);
    }
    if (up_bias) {
      add_rows<BFloat16>(up_bias, Rows<const BFloat16>{grad_y, problem.grad_y_stride}, rows, features,
                         static_cast<float>(problem.scaling));
    }
    if (!(sums.down || down_bias || problem.grad_x)) continue;
    project_by_tiles(scratch.grad_hidden, stride, grad_u.data, grad_u.stride, rows,
                     static_cast<const BFloat16*>(problem.up_tiles), width, problem.parts, features, 1,
                     scratch.products);
    activation_backward(problem, rows, scratch);
    if (sums.down) {
      const PaddedRows input = padded_rows(scratch.x, x, problem.x_stride, rows, features);
      pack_left_t(left, scratch.grad_hidden, stride, rows, width, parts, 1, scratch.products);
      outer_by_tiles(static_cast<float*>(sums.down), features, left, width, parts, input.data, input.stride, rows);
    }
    if (down_bias) add_rows<float>(down_bias, Rows<const float>{scratch.grad_hidden, stride}, rows, width, 1.0f);
    if (problem.grad_x) {
      auto* grad_x = static_cast<BFloat16*>(problem.grad_x) + first * features;
      pack_left(left, scratch.grad_hidden, stride, rows, width, terms);
      update_by_tiles({problem.residual ? grad_y : nullptr, problem.grad_y_stride, grad_x, features, {}, nullptr}, rows,
                      features, left, static_cast<const BFloat16*>(problem.down_tiles), width * terms.count);
    }
  }
  if (sums.up) transpose(scratch.up_t, features, width, features, static_cast<float*>(sums.up), width);
}

#endif

template <class T>
void backward(const BottleneckBackward& problem, int64_t begin, int64_t end, const BottleneckGrads& sums,
              void* memory) {
  using C = Acc<T>;
  const Workspace<C> scratch(BottleneckWorkspace(problem, true), memory);
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (problem.parts) return with_tiles([&] { backward_tiles(problem, begin, end, sums, scratch); });
  }
#endif
  const int64_t features = problem.features, width = problem.width;
  const auto zeroed = [](void* sum, int64_t elements) {
    if (sum) std::memset(sum, 0, elements * sizeof(C));
    return static_cast<C*>(sum);
  };
  C* const down_bias = zeroed(sums.down_bias, width);
  C* const up_bias = zeroed(sums.up_bias, features);
  C* const norm_weight = zeroed(sums.norm_weight, features);
  C* const norm_bias = zeroed(sums.norm_bias, features);
  if (begin == end) {
    zeroed(sums.down, width * features);
    zeroed(sums.up, width * features);
  }
  C inverses[kMaxBlock];
  for (int64_t first = begin; first < end; first += problem.block) {
    const int64_t rows = end - first < problem.block ? end - first : problem.block;
    const auto input = input_rows<T>(problem, first, rows, scratch.x, inverses);
    load_hidden(problem, static_cast<const C*>(problem.hidden) + first * width, rows, scratch.hidden);
    activate_block<C>(scratch.hidden, scratch.derivative, problem, rows);
    auto grad_u = widened(static_cast<const T*>(problem.grad_y) + first * problem.grad_y_stride, problem.grad_y_stride,
                          rows, features, scratch.grad_y);
    if (problem.norm == NormPlace::kPost) {
      grad_u = post_norm_backward<C>(problem, grad_u, rows, scratch, norm_weight, norm_bias);
    }
    const Rows<const C> hidden{scratch.hidden, problem.hidden_stride};
    const Rows<const C> grad_hidden{scratch.grad_hidden, problem.hidden_stride};
    const bool needs_hidden = sums.down || down_bias || problem.grad_x;
    if (needs_hidden) hidden_backward<C>(problem, grad_u, rows, scratch);
    if (sums.up) add_product(static_cast<C*>(sums.up), first > begin, grad_u, features, hidden, width, rows);
    if (up_bias) add_rows<C>(up_bias, grad_u, rows, features, static_cast<C>(problem.scaling));
    if (!needs_hidden) continue;
    if (sums.down) add_product(static_cast<C*>(sums.down), first > begin, grad_hidden, width, input, features, rows);
    if (down_bias) add_rows<C>(down_bias, grad_hidden, rows, width, C(1));
    if (problem.grad_x) input_backward<T>(problem, input, inverses, first, rows, scratch);
  }
}

template <class T>
constexpr BottleneckKernels kernels() {
  return {forward<T>, backward<T>, pack<T>};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const BottleneckKernels bottleneck_kernels[kNumStorages];
const BottleneckKernels bottleneck_kernels[kNumStorages] = {kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                                                            kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
