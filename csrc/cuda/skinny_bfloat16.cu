// project, expand and sum_rows (formulas and shapes: skinny.h) for one adapter and bfloat16 x and y, on tensor cores.
//
// Types     Products of bfloat16 are exact and are summed in float. A float factor, and hidden, go in as the sum of two
//           bfloat16 values, high + low, whose error is below 2**-16; the product of two low ones is left out.
// Tiles     A warp takes 32 rows, 64 columns and 16 or 32 ranks at a time. It reads the next tile while it works on
//           one, sixteen bytes a lane, so that the loads of a tile are all on their way at once; dropout is applied
//           between memory and shared memory.
// project   A block has 32 rows; its warps take slabs of 64 columns in turn, and their sums are added in order.
// expand    A block has 256 rows, 32 a warp, and 64 columns, whose factor its warps share.
// sum_rows  A block has 64 columns and a chunk of the rows; its warps take 32 rows in turn, sums added in order.
#include "cuda/skinny_bfloat16.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <cuda_bf16.h>
#include <mma.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace peft_ext::cuda::bfloat16 {
namespace {

namespace wmma = nvcuda::wmma;
using Element = __nv_bfloat16;

constexpr int kStep = 16;  // Edge of a product of tensor cores.
constexpr int kVector = 8, kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kRows = 32, kColumns = 64;
constexpr int kPad = 8;  // Behind each line of a tile, so that lines lie in different banks.

// Lines of neighbouring elements, a multiple of eight of them, that can be read by vectors; it is not empty.
struct Matrix {
  const void* data;
  int64_t stride, lines, columns;
};

struct Drop {
  uint64_t seed;
  uint32_t threshold;
};

// kLines x kAcross elements on their way from memory to shared memory: a lane holds pieces of eight neighbours. Loads
// beyond the matrix read its last line or column in their place, and store puts zeros there: a branch between loads
// would have each of them wait for the one before.
template <class S, int kLines, int kAcross>
class Tile {
 public:
  __device__ void load(const Matrix& matrix, int64_t line, int64_t column) {
    lines_left_ = matrix.lines - line;
    inside_ = column + column_of() < matrix.columns;
    const S* data = static_cast<const S*>(matrix.data) + min(column + column_of(), matrix.columns - kVector);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      pieces_[i] = *reinterpret_cast<const Piece*>(data + min(line + line_of(i), matrix.lines - 1) * matrix.stride);
    }
  }

  __device__ void drop(const Drop& dropout, int64_t line, int64_t column) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t keep = keep_bits(dropout.seed, dropout.threshold, line + line_of(i),
                                      static_cast<uint32_t>((column + column_of()) / kColumnsPerBlock));
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (!(keep >> j & 1)) pieces_[i].values[j] = S(0.0f);
      }
    }
  }

  // high [kLines, kAcross + kPad]; low, of the same shape, is what rounding left, and only of a float S.
  __device__ void store(Element* high, Element* low) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int place = line_of(i) * (kAcross + kPad) + column_of();
      Rounded first, second;
      const bool inside = inside_ && line_of(i) < lines_left_;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float value = inside ? static_cast<float>(pieces_[i].values[j]) : 0.0f;
        first.values[j] = static_cast<c10::BFloat16>(value);
        second.values[j] = static_cast<c10::BFloat16>(value - static_cast<float>(first.values[j]));
      }
      *reinterpret_cast<Rounded*>(high + place) = first;
      if constexpr (std::is_same_v<S, float>) *reinterpret_cast<Rounded*>(low + place) = second;
    }
  }

 private:
  static constexpr int kLanesAcross = kAcross / kVector, kAtOnce = kWarp / kLanesAcross, kPieces = kLines / kAtOnce;
  static_assert(kAcross % kVector == 0 && kWarp % kLanesAcross == 0 && kLines % kAtOnce == 0);
  struct alignas(kVectorBytes) Piece {
    S values[kVector];
  };
  struct alignas(kVectorBytes) Rounded {
    c10::BFloat16 values[kVector];
  };

  __device__ static int line_of(int piece) {
    return static_cast<int>(threadIdx.x) % kWarp / kLanesAcross + piece * kAtOnce;
  }
  __device__ static int column_of() { return static_cast<int>(threadIdx.x) % kLanesAcross * kVector; }

  Piece pieces_[kPieces];
  int64_t lines_left_;
  bool inside_;  // Its columns.
};

template <class F>
constexpr int kParts = std::is_same_v<F, float> ? 2 : 1;  // High and low, or high alone.

using Sums = wmma::fragment<wmma::accumulator, kStep, kStep, kStep, float>;
template <class Layout>
using Left = wmma::fragment<wmma::matrix_a, kStep, kStep, kStep, Element, Layout>;
template <class Layout>
using Right = wmma::fragment<wmma::matrix_b, kStep, kStep, kStep, Element, Layout>;

template <int kDown, int kAcross>
__device__ inline void clear(Sums (&sums)[kDown][kAcross]) {
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
#pragma unroll
    for (int j = 0; j < kAcross; ++j) wmma::fill_fragment(sums[i][j], 0.0f);
  }
}

constexpr int kSumPad = 4;  // Behind each line of floats in shared memory.

// The warps' sums, [kLines, kAcross] each, added in order: calls finish(line, column, sum) for every element.
template <int kLines, int kAcross, class Finish>
__device__ inline void add_warps(float* shared, const Sums (&sums)[kLines / kStep][kAcross / kStep],
                                 const Finish& finish) {
  constexpr int kPitch = kAcross + kSumPad, kEach = kLines * kPitch;
  __syncthreads();  // The tiles that lie there were read.
#pragma unroll
  for (int i = 0; i < kLines / kStep; ++i) {
#pragma unroll
    for (int j = 0; j < kAcross / kStep; ++j) {
      float* target = shared + threadIdx.x / kWarp * kEach + i * kStep * kPitch + j * kStep;
      wmma::store_matrix_sync(target, sums[i][j], kPitch, wmma::mem_row_major);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kLines * kAcross; i += kThreads) {
    const int line = i / kAcross, column = i % kAcross;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp * kEach + line * kPitch + column];
    finish(line, column, sum);
  }
}

// --- project ---

struct Projection {
  Matrix x, factor;
  float* hidden;
  int64_t hidden_stride;
  double scaling;
  const int64_t* seed;
  uint32_t threshold;
};

// Where the ranks of a factor's tile lie, and what it takes in shared memory.
template <bool kAlongColumns, int kRanks>
struct FactorTile {
  static constexpr int kLines = kAlongColumns ? kColumns : kRanks, kAcross = kAlongColumns ? kRanks : kColumns;
  static constexpr int kPitch = kAcross + kPad, kElements = kLines * kPitch;
};

constexpr int kXPitch = kColumns + kPad, kXElements = kRows * kXPitch;

template <class F, bool kAlongColumns, int kRanks>
__global__ void __launch_bounds__(kThreads) project_tiles(const __grid_constant__ Projection p) {
  using Shape = FactorTile<kAlongColumns, kRanks>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / kWarp;
  Element* x_tile = reinterpret_cast<Element*>(shared) + warp * (kXElements + kParts<F> * Shape::kElements);
  Element *high = x_tile + kXElements, *low = high + Shape::kElements;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows, first_rank = blockIdx.y * kRanks;
  const Drop dropout{p.threshold ? static_cast<uint64_t>(*p.seed) : 0, p.threshold};

  Sums sums[kRows / kStep][kRanks / kStep];
  clear(sums);
  Tile<c10::BFloat16, kRows, kColumns> x;
  Tile<F, Shape::kLines, Shape::kAcross> factor;
  const auto load = [&](int64_t k) {
    if (k >= p.x.columns) return;
    x.load(p.x, first_row, k);
    factor.load(p.factor, kAlongColumns ? k : first_rank, kAlongColumns ? first_rank : k);
  };
  load(warp * kColumns);
#pragma unroll 1
  for (int64_t k = warp * kColumns; k < p.x.columns; k += kWarps * kColumns) {
    if (dropout.threshold) x.drop(dropout, first_row, k);
    x.store(x_tile, nullptr);
    factor.store(high, low);
    __syncwarp();
    load(k + kWarps * kColumns);
#pragma unroll
    for (int step = 0; step < kColumns; step += kStep) {
      Left<wmma::row_major> left[kRows / kStep];
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) {
        wmma::load_matrix_sync(left[i], x_tile + i * kStep * kXPitch + step, kXPitch);
      }
#pragma unroll
      for (int part = 0; part < kParts<F>; ++part) {
#pragma unroll
        for (int j = 0; j < kRanks / kStep; ++j) {
          Right<std::conditional_t<kAlongColumns, wmma::row_major, wmma::col_major>> right;
          const int place = kAlongColumns ? step * Shape::kPitch + j * kStep : j * kStep * Shape::kPitch + step;
          wmma::load_matrix_sync(right, (part ? low : high) + place, Shape::kPitch);
#pragma unroll
          for (int i = 0; i < kRows / kStep; ++i) wmma::mma_sync(sums[i][j], left[i], right, sums[i][j]);
        }
      }
    }
    __syncwarp();
  }
  add_warps<kRows, kRanks>(reinterpret_cast<float*>(shared), sums, [&](int line, int column, float sum) {
    const int64_t row = first_row + line, rank = first_rank + column;
    if (row < p.x.lines && rank < p.hidden_stride) {
      p.hidden[row * p.hidden_stride + rank] = static_cast<float>(p.scaling) * sum;
    }
  });
}

// --- expand ---

struct Expansion {
  Matrix hidden, factor;
  c10::BFloat16* y;
  int64_t y_stride, rows, columns;
  const c10::BFloat16* bias;  // Null for none; read only with `overwrite`.
  bool overwrite, aligned;    // What y held does not count; y may be written by vectors.
  const int64_t* seed;
  uint32_t threshold;
};

template <class F, bool kAlongColumns, int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == kStep ? 2 : 1) expand_tiles(const __grid_constant__ Expansion p) {
  using Shape = FactorTile<kAlongColumns, kRanks>;
  constexpr int kHiddenPitch = kRanks + kPad, kSumPitch = kColumns + kSumPad;
  constexpr int kWarpFloats = std::max(kRows * kHiddenPitch, kStep * kSumPitch);
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* sum_tile = reinterpret_cast<float*>(shared) + warp * kWarpFloats;
  Element *hidden_high = reinterpret_cast<Element*>(sum_tile), *hidden_low = hidden_high + kRows * kHiddenPitch;
  Element* high = reinterpret_cast<Element*>(reinterpret_cast<float*>(shared) + kWarps * kWarpFloats);
  Element* low = high + Shape::kElements;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kColumns;

  Sums sums[kRows / kStep][kColumns / kStep];
  clear(sums);
  Tile<float, kRows, kRanks> hidden;
  Tile<F, Shape::kLines, Shape::kAcross> factor;
#pragma unroll 1
  for (int64_t rank = 0; rank < p.hidden.columns; rank += kRanks) {
    hidden.load(p.hidden, first_row, rank);
    if (warp == 0) factor.load(p.factor, kAlongColumns ? first_column : rank, kAlongColumns ? rank : first_column);
    __syncthreads();  // The tiles of the ranks before were read.
    hidden.store(hidden_high, hidden_low);
    if (warp == 0) factor.store(high, low);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kRanks; step += kStep) {
#pragma unroll
      for (int j = 0; j < kColumns / kStep; ++j) {
        Right<std::conditional_t<kAlongColumns, wmma::col_major, wmma::row_major>> right[kParts<F>];
        const int place = kAlongColumns ? j * kStep * Shape::kPitch + step : step * Shape::kPitch + j * kStep;
#pragma unroll
        for (int part = 0; part < kParts<F>; ++part) {
          wmma::load_matrix_sync(right[part], (part ? low : high) + place, Shape::kPitch);
        }
#pragma unroll
        for (int i = 0; i < kRows / kStep; ++i) {
          Left<wmma::row_major> left;
          wmma::load_matrix_sync(left, hidden_high + i * kStep * kHiddenPitch + step, kHiddenPitch);
#pragma unroll
          for (int part = 0; part < kParts<F>; ++part) wmma::mma_sync(sums[i][j], left, right[part], sums[i][j]);
          wmma::load_matrix_sync(left, hidden_low + i * kStep * kHiddenPitch + step, kHiddenPitch);
          wmma::mma_sync(sums[i][j], left, right[0], sums[i][j]);
        }
      }
    }
  }

  const uint64_t seed = p.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const int64_t column = first_column + lane % (kColumns / kVector) * kVector, left = p.columns - column;
  float bias[kVector] = {};
  if (p.bias && left > 0) load_elements(bias, p.bias + column, left, false);
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    __syncwarp();  // The tile that lies there was read.
#pragma unroll
    for (int j = 0; j < kColumns / kStep; ++j) {
      wmma::store_matrix_sync(sum_tile + j * kStep, sums[i][j], kSumPitch, wmma::mem_row_major);
    }
    __syncwarp();
#pragma unroll
    for (int line = lane / (kColumns / kVector); line < kStep; line += kWarp / (kColumns / kVector)) {
      const int64_t row = first_row + i * kStep + line;
      if (row >= p.rows || left <= 0) continue;
      c10::BFloat16* y = p.y + row * p.y_stride + column;
      float values[kVector];
#pragma unroll
      for (int c = 0; c < kVector; ++c) values[c] = bias[c];
      if (!p.overwrite) load_elements(values, y, left, p.aligned);
      const uint32_t keep =
          p.threshold ? keep_bits(seed, p.threshold, row, static_cast<uint32_t>(column / kColumnsPerBlock)) : ~0u;
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        if (keep >> c & 1) values[c] += sum_tile[line * kSumPitch + column - first_column + c];
      }
      store_elements(y, values, left, p.aligned);
    }
  }
}

// --- sum_rows ---

struct RowSums {
  Matrix hidden, x;
  float* partial;  // [chunks, rank, columns]
  int64_t rank;
  const int64_t* seed;
  uint32_t threshold;
};

template <int kRanks>
__global__ void __launch_bounds__(kThreads) sum_tiles(const __grid_constant__ RowSums p) {
  constexpr int kHiddenPitch = kRanks + kPad, kHiddenElements = kRows * kHiddenPitch;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / kWarp;
  Element* x_tile = reinterpret_cast<Element*>(shared) + warp * (kXElements + 2 * kHiddenElements);
  Element *high = x_tile + kXElements, *low = high + kHiddenElements;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns, first_rank = blockIdx.z * kRanks;
  const int64_t slabs = (p.x.lines + kRows - 1) / kRows;
  const int64_t begin = slabs * blockIdx.y / gridDim.y, end = slabs * (blockIdx.y + 1) / gridDim.y;
  const Drop dropout{p.threshold ? static_cast<uint64_t>(*p.seed) : 0, p.threshold};

  Sums sums[kRanks / kStep][kColumns / kStep];
  clear(sums);
  Tile<c10::BFloat16, kRows, kColumns> x;
  Tile<float, kRows, kRanks> hidden;
  const auto load = [&](int64_t slab) {
    if (slab >= end) return;
    x.load(p.x, slab * kRows, first_column);
    hidden.load(p.hidden, slab * kRows, first_rank);
  };
  load(begin + warp);
#pragma unroll 1
  for (int64_t slab = begin + warp; slab < end; slab += kWarps) {
    if (dropout.threshold) x.drop(dropout, slab * kRows, first_column);
    x.store(x_tile, nullptr);
    hidden.store(high, low);
    __syncwarp();
    load(slab + kWarps);
#pragma unroll
    for (int step = 0; step < kRows; step += kStep) {
      Right<wmma::row_major> right[kColumns / kStep];
#pragma unroll
      for (int j = 0; j < kColumns / kStep; ++j) {
        wmma::load_matrix_sync(right[j], x_tile + step * kXPitch + j * kStep, kXPitch);
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < kRanks / kStep; ++i) {
          Left<wmma::col_major> left;
          wmma::load_matrix_sync(left, (part ? low : high) + step * kHiddenPitch + i * kStep, kHiddenPitch);
#pragma unroll
          for (int j = 0; j < kColumns / kStep; ++j) wmma::mma_sync(sums[i][j], left, right[j], sums[i][j]);
        }
      }
    }
    __syncwarp();
  }
  add_warps<kRanks, kColumns>(reinterpret_cast<float*>(shared), sums, [&](int line, int column, float sum) {
    const int64_t rank = first_rank + line, at = first_column + column;
    if (rank < p.rank && at < p.x.columns) p.partial[(blockIdx.y * p.rank + rank) * p.x.columns + at] = sum;
  });
}

// --- host ---

Matrix matrix_of(const at::Tensor& tensor) {
  TORCH_INTERNAL_ASSERT(can_be_read(tensor));
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.size(0), tensor.size(1)};
}

// With the zeros behind its ranks.
Matrix hidden_of(const at::Tensor& hidden) {
  return {hidden.const_data_ptr(), hidden.stride(0), hidden.size(0), hidden.stride(0)};
}

// The factor, or a copy with zeros behind ranks that are columns but no multiple of eight.
at::Tensor readable(const at::Tensor& factor) {
  if (can_be_read(factor)) return factor;
  const at::Tensor copy = at::zeros({factor.size(0), blocks_for(factor.size(1), kVector) * kVector}, factor.options());
  copy.narrow(1, 0, factor.size(1)).copy_(factor);
  return copy;
}

// Calls work(ranks a tile), a type.
template <class Work>
void dispatch_ranks(int64_t rank, const Work& work) {
  if (rank <= kStep) return work(std::integral_constant<int, kStep>{});
  work(std::integral_constant<int, 2 * kStep>{});
}

// Calls work(F{}, whether the factor's ranks are columns, ranks a tile), all of them types.
template <class Work>
void dispatch_factor(const at::Tensor& factor, Along along, int64_t rank, const Work& work) {
  const auto with_type = [&](auto f) {
    const auto with_ranks = [&](auto along_columns) {
      dispatch_ranks(rank, [&](auto ranks) { work(f, along_columns, ranks); });
    };
    if (along == Along::kColumns) return with_ranks(std::true_type{});
    with_ranks(std::false_type{});
  };
  if (factor.scalar_type() == at::kFloat) return with_type(float{});
  with_type(c10::BFloat16{});
}

constexpr size_t kElementBytes = sizeof(Element), kFloatBytes = sizeof(float);

// Shared memory for tiles of so many elements a warp, or for the sums of the warps, [lines, across] each.
constexpr size_t shared_bytes(int elements, int lines, int across) {
  return kWarps * std::max(elements * kElementBytes, lines * (across + kSumPad) * kFloatBytes);
}
constexpr size_t kMostShared = 99 << 10;  // What a block may have on every device from 8.0 on: that of 8.6 and 8.9.

}  // namespace

bool can_be_read(const at::Tensor& matrix) {
  return is_aligned(matrix, matrix.stride(0), kVector) && matrix.size(1) % kVector == 0;
}

at::Tensor project(const at::Tensor& x, const at::Tensor& factor, Along along, const DeviceDropout& dropout,
                   double scaling) {
  const int64_t rank = factor.size(along == Along::kRows ? 0 : 1), padded = blocks_for(rank, kStep) * kStep;
  const at::Tensor hidden = at::empty({x.size(0), padded}, x.options().dtype(at::kFloat));
  if (hidden.numel() > 0) {
    const at::Tensor source = readable(factor);
    const Projection p{matrix_of(x), matrix_of(source), hidden.data_ptr<float>(), padded,
                       scaling,      dropout.seed,      dropout.threshold};
    dispatch_factor(factor, along, rank, [&](auto f, auto along_columns, auto ranks) {
      using F = decltype(f);
      // 32 ranks of a float factor, in two parts, would not fit into shared memory.
      constexpr int kRanks = std::is_same_v<F, float> ? kStep : static_cast<int>(ranks);
      constexpr int kElements = kXElements + kParts<F> * FactorTile<along_columns, kRanks>::kElements;
      constexpr size_t kShared = shared_bytes(kElements, kRows, kRanks);
      static_assert(kShared <= kMostShared);
      const dim3 grid(grid_size(blocks_for(x.size(0), kRows)), grid_size(blocks_for(rank, kRanks)));
      launch(project_tiles<F, along_columns, kRanks>, grid, dim3(kThreads), kShared, p);
    });
  }
  return hidden.narrow(1, 0, rank);
}

void expand(const at::Tensor& y, const at::Tensor& hidden, const at::Tensor& factor, Along along,
            const DeviceDropout& dropout, Into into, const std::optional<at::Tensor>& bias) {
  const at::Tensor begin = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor source = readable(factor);
  Expansion p{hidden_of(hidden), matrix_of(source), y.data_ptr<c10::BFloat16>(), y.stride(0), y.size(0), y.size(1)};
  p.bias = begin.defined() ? begin.const_data_ptr<c10::BFloat16>() : nullptr;
  p.overwrite = into == Into::kOverwrite;
  p.aligned = is_aligned(y, y.stride(0), kVector);
  p.seed = dropout.seed;
  p.threshold = dropout.threshold;
  dispatch_factor(factor, along, hidden.size(1), [&](auto f, auto along_columns, auto ranks) {
    using F = decltype(f);
    constexpr int kRanks = ranks;
    constexpr int kFactorElements = kParts<F> * FactorTile<along_columns, kRanks>::kElements;
    constexpr size_t kShared =
        shared_bytes(2 * kRows * (kRanks + kPad), kStep, kColumns) + kFactorElements * kElementBytes;
    static_assert(kShared <= kMostShared);
    const dim3 grid(grid_size(blocks_for(y.size(0), kWarps * kRows)), grid_size(blocks_for(y.size(1), kColumns)));
    launch(expand_tiles<F, along_columns, kRanks>, grid, dim3(kThreads), kShared, p);
  });
}

at::Tensor sum_rows(const at::Tensor& hidden, const at::Tensor& x, const DeviceDropout& dropout) {
  constexpr int64_t kBlocks = 264;  // Enough for two on each multiprocessor of an H100.
  const int64_t rank = hidden.size(1), column_blocks = blocks_for(x.size(1), kColumns);
  const int64_t chunks = std::clamp<int64_t>(kBlocks / std::max<int64_t>(column_blocks, 1), 1,
                                             std::max<int64_t>(blocks_for(x.size(0), kWarps * kRows), 1));
  const at::Tensor partial = at::empty({chunks, rank, x.size(1)}, hidden.options());
  if (partial.numel() == 0) return partial;
  const RowSums p{hidden_of(hidden), matrix_of(x), partial.data_ptr<float>(), rank, dropout.seed, dropout.threshold};
  dispatch_ranks(rank, [&](auto ranks) {
    constexpr int kRanks = ranks;
    constexpr size_t kShared = shared_bytes(kXElements + 2 * kRows * (kRanks + kPad), kRanks, kColumns);
    static_assert(kShared <= kMostShared);
    const dim3 grid(grid_size(column_blocks), grid_size(chunks), grid_size(blocks_for(rank, kRanks)));
    launch(sum_tiles<kRanks>, grid, dim3(kThreads), kShared, p);
  });
  return partial;
}

}  // namespace peft_ext::cuda::bfloat16
