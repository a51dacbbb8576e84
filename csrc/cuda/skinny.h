// The low-rank products of the LoRA ops on the device, for one adapter or for many mixed in one batch.
//
//   project   hidden[m, j] = s_a f_a sum_k drop_a(x)[m, k] F_a(j, k)             x [M, K] -> hidden [M, ranks]
//   expand    y[m, n]     += mask_a sum_j hidden[m, j] F_a(j, n)                 hidden -> y [M, N]
//   sum_rows  G_a(j, k)    = sum_m hidden[m, j] drop_a(x)[m, k]                  hidden, x -> G_a
//
// Adapters  a = index[m / span], -1 for none; without an index, adapter 0 in all rows. F_a(j, k) is a factor of `rank`
//           rows, F [rank, K], or of `rank` columns, F [K, rank] (Along::kColumns); so is G_a.
// Types     x and y are of the storage type T, factors and their gradients of T or of the accumulation type, hidden
//           and all sums of the accumulation type: float, or double for double.
// Dropout   (dropout.h) zeroes elements of x; its scale f_a goes with s_a, so that a masked x is exact.
// Order     of summation: by the sizes alone. sum_rows cuts the rows into chunks, whose sums are added in order.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace peft_ext::cuda {

// Which adapter serves a row, and by how much.
struct Mix {
  at::Tensor index;     // int64, contiguous, one for each `span` rows; undefined: adapter 0 in all rows.
  at::Tensor scalings;  // float64, one an adapter; undefined: `scaling`.
  double scaling = 1.0;
  at::ArrayRef<double> dropout_p;  // One an adapter, or none.
  std::optional<at::Tensor> seed;
};

// Where the ranks of a factor lie.
enum class Along { kRows, kColumns };

enum class Masked { kNo, kYes };

// What to do with what y held.
enum class Into { kAdd, kOverwrite };

// The factors as the kernels take them: contiguous, all of one type that goes with x.
std::vector<at::Tensor> readable_factors(at::TensorList factors, at::ScalarType x_type);

// x [M, K] with contiguous rows -> [M, largest rank]. Rows without an adapter, and ranks that theirs does not have,
// are left as they are in memory.
at::Tensor project(const at::Tensor& x, at::TensorList factors, Along along, const Mix& mix, Masked masked);

// y [M, N] has contiguous rows. Into::kOverwrite begins with the bias, or with 0.
void expand(const at::Tensor& y, const at::Tensor& hidden, at::TensorList factors, Along along, const Mix& mix,
            Masked masked, Into into, const std::optional<at::Tensor>& bias = std::nullopt);

// Fills the gradients that are defined, contiguous like their factors.
void sum_rows(at::TensorList grads, at::TensorList factors, const at::Tensor& hidden, const at::Tensor& x, Along along,
              const Mix& mix, Masked masked);

}  // namespace peft_ext::cuda
