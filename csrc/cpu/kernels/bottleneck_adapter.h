// What the host hands to the bottleneck adapter's kernels: raw pointers and sizes.
//
//   forward   y = r x + s (act(N(x) D^T + b) U^T + c)               norm "none" (N(x) = x) or "pre"
//             y = r x + N(s (act(x D^T + b) U^T + c)) * w + v       norm "post"
//             with r 1 or 0, and N(x) the rows less their mean, over their deviation.
//   backward  the gradients of x, D, b, (U, c), w and v: see BottleneckGrads.
//
// Shapes    x, y and their gradients [rows, features]; D [width, features], U [features, width]. A pre-norm's
//           weight and bias are folded into D and b by the host: here it only normalises.
// Factors   D and U as they lie serve the backward's products. The forward's read transposes: down_t [features, width]
//           and up_t [width + 1, features], the latter with c as its last row, which a 1 at the end of each hidden
//           row multiplies. Where they are null (few rows, whose result is smaller than they are), a panel at a time
//           is transposed into the workspace.
//           On AMX, without a norm, tiles of D^T and U^T, of U and D serve instead (tiles.h), and s c apart.
// Layout    rows are contiguous, x and grad_y with a row stride; these four are of the storage type, all else but
//           factors that are packed into tiles of the accumulation type (float; double for float64 storage).
// Work      a call serves the rows [begin, end) in blocks that stay in the second-level cache: x and grad_y are
//           read once from memory. The forward hands out x D^T + b, from which the backward starts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "isa.h"
#include "tiles.h"

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
  int64_t hidden_stride;  // Of a block's hidden rows: width + 1, rounded up to whole vectors.
  double scaling;
  double eps;
  const void* down;
  const void* down_bias;  // Null without one.
  const void* up;
  const void* up_bias;  // Null without one; in the forward by tiles times the scaling.
  const void* down_t;
  const void* up_t;
  int parts;                // Of the factors' values in tiles; 0: no tiles.
  const void* norm_weight;  // Of a post-norm.
  const void* norm_bias;
  const void* x;
  int64_t x_stride;
};

struct BottleneckForward : BottleneckProblem {
  void* y;
  void* hidden;  // [rows, width], x D^T + b; null where it is not asked for.
  const void* down_t_tiles;
  const void* up_t_tiles;
};

struct BottleneckBackward : BottleneckProblem {
  const void* hidden;
  const void* grad_y;
  int64_t grad_y_stride;
  void* grad_x;  // Null where it is not asked for.
  const void* up_tiles;
  const void* down_tiles;
};

// One chunk's sums of the parameters' gradients, shaped like these; null where they are not asked for.
struct BottleneckGrads {
  void* down;
  void* down_bias;
  void* up;
  void* up_bias;
  void* norm_weight;
  void* norm_bias;
};

// Accumulation-type elements of workspace that one call needs; which of the full rows depends on dtype and norm.
struct BottleneckWorkspace {
  BottleneckWorkspace(const BottleneckProblem& problem, bool backward)
      : x(problem.widen || problem.norm == NormPlace::kPre ? problem.block * problem.features : 0),
        full(problem.norm != NormPlace::kNone ? problem.block * problem.features : 0),
        grad_y(backward && (problem.widen || problem.norm == NormPlace::kPost) ? problem.block * problem.features : 0),
        hidden(problem.block * problem.hidden_stride),
        derivative(backward ? hidden : 0),
        grad_hidden(backward ? hidden : 0),
        panel(problem.parts || problem.up_t || (backward && problem.norm != NormPlace::kPost)
                  ? 0
                  : panel_lines(problem.width) * (problem.width + 1)) {
    if (!problem.parts) return;
    // Values of bfloat16, two in a float.
    const int64_t rows = padded(problem.block, kTileInner), terms = problem.width * TileTerms(problem.parts).count;
    x = rows * padded(problem.features, kTileInner) / 2;
    if (backward) grad_y = x;
    left = std::max(rows * padded(terms, kTileInner),
                    padded(outer_parts(problem.parts) * problem.width, kTileRows) * rows) /
           2;
    products = rows * padded(problem.parts * problem.width, kTileOuts);
    if (backward) up_t = problem.width * problem.features;
  }

  // Lines of a transposed factor that stay in the first-level cache beside what they are multiplied with.
  static int64_t panel_lines(int64_t width) {
    constexpr int64_t kElements = 8192, kVectors = 64;
    const int64_t lines = kElements / width / kVectors * kVectors;
    return lines < kVectors ? kVectors : lines;
  }

  int64_t elements() const {
    return x + full + grad_y + hidden + derivative + grad_hidden + panel + left + products + up_t;
  }

  int64_t x, full, grad_y, hidden, derivative, grad_hidden, panel;
  int64_t left = 0, products = 0;  // Operands and results of tiles,
  int64_t up_t = 0;                // and the transposed gradient of U.
};

struct BottleneckKernels {
  void (*forward)(const BottleneckForward&, int64_t begin, int64_t end, void* workspace);
  // Writes the sums over its rows.
  void (*backward)(const BottleneckBackward&, int64_t begin, int64_t end, const BottleneckGrads& sums, void* workspace);
  // Transposes the factors into down_t and up_t.
  void (*pack)(const BottleneckProblem&, void* down_t, void* up_t);
};

}  // namespace peft_ext
