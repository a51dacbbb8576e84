// The fusion kernels for one instruction set. Formulas, shapes and layout: adapter_fusion.h.
#include "adapter_fusion.h"

#include <cmath>

#include "vec.h"

namespace peft_ext {
namespace {

constexpr int kUnroll = 4;  // Vectors in flight: enough to hide the latency of a multiply-add.

inline float exponential(float value) {
  return __builtin_expf(value);
}
inline double exponential(double value) {
  return __builtin_exp(value);
}

template <class T, class Q>
Acc<T> dot(const Q* left, const T* right, int64_t columns) {
  using C = Acc<T>;
  constexpr int64_t kStep = kUnroll * kLanes<C>;
  Vec<C> sums[kUnroll] = {};
  int64_t k = 0;
  for (; k + kStep <= columns; k += kStep) {
    for (int v = 0; v < kUnroll; ++v) sums[v] += load(left + k + v * kLanes<C>) * load(right + k + v * kLanes<C>);
  }
  for (; k + kLanes<C> <= columns; k += kLanes<C>) sums[0] += load(left + k) * load(right + k);
  C sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < columns; ++k) sum += to_acc(left[k]) * to_acc(right[k]);
  return sum;
}

// Columns [k, k + kVectors vectors) of target = (keep target) + sum_i factors[i] rows[i].
template <int kVectors, class T, class Target>
inline void combine_block(Target* target, bool keep, const T* const* rows, const Acc<T>* factors, int64_t count,
                          int64_t k) {
  using C = Acc<T>;
  Vec<C> sums[kVectors] = {};
  if (keep) {
    for (int v = 0; v < kVectors; ++v) sums[v] = load(target + k + v * kLanes<C>);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < kVectors; ++v) sums[v] += factors[i] * load(rows[i] + k + v * kLanes<C>);
  }
  for (int v = 0; v < kVectors; ++v) store(target + k + v * kLanes<C>, sums[v]);
}

template <class T, class Target>
void combine(Target* target, bool keep, const T* const* rows, const Acc<T>* factors, int64_t count, int64_t columns) {
  using C = Acc<T>;
  int64_t k = 0;
  for (; k + kUnroll * kLanes<C> <= columns; k += kUnroll * kLanes<C>) {
    combine_block<kUnroll>(target, keep, rows, factors, count, k);
  }
  for (; k + kLanes<C> <= columns; k += kLanes<C>) combine_block<1>(target, keep, rows, factors, count, k);
  for (; k < columns; ++k) {
    C sum = keep ? to_acc(target[k]) : C(0);
    for (int64_t i = 0; i < count; ++i) sum += factors[i] * to_acc(rows[i][k]);
    target[k] = from_acc<Target>(sum);
  }
}

// target = a x + b y.
template <class T, class Q>
void blend(T* target, Acc<T> a, const T* x, Acc<T> b, const Q* y, int64_t columns) {
  using C = Acc<T>;
  int64_t k = 0;
  for (; k + kLanes<C> <= columns; k += kLanes<C>) store(target + k, a * load(x + k) + b * load(y + k));
  for (; k < columns; ++k) target[k] = from_acc<T>(a * to_acc(x[k]) + b * to_acc(y[k]));
}

// target = b y.
template <class T, class Q>
void scaled(T* target, Acc<T> b, const Q* y, int64_t columns) {
  using C = Acc<T>;
  int64_t k = 0;
  for (; k + kLanes<C> <= columns; k += kLanes<C>) store(target + k, b * load(y + k));
  for (; k < columns; ++k) target[k] = from_acc<T>(b * to_acc(y[k]));
}

template <class C>
void softmax(C* values, int64_t count) {
  C largest = values[0], sum = 0;
  for (int64_t i = 1; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = exponential(values[i] - largest);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
}

// The rows of one m: of every adapter's output, of the query, of the weights.
template <class T, class Q>
struct Rows {
  Rows(const FusionProblem& problem, void* memory)
      : problem(problem),
        outputs(static_cast<const T**>(memory)),
        logits_grad(reinterpret_cast<Acc<T>*>(outputs + problem.adapters)) {}

  void go_to(int64_t row) {
    for (int64_t i = 0; i < problem.adapters; ++i) {
      outputs[i] = static_cast<const T*>(problem.outputs[i]) + row * problem.output_strides[i];
    }
    query = static_cast<const Q*>(problem.query) + row * problem.query_stride;
    weights = static_cast<Acc<T>*>(problem.weights) + row * problem.adapters;
  }

  const FusionProblem& problem;
  const T** outputs;
  Acc<T>* logits_grad;
  const Q* query;
  Acc<T>* weights;
};

template <class T, class Q>
void forward_rows(const FusionProblem& problem, void* mix, int64_t begin, int64_t end, void* memory) {
  const int64_t adapters = problem.adapters, columns = problem.columns;
  const auto scale = static_cast<Acc<T>>(problem.scale);
  Rows<T, Q> rows(problem, memory);
  for (int64_t row = begin; row < end; ++row) {
    rows.go_to(row);
    for (int64_t i = 0; i < adapters; ++i) rows.weights[i] = scale * dot(rows.query, rows.outputs[i], columns);
    softmax(rows.weights, adapters);
    combine(static_cast<T*>(mix) + row * columns, false, rows.outputs, rows.weights, adapters, columns);
  }
}

template <class T, class Q>
void differentiate_logits(Rows<T, Q>& rows, const T* grad_mix, const Acc<T>* grad_weights) {
  using C = Acc<T>;
  const int64_t adapters = rows.problem.adapters;
  C mean = 0;
  for (int64_t i = 0; i < adapters; ++i) {
    C grad = grad_weights ? grad_weights[i] : C(0);
    if (grad_mix) grad += dot(grad_mix, rows.outputs[i], rows.problem.columns);
    rows.logits_grad[i] = grad;
    mean += rows.weights[i] * grad;
  }
  const auto scale = static_cast<C>(rows.problem.scale);
  for (int64_t i = 0; i < adapters; ++i) rows.logits_grad[i] = scale * rows.weights[i] * (rows.logits_grad[i] - mean);
}

template <class T, class Q>
void add_query_grad(const Rows<T, Q>& rows, void* grad_query, int64_t row) {
  const int64_t adapters = rows.problem.adapters, columns = rows.problem.columns;
  if (rows.problem.one_query) {
    combine(static_cast<Acc<T>*>(grad_query), true, rows.outputs, rows.logits_grad, adapters, columns);
  } else {
    combine(static_cast<Q*>(grad_query) + row * columns, false, rows.outputs, rows.logits_grad, adapters, columns);
  }
}

template <class T, class Q>
void backward_rows(const FusionProblem& problem, const FusionGradients& grads, int64_t begin, int64_t end,
                   void* memory) {
  const int64_t adapters = problem.adapters, columns = problem.columns;
  Rows<T, Q> rows(problem, memory);
  for (int64_t row = begin; row < end; ++row) {
    rows.go_to(row);
    const T* grad_mix = grads.grad_mix ? static_cast<const T*>(grads.grad_mix) + row * grads.grad_mix_stride : nullptr;
    const auto* grad_weights =
        grads.grad_weights ? static_cast<const Acc<T>*>(grads.grad_weights) + row * adapters : nullptr;
    differentiate_logits(rows, grad_mix, grad_weights);
    if (grads.grad_query) add_query_grad(rows, grads.grad_query, row);
    for (int64_t i = 0; i < adapters; ++i) {
      if (!grads.grad_outputs[i]) continue;
      T* target = static_cast<T*>(grads.grad_outputs[i]) + row * columns;
      if (grad_mix) {
        blend(target, rows.weights[i], grad_mix, rows.logits_grad[i], rows.query, columns);
      } else {
        scaled(target, rows.logits_grad[i], rows.query, columns);
      }
    }
  }
}

template <class T>
void forward(const FusionProblem& problem, void* mix, int64_t begin, int64_t end, void* memory) {
  if (problem.wide_query) {
    forward_rows<T, Acc<T>>(problem, mix, begin, end, memory);
  } else {
    forward_rows<T, T>(problem, mix, begin, end, memory);
  }
}

template <class T>
void backward(const FusionProblem& problem, const FusionGradients& grads, int64_t begin, int64_t end, void* memory) {
  if (problem.wide_query) {
    backward_rows<T, Acc<T>>(problem, grads, begin, end, memory);
  } else {
    backward_rows<T, T>(problem, grads, begin, end, memory);
  }
}

template <class T>
constexpr FusionKernels kernels() {
  return {forward<T>, backward<T>};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const FusionKernels fusion_kernels[kNumStorages];
const FusionKernels fusion_kernels[kNumStorages] = {kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                                                    kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
