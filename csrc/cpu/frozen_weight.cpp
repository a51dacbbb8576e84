// Quantized: few rows, as in decoding, go to the kernel that reads the values once, and W never exists
// (kernels/quantized_linear.h). For many rows, panels of W are dequantized into memory that stays in the cache, one
// after the other, and multiplied by ATen; a panel is rows of W for y and columns of W for grad_x, so that each element
// of the result is written once.
#include "cpu/frozen_weight.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "common/checks.h"
#include "common/quantized_checks.h"
#include "common/tensors.h"
#include "cpu/kernels.h"

namespace peft_ext {
namespace {

static_assert(kPackedBlock == kColumnsPerBlock);

// Elements of a panel: large enough for the product to be as fast as that of the whole weight.
constexpr int64_t kPanelElements = 1024 * 1024;
constexpr int64_t kGrain = 32 * 1024;  // Values that are worth a thread.

// A quantized weight for the kernels, which need it contiguous.
struct Quantized {
  Quantized(const at::Tensor& weight, const at::Tensor& weight_scale)
      : values(weight.contiguous()), scale(weight_scale.contiguous()) {}

  int64_t rows() const { return values.size(0); }
  int64_t columns() const { return in_features_of(values); }
  QuantizedWeight view() const {
    return {values.const_data_ptr(), is_packed(values), columns(), scale.const_data_ptr<float>(), scale.size(1)};
  }

  const at::Tensor values, scale;
};

// The first `rows` of panel [., columns] hold W from (row, column) on.
at::Tensor dequantized(const Quantized& weight, const at::Tensor& panel, int64_t row, int64_t rows, int64_t column,
                       int64_t columns) {
  const QuantizedWeight view = weight.view();
  const at::Tensor target = panel.narrow(0, 0, rows * columns).view({rows, columns});
  const auto& kernels = quantized_kernels(target.scalar_type());
  auto* memory = static_cast<char*>(target.data_ptr());
  const int64_t row_bytes = columns * target.element_size();
  at::parallel_for(0, rows, kGrain / columns + 1, [&](int64_t begin, int64_t end) {
    kernels.dequantize(view, {row + begin, row + end, column, column + columns, memory + begin * row_bytes, columns});
  });
  return target;
}

at::Tensor panel_of(const at::Tensor& like, int64_t length, int64_t count) {
  return at::empty({length * count}, like.options());
}

void few_rows_product(const at::Tensor& y, const at::Tensor& rows, const Quantized& weight,
                      const std::optional<at::Tensor>& bias) {
  at::Tensor x = as_type(rows, at::kFloat);
  const int64_t missing = (kQuantizedPadding - x.size(1) % kQuantizedPadding) % kQuantizedPadding;
  if (missing != 0) x = at::constant_pad_nd(x, {0, missing});
  const at::Tensor offset = undefined_or(bias, at::kFloat);
  const QuantizedProduct problem{weight.view(),
                                 x.size(0),
                                 x.const_data_ptr<float>(),
                                 x.stride(0),
                                 static_cast<const float*>(data_or_null(offset)),
                                 y.data_ptr(),
                                 y.stride(0)};
  const auto& kernels = quantized_kernels(y.scalar_type());
  at::parallel_for(0, weight.rows(), kGrain / std::max<int64_t>(weight.columns() * x.size(0), 1) + 1,
                   [&](int64_t begin, int64_t end) { kernels.product(problem, begin, end); });
}

void many_rows_product(const at::Tensor& y, const at::Tensor& rows, const Quantized& weight,
                       const std::optional<at::Tensor>& bias) {
  const int64_t n = weight.rows(), k = weight.columns();
  const int64_t width = std::min(n, std::max<int64_t>(kPanelElements / k, 64));
  const at::Tensor panel = panel_of(y, k, width);
  for (int64_t begin = 0; begin < n; begin += width) {
    const int64_t count = std::min(width, n - begin);
    const at::Tensor part = dequantized(weight, panel, begin, count, 0, k);
    at::Tensor target = y.narrow(1, begin, count);
    bias ? at::addmm_out(target, bias->narrow(0, begin, count), rows, part.t()) : at::mm_out(target, rows, part.t());
  }
}

at::Tensor quantized_product(const at::Tensor& rows, const Quantized& weight, const std::optional<at::Tensor>& bias) {
  const at::Tensor y = at::empty({rows.size(0), weight.rows()}, rows.options());
  if (weight.columns() == 0) {
    bias ? y.copy_(*bias) : y.zero_();
  } else if (y.numel() != 0 && rows.size(0) <= kQuantizedFewRows && rows.scalar_type() != at::kDouble) {
    few_rows_product(y, rows, weight, bias);
  } else if (y.numel() != 0) {
    many_rows_product(y, rows, weight, bias);
  }
  return y;
}

at::Tensor quantized_product_backward(const at::Tensor& grad_rows, const Quantized& weight) {
  const int64_t n = weight.rows(), k = weight.columns();
  if (n == 0) return at::zeros({grad_rows.size(0), k}, grad_rows.options());
  const at::Tensor grad_x = at::empty({grad_rows.size(0), k}, grad_rows.options());
  const int64_t blocks = std::max<int64_t>(kPanelElements / n / kColumnsPerBlock, 2);
  const int64_t width = std::min(k, blocks * kColumnsPerBlock);
  const at::Tensor panel = panel_of(grad_rows, n, width);
  for (int64_t begin = 0; begin < k; begin += width) {
    const int64_t count = std::min(width, k - begin);
    at::Tensor target = grad_x.narrow(1, begin, count);
    at::mm_out(target, grad_rows, dequantized(weight, panel, 0, n, begin, count));
  }
  return grad_x;
}

// As at::linear, which writes the bias into y in a pass as slow as a fifth of a small product.
at::Tensor dense_product(const at::Tensor& rows, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const at::ScalarType type = rows.scalar_type();
  if (!bias || acc_type(type) != type) return at::linear(rows, weight, bias);
  const at::Tensor y = at::empty({rows.size(0), weight.size(0)}, rows.options()), source = bias->contiguous();
  const int64_t row_bytes = source.numel() * source.element_size();
  auto* to = static_cast<char*>(y.data_ptr());
  at::parallel_for(0, rows.size(0), kGrain / std::max<int64_t>(source.numel(), 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * row_bytes, source.const_data_ptr(), row_bytes);
  });
  add_product(y, rows, weight.t());
  return y;
}

}  // namespace

void add_product(const at::Tensor& y, const at::Tensor& left, const at::Tensor& right) {
  at::Tensor target = y;
  at::addmm_out(target, y, left, right);
}

at::Tensor FrozenWeight::product(const at::Tensor& rows, const std::optional<at::Tensor>& bias) const {
  if (!is_quantized()) return dense_product(rows, weight, bias);
  return quantized_product(rows, Quantized(weight, *weight_scale), bias);
}

at::Tensor FrozenWeight::product_backward(const at::Tensor& grad_rows) const {
  if (!is_quantized()) return at::mm(grad_rows, weight);
  return quantized_product_backward(grad_rows, Quantized(weight, *weight_scale));
}

}  // namespace peft_ext
