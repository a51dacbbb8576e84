// The update s B A in the form that the merge kernels take, shared by lora_merge_ and lora_unmerge_.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"

namespace peft_ext {

inline bool is_transposed(const at::Tensor& weight) {
  return weight.stride(0) == 1 && weight.stride(1) != 1;
}

// The weight as its memory lies: rows are contiguous. A weight with other strides is worked on in a copy.
inline at::Tensor physical_matrix(const at::Tensor& weight) {
  if (is_transposed(weight)) return weight.t();
  return weight.stride(1) == 1 ? weight : weight.contiguous();
}

// W += left right on the physical matrix.
struct LoraDelta {
  LoraDelta(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling) {
    const auto type = acc_type(weight.scalar_type());
    const at::Tensor a = lora_A.to(type), b = lora_B.to(type).mul(scaling);
    left = is_transposed(weight) ? a.t() : b;
    right = (is_transposed(weight) ? b.t() : a).contiguous();
  }

  LoraMerge problem(const at::Tensor& matrix, const at::Tensor& residual) const {
    return {matrix.data_ptr(), matrix.stride(0),       matrix.size(1), left.const_data_ptr(),      left.stride(0),
            left.stride(1),    right.const_data_ptr(), left.size(1),   residual.data_ptr<int8_t>()};
  }

  at::Tensor left;   // [rows, rank]
  at::Tensor right;  // [rank, columns]
};

// Outliers are in W's row-major order, whatever its strides; the kernels go by the rows of the physical matrix. Where
// these are W's columns, the i-th outlier of W is the kernels' order[i]-th.
inline at::Tensor order_of_outliers(const at::Tensor& transposed_residual, int64_t outliers) {
  const int64_t rows = transposed_residual.size(0), columns = transposed_residual.size(1);
  const auto* begin = transposed_residual.const_data_ptr<int8_t>();
  const auto* end = begin + rows * columns;
  const at::Tensor places = at::empty({outliers}, at::kLong);
  auto* place = places.data_ptr<int64_t>();
  const auto* next = begin;
  for (int64_t i = 0; i < outliers; ++i, ++next) {
    next = static_cast<const int8_t*>(std::memchr(next, static_cast<uint8_t>(kOutlier), end - next));
    const int64_t at = next - begin;
    place[i] = at % columns * rows + at / columns;
  }
  return at::argsort(places);
}

// Outliers are gathered task by task: the rows of a task are a fixed number, whatever the threads.
constexpr int64_t kMergeRowsPerTask = 64;

}  // namespace peft_ext
