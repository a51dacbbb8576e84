// What the host hands to the kernels of kron_linear, of the factored order and of the product on AMX: raw pointers and
// sizes.
//
//   forward   z[m,p,:] = x[m,p,:] S,  w[m,q,:] = sum_p mix[p,q,:] . z[m,p,:],  y[m,q,:] = w[m,q,:] T + bias[q,:]
//   backward  gw = grad_y T^T,  gz[m,p,:] = sum_q mix[p,q,:] . gw[m,q,:],  grad_x = gz S^T,
//             grad_S = x^T gz,  grad_mix[p,q,:] = sum_m z[m,p,:] . gw[m,q,:],  grad_T = w^T grad_y
//
// where . is elementwise, S = [s_1 .. s_n] and T = [t_1; ..; t_n] hold all terms' factors side by side, and
// mix[p,q,(i,k)] = scaling A_i[p,q] for every k of the rank.
//
// Shapes    x, grad_x [rows, a_in, b_in]; y, grad_y [rows, a_out, b_out]; inner = n * rank.
// Factors   s [b_in, inner] and t [inner, b_out], and their transposes s_t and t_t.
// Layout    rows are contiguous, with a row stride; x, y and their gradients are of the storage type,
//           everything else of the accumulation type (float; double for float64 storage).
// Work      a call serves the rows [begin, end), in blocks that stay in the second-level cache: x and grad_y are
//           read once from memory, and neither z nor w leaves the cache. The host splits the rows over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "tiles.h"

namespace peft_ext {

struct KronProblem {
  bool widen;     // Whether the storage type is narrower than the accumulation type.
  int64_t block;  // Rows that are worked on at a time.
  int64_t a_in, a_out, b_in, b_out, inner;
  const void* mix;
  const void* s_t;
  const void* s;
  const void* t;
  const void* t_t;
  const void* x;
  int64_t x_stride;
};

struct KronForward : KronProblem {
  const void* bias;  // [a_out, b_out], or null.
  void* y;
  int64_t y_stride;
};

struct KronBackward : KronProblem {
  const void* grad_y;
  int64_t grad_y_stride;
  void* grad_x;  // Null where it is not needed, as are the gradients below.
  int64_t grad_x_stride;
};

// Of one call: grad_mix [a_in, a_out, inner], grad_s_t [inner, b_in], grad_t [inner, b_out], written, not added to.
struct KronFactorGrads {
  void* mix;
  void* s_t;
  void* t;
};

// y = x H + bias, H as a right operand on AMX (amx.h), cut into kKronProductParts: more than the rounding of y leaves.
constexpr int64_t kKronProductParts = 2;

struct KronProductPacking {
  const void* product;  // [in, out], without gaps.
  int64_t in, out;
  void* tiles;

  // In bfloat16 values.
  int64_t elements() const { return padded(out, kTileOuts) * padded(in, kTileInner) * kKronProductParts; }
};

struct KronProduct {
  int64_t in, out;
  int64_t block;  // Rows that are worked on at a time.
  const void* tiles;
  const void* bias;  // [out], or null.
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;

  // Of workspace for a call, in bfloat16 values.
  int64_t elements() const { return block * padded(in, kTileInner); }
};

// The gradient of H: sum over rows of left^T right. Both are bfloat16, whose products are exact.
struct KronProductGrad {
  int64_t rows;
  const void* left;
  int64_t left_stride, left_columns;
  const void* right;
  int64_t right_stride, right_columns;

  static constexpr int64_t kBlock = kTileMostRows, kPanel = 256;  // Columns of right that are worked on at a time.
  int64_t height() const { return padded(left_columns, kTileInner); }
  int64_t width() const { return padded(right_columns, kTileInner); }
  int64_t elements() const { return kBlock * (height() + kPanel + std::max(height(), kPanel)); }
};

struct KronKernels {
  void (*forward)(const KronForward&, int64_t begin, int64_t end, void* workspace);
  void (*backward)(const KronBackward&, const KronFactorGrads&, int64_t begin, int64_t end, void* workspace);
  // Of bfloat16; null where there is no AMX.
  void (*pack_product)(const KronProductPacking&);
  void (*multiply_product)(const KronProduct&, int64_t begin, int64_t end, void* workspace);
  // Writes the columns [begin, end) of total [height, width].
  void (*product_grad)(const KronProductGrad&, int64_t begin, int64_t end, void* total, void* workspace);
};

// Accumulation-type elements of workspace that one call needs: blocks of x and grad_y where they have to be widened,
// of z and w, and of their gradients.
struct KronWorkspace {
  explicit KronWorkspace(const KronProblem& problem)
      : x(problem.widen ? problem.block * problem.a_in * problem.b_in : 0),
        grad_y(problem.widen ? problem.block * problem.a_out * problem.b_out : 0),
        z(problem.block * problem.a_in * problem.inner),
        w(problem.block * problem.a_out * problem.inner) {}

  int64_t elements() const { return x + grad_y + 2 * z + 2 * w; }

  int64_t x, grad_y, z, w;
};

}  // namespace peft_ext
