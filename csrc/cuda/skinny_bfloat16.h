// The products of skinny.h for one adapter and many rows of bfloat16, on tensor cores.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cuda/dropout.h"
#include "cuda/skinny.h"

namespace peft_ext::cuda::bfloat16 {

// From how many rows on these are faster than the kernels for every type.
constexpr int64_t kFewestRows = 256;

// Whether x and y can be read and written by vectors, whole ones: nothing else is served.
bool can_be_read(const at::Tensor& matrix);

// [M, rank] within rows that are a multiple of sixteen long, zeros behind the rank: what the other two read.
at::Tensor project(const at::Tensor& x, const at::Tensor& factor, Along along, const DeviceDropout& dropout,
                   double scaling);

void expand(const at::Tensor& y, const at::Tensor& hidden, const at::Tensor& factor, Along along,
            const DeviceDropout& dropout, Into into, const std::optional<at::Tensor>& bias);

// [chunks, rank, columns]: the sums of chunks of the rows, which are to be added in order.
at::Tensor sum_rows(const at::Tensor& hidden, const at::Tensor& x, const DeviceDropout& dropout);

}  // namespace peft_ext::cuda::bfloat16
