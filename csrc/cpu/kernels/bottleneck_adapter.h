// What the host hands to the bottleneck adapter's kernels: raw pointers and sizes.
//
//   forward   y = r x + s (act(N(x) D^T + b) U^T + c)               norm "none" (N(x) = x) or "pre"
//             y = r x + N(s (act(x D^T + b) U^T + c)) * w + v       norm "post"
//             with r 1 or 0, and N(x) the rows less their mean, over their deviation.
//   backward  the gradients of x, D, b, (U, c), w and v: see BottleneckGrads.
//
// Shapes    x, y and their gradients [rows, features]; D [width, features], U [features, width]. A pre-norm's
//           weight and bias are folded into D and b by the host: here it only normalises.
// Factors   down, up where they lie; down_t [features, width] and up_t [width + 1, features] transposed by the
//           host, the latter with c as its last row: the hidden rows end with a 1 that multiplies it.
// Layout    rows are contiguous, x and grad_y with a row stride; these four are of the storage type, all else of
//           the accumulation type (float; double for float64 storage).
// Work      a call serves the rows [begin, end) in blocks that stay in the second-level cache: x and grad_y are
//           read once from memory, and the hidden block never leaves the cache. The backward computes it anew.
#pragma once

#include <cstdint>

#include "activation.h"
#include "isa.h"

namespace peft_ext {

enum class NormPlace { kNone, kPre, kPost };

struct BottleneckProblem {
  Activation activation;
  NormPlace norm;
  bool residual;
  bool widen;     // Whether the storage type is narrower than the accumulation type.
  int64_t block;  // Rows that are worked on at a time.
  int64_t features;
  int64_t width;
  int64_t hidden_stride;  // width + 1, rounded up to whole vectors.
  double scaling;
  double eps;
  const void* down_t;
  const void* down_bias;  // [hidden_stride]
  const void* up_t;
  const void* norm_weight;  // Of a post-norm.
  const void* norm_bias;
  const void* x;
  int64_t x_stride;
};

struct BottleneckForward : BottleneckProblem {
  void* y;
};

struct BottleneckBackward : BottleneckProblem {
  const void* down;
  const void* up;
  const void* grad_y;
  int64_t grad_y_stride;
  void* grad_x;  // Null where it is not asked for.
  bool needs_down;
  bool needs_down_bias;
  bool needs_up;
};

// Where one chunk's sums of the parameters' gradients lie in its buffer, in elements.
struct BottleneckGrads {
  explicit BottleneckGrads(const BottleneckProblem& problem)
      : up_t(0),
        down(up_t + (problem.width + 1) * problem.features),
        down_bias(down + problem.width * problem.features),
        norm_weight(down_bias + problem.hidden_stride),
        norm_bias(norm_weight + problem.features),
        elements(norm_bias + problem.features) {}

  int64_t up_t;  // [width + 1, features], of U^T and c
  int64_t down, down_bias, norm_weight, norm_bias, elements;
};

// Accumulation-type elements of workspace that one call needs.
struct BottleneckWorkspace {
  explicit BottleneckWorkspace(const BottleneckProblem& problem)
      : rows(problem.block * problem.features), hidden(problem.block * problem.hidden_stride) {}

  int64_t elements() const { return 3 * rows + 3 * hidden; }

  int64_t rows, hidden;
};

struct BottleneckKernels {
  void (*forward)(const BottleneckForward&, int64_t begin, int64_t end, void* workspace);
  // Writes the sums over its rows to `grads`, laid out as BottleneckGrads says; those not asked for stay as they were.
  void (*backward)(const BottleneckBackward&, int64_t begin, int64_t end, void* grads, void* workspace);
  // target [columns, rows] = source [rows, columns]^T.
  void (*transpose)(const void* source, int64_t rows, int64_t columns, void* target);
};

}  // namespace peft_ext
