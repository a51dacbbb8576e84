#include "cuda/skinny.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstdint>

#include "common/tensors.h"
#include "cuda/dropout.h"
#include "cuda/launch.h"
#include "cuda/skinny_bfloat16.h"
#include "cuda/vectors.h"

namespace peft_ext::cuda {
namespace {

constexpr int kTableSize = 64;  // Adapters that one launch serves: their table is a kernel argument.

// The factors of adapters number first, first + 1, ..., as one launch takes them.
struct FactorTable {
  const void* factor[kTableSize];
  void* grad[kTableSize];
  int rank[kTableSize];
  int offset[kTableSize];  // Of the adapter's rows among the sums of all.
  uint32_t threshold[kTableSize];
  double dropout_scale[kTableSize];
  int first = 0, count = 0;
};

// Which adapter serves a row, and by how much.
struct RowAdapters {
  const int64_t* index = nullptr;
  int64_t span = 1;
  const double* scalings = nullptr;
  double scaling = 1.0;
  const int64_t* seed = nullptr;

  // Number in the table; -1 where it is not one of its.
  __device__ int operator()(const FactorTable& table, int64_t row) const {
    if (!index) return 0;
    const int64_t adapter = index[row / span] - table.first;
    return adapter >= 0 && adapter < table.count ? static_cast<int>(adapter) : -1;
  }

  __device__ double scaling_of(const FactorTable& table, int adapter) const {
    return (scalings ? scalings[table.first + adapter] : scaling) * table.dropout_scale[adapter];
  }
};

constexpr int kVector = 8;  // Elements a thread reads at a time: a block of the dropout's generator.
constexpr int kThreads = 256;

template <int kCount, class C>
__device__ inline void mask_elements(C (&values)[kCount], uint32_t keep) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = keep >> i & 1 ? values[i] : C(0);
}

// The sums over the lanes of a warp: lane l gets that of values[l / (32 / kCount)].
template <int kCount, class C>
__device__ inline C sum_over_lanes(C (&values)[kCount], int lane) {
  int bit = kWarp / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= half) continue;
      const C mine = upper ? values[i + half] : values[i], other = upper ? values[i] : values[i + half];
      values[i] = mine + __shfl_xor_sync(0xffffffffu, other, bit);
    }
  }
#pragma unroll
  for (; bit > 0; bit /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], bit);
  return values[0];
}

// factors[j][c] = F(first_rank + j, k + c); zeros beyond its `ranks` and `inner`, which kWhole says all are within.
template <bool kColumns, bool kWhole, int kCount, class F>
__device__ inline void load_factors(F (&factors)[kCount][kVector], const F* factor, int first_rank, int ranks,
                                    int64_t k, int64_t inner, int rank) {
  if constexpr (kColumns) {
    F columns[kVector][kCount];
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      const F* source = factor + (k + c) * rank + first_rank;
      if constexpr (kWhole) {
        load_whole(columns[c], source);
      } else {
        load_elements(columns[c], source, k + c < inner ? ranks : 0, false);
      }
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) factors[j][c] = columns[c][j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const F* source = factor + (first_rank + j) * inner + k;
      if constexpr (kWhole) {
        load_whole(factors[j], source);
      } else {
        load_elements(factors[j], source, j < ranks ? inner - k : 0, false);
      }
    }
  }
}

struct Projection {
  FactorTable table;
  RowAdapters adapters;
  const void* x;
  int64_t x_stride, rows, inner;
  void* hidden;
  int64_t hidden_stride;
  bool masking;
  bool by_vectors;   // Whether x and the factors can be read so, and all columns and ranks are whole ones.
  int warps_a_tile;  // That share the inner dimension of a tile of rows; more than one only for tiles of one row.
};

constexpr int kProjectWarps = 8;
constexpr int kBatch = 4;  // Ranks whose loads are all on their way before the first is used.

// One warp a tile of kRows rows and kRanks ranks; blockIdx.y counts these. A lane takes eight columns at a time.
template <class T, class F, bool kColumns, int kRows, int kRanks>
__global__ void __launch_bounds__(kProjectWarps* kWarp) project(const __grid_constant__ Projection p) {
  using C = Acc<T>;
  __shared__ C partial[kProjectWarps][kRanks];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int part = warp % p.warps_a_tile;
  const int64_t tile = (static_cast<int64_t>(blockIdx.x) * kProjectWarps + warp) / p.warps_a_tile;
  const int64_t first_row = tile * kRows;
  const int first_rank = blockIdx.y * kRanks;
  const uint64_t seed = p.adapters.seed ? *p.adapters.seed : 0;

  int adapter[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) adapter[i] = first_row + i < p.rows ? p.adapters(p.table, first_row + i) : -1;

  // Every adapter of the tile once, for all rows: those of another one are computed in vain.
#pragma unroll 1
  for (int turn = 0; turn < kRows; ++turn) {
    int a = -1;
#pragma unroll
    for (int i = 0; i < kRows; ++i) a = i == turn ? adapter[i] : a;
    bool done = a < 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) done = done || (i < turn && adapter[i] == a);
    const int rank = a < 0 ? 0 : p.table.rank[a];
    C sums[kRows][kRanks] = {};
    if (!done && first_rank < rank) {
      const F* factor = static_cast<const F*>(p.table.factor[a]);
      const uint32_t threshold = p.masking ? p.table.threshold[a] : 0;
      const int64_t step = static_cast<int64_t>(p.warps_a_tile) * kWarp * kVector;
#pragma unroll 1
      for (int64_t k = (part * kWarp + lane) * kVector; k < p.inner; k += step) {
        T read[kRows][kVector];
        const auto x_row = [&](int i) {
          return static_cast<const T*>(p.x) + min(first_row + i, p.rows - 1) * p.x_stride + k;
        };
#pragma unroll
        for (int first = 0; first < kRanks; first += kBatch) {
          const int left = rank - first_rank - first;
          if (left <= 0) continue;
          F factors[kBatch][kVector];
          if (p.by_vectors) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              if (first == 0) load_whole(read[i], x_row(i));
            }
            load_factors<kColumns, true>(factors, factor, first_rank + first, left, k, p.inner, rank);
          } else {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              if (first == 0) load_elements(read[i], x_row(i), p.inner - k, false);
            }
            load_factors<kColumns, false>(factors, factor, first_rank + first, left, k, p.inner, rank);
          }
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            C x[kVector];
#pragma unroll
            for (int c = 0; c < kVector; ++c) x[c] = static_cast<C>(read[i][c]);
            if (threshold) {
              mask_elements(x, keep_bits(seed, threshold, first_row + i, static_cast<uint32_t>(k / kVector)));
            }
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
#pragma unroll
              for (int c = 0; c < kVector; ++c) sums[i][first + j] += x[c] * static_cast<C>(factors[j][c]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      constexpr int kLanesARank = kWarp / kRanks;
      C sum = sum_over_lanes(sums[i], lane);
      const int j = lane / kLanesARank;
      if (kRows == 1 && p.warps_a_tile > 1) {
        partial[warp][j] = sum;
        __syncthreads();
        if (part == 0) {
          for (int other = 1; other < p.warps_a_tile; ++other) sum += partial[warp + other][j];
        }
      }
      if (done || part != 0 || adapter[i] != a || lane % kLanesARank || first_rank + j >= rank) continue;
      C* hidden = static_cast<C*>(p.hidden) + (first_row + i) * p.hidden_stride;
      hidden[first_rank + j] = sum * static_cast<C>(p.adapters.scaling_of(p.table, a));
    }
  }
}

struct Expansion {
  FactorTable table;
  RowAdapters adapters;
  const void* hidden;
  int64_t hidden_stride, rows, columns;
  void* y;
  int64_t y_stride;
  const void* bias;  // Of T, or null; read only with `overwrite`.
  bool overwrite;    // What y held does not count.
  bool masking;
  bool y_aligned;
  bool factors_by_vectors;  // Whether the factors can be read so, and all columns and ranks are whole ones.
};

constexpr int kExpandColumns = 4, kExpandThreads = 256;
constexpr int kRankChunk = 16;  // Ranks that a thread of expand and of sum_rows holds at a time.

// factors[j][c] = F(first + j, column + c), something else beyond the rank; zeros beyond the columns, which kWhole says
// there are none of.
template <bool kColumns, bool kWhole, int kCount, class F>
__device__ inline void load_ranks(F (&factors)[kCount][kExpandColumns], const F* factor, int first, int rank,
                                  int64_t column, int64_t columns) {
  if constexpr (kColumns) {
    F pieces[kExpandColumns][kCount / kVector][kVector];
#pragma unroll
    for (int c = 0; c < kExpandColumns; ++c) {
#pragma unroll
      for (int j = 0; j < kCount / kVector; ++j) {
        const int at = first + j * kVector;
        const F* source = factor + (column + c) * rank;
        if constexpr (kWhole) {
          load_whole(pieces[c][j], source + min(at, rank - kVector));
        } else {
          load_elements(pieces[c][j], source + at, column + c < columns ? rank - at : 0, false);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kExpandColumns; ++c) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) factors[j][c] = pieces[c][j / kVector][j % kVector];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const F* source = factor + min(first + j, rank - 1) * columns + column;
      if constexpr (kWhole) {
        load_whole(factors[j], source);
      } else {
        load_elements(factors[j], source, columns - column, false);
      }
    }
  }
}

// A block takes kRows rows, a thread four neighbouring columns of them; blockIdx.y counts the blocks of columns.
template <class T, class F, bool kColumns, int kRows>
__global__ void __launch_bounds__(kExpandThreads) expand(const __grid_constant__ Expansion p) {
  using C = Acc<T>;
  __shared__ C hidden[kRows][kRankChunk];
  __shared__ int adapter[kRows];
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kExpandColumns;
  const uint64_t seed = p.adapters.seed ? *p.adapters.seed : 0;
  if (threadIdx.x < kRows) {
    const int64_t row = first_row + threadIdx.x;
    adapter[threadIdx.x] = row < p.rows ? p.adapters(p.table, row) : -1;
  }
  __syncthreads();
  int most = 0;
  for (int i = 0; i < kRows; ++i) most = adapter[i] < 0 ? most : max(most, p.table.rank[adapter[i]]);

  C sums[kRows][kExpandColumns] = {};
#pragma unroll 1
  for (int first_rank = 0; first_rank < most; first_rank += kRankChunk) {
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kRankChunk; i += blockDim.x) {
      const int row = i / kRankChunk, j = i % kRankChunk;
      const bool there = adapter[row] >= 0 && first_rank + j < p.table.rank[adapter[row]];
      hidden[row][j] =
          there ? static_cast<const C*>(p.hidden)[(first_row + row) * p.hidden_stride + first_rank + j] : C(0);
    }
    __syncthreads();
    if (column >= p.columns) continue;
    int loaded = -1, rank = 0;
    F factor[kRankChunk][kExpandColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int a = adapter[i];
      if (a < 0) continue;
      if (a != loaded) {
        loaded = a;
        rank = p.table.rank[a];
        const F* source = static_cast<const F*>(p.table.factor[a]);
        if (p.factors_by_vectors) {
          load_ranks<kColumns, true>(factor, source, first_rank, rank, column, p.columns);
        } else {
          load_ranks<kColumns, false>(factor, source, first_rank, rank, column, p.columns);
        }
      }
#pragma unroll
      for (int j = 0; j < kRankChunk; ++j) {
        if (first_rank + j >= rank) continue;
#pragma unroll
        for (int c = 0; c < kExpandColumns; ++c) sums[i][c] += hidden[i][j] * static_cast<C>(factor[j][c]);
      }
    }
  }

  if (column >= p.columns) return;
  const bool keeping = !p.overwrite;
  C bias[kExpandColumns] = {};
  if (p.bias) load_elements(bias, static_cast<const T*>(p.bias) + column, p.columns - column, false);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first_row + i;
    if (row >= p.rows || (adapter[i] < 0 && keeping)) continue;
    T* y = static_cast<T*>(p.y) + row * p.y_stride + column;
    C values[kExpandColumns];
    if (keeping) {
      load_elements(values, y, p.columns - column, p.y_aligned);
    } else {
#pragma unroll
      for (int c = 0; c < kExpandColumns; ++c) values[c] = bias[c];
    }
    const uint32_t threshold = p.masking && adapter[i] >= 0 ? p.table.threshold[adapter[i]] : 0;
    if (threshold) {
      const uint32_t keep = keep_bits(seed, threshold, row, static_cast<uint32_t>(column / kColumnsPerBlock));
      mask_elements(sums[i], keep >> (column % kColumnsPerBlock));
    }
#pragma unroll
    for (int c = 0; c < kExpandColumns; ++c) values[c] += sums[i][c];
    store_elements(y, values, p.columns - column, p.y_aligned);
  }
}

struct RowSums {
  FactorTable table;
  RowAdapters adapters;
  const void* x;
  int64_t x_stride, rows, columns;
  const void* hidden;
  int64_t hidden_stride;
  void* partial;  // [row chunks, total_rank, columns]
  int64_t total_rank;
  int rank_chunks;
  bool masking, partial_aligned;
  bool by_vectors;  // Whether x can be read so, and all columns are whole ones.
};

constexpr int kSumColumns = 4, kSumThreads = 128;
constexpr int kSumBatch = 8;  // Rows whose loads are all on their way before the first is used.

// A block takes a chunk of the rows (blockIdx.y), an adapter and sixteen of its ranks (blockIdx.z), a thread four
// neighbouring columns. The adapter's rows are found, with their hidden, by all threads together.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_rows(const __grid_constant__ RowSums p) {
  using C = Acc<T>;
  __shared__ C hidden[kSumThreads][kRankChunk];
  __shared__ int rows[kSumThreads];
  __shared__ int found[kSumThreads / kWarp];
  const int a = blockIdx.z / p.rank_chunks, first_rank = blockIdx.z % p.rank_chunks * kRankChunk;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kSumColumns;
  const int ranks = min(p.table.rank[a] - first_rank, kRankChunk);
  if (ranks <= 0) return;
  const uint64_t seed = p.adapters.seed ? *p.adapters.seed : 0;
  const uint32_t threshold = p.masking ? p.table.threshold[a] : 0;
  const int64_t begin = p.rows * blockIdx.y / gridDim.y, end = p.rows * (blockIdx.y + 1) / gridDim.y;
  C sums[kRankChunk][kSumColumns] = {};
  for (int64_t first = begin; first < end; first += kSumThreads) {
    const int64_t mine = first + threadIdx.x;
    const bool ours = mine < end && p.adapters(p.table, mine) == a;
    const unsigned votes = __ballot_sync(0xffffffffu, ours);
    if (lane == 0) found[warp] = __popc(votes);
    __syncthreads();  // The rows before were used, too.
    int place = __popc(votes & ((1u << lane) - 1)), count = 0;
    for (int w = 0; w < kSumThreads / kWarp; ++w) {
      if (w < warp) place += found[w];
      count += found[w];
    }
    if (ours) {
      rows[place] = static_cast<int>(mine - first);
      const C* source = static_cast<const C*>(p.hidden) + mine * p.hidden_stride + first_rank;
#pragma unroll
      for (int j = 0; j < kRankChunk; ++j) hidden[place][j] = j < ranks ? source[j] : C(0);
    }
    __syncthreads();
    for (int i = 0; i < count && column < p.columns; i += kSumBatch) {
      T x[kSumBatch][kSumColumns];
      const auto x_row = [&](int b) {
        return static_cast<const T*>(p.x) + (first + rows[min(i + b, count - 1)]) * p.x_stride + column;
      };
      if (p.by_vectors) {
#pragma unroll
        for (int b = 0; b < kSumBatch; ++b) load_whole(x[b], x_row(b));
      } else {
#pragma unroll
        for (int b = 0; b < kSumBatch; ++b) load_elements(x[b], x_row(b), p.columns - column, false);
      }
#pragma unroll
      for (int b = 0; b < kSumBatch; ++b) {
        if (i + b >= count) continue;
        C values[kSumColumns];
#pragma unroll
        for (int c = 0; c < kSumColumns; ++c) values[c] = static_cast<C>(x[b][c]);
        if (threshold) {
          const uint32_t block = static_cast<uint32_t>(column / kColumnsPerBlock);
          const uint32_t keep = keep_bits(seed, threshold, first + rows[i + b], block);
          mask_elements(values, keep >> (column % kColumnsPerBlock));
        }
#pragma unroll
        for (int j = 0; j < kRankChunk; ++j) {
#pragma unroll
          for (int c = 0; c < kSumColumns; ++c) sums[j][c] += hidden[i + b][j] * values[c];
        }
      }
    }
  }
  C* partial =
      static_cast<C*>(p.partial) + (blockIdx.y * p.total_rank + p.table.offset[a] + first_rank) * p.columns + column;
#pragma unroll
  for (int j = 0; j < kRankChunk; ++j) {
    if (j < ranks) store_elements(partial + j * p.columns, sums[j], p.columns - column, p.partial_aligned);
  }
}

struct Finish {
  FactorTable table;
  const void* partial;
  int64_t chunks, total_rank, columns;
  bool grads_aligned;  // Along the ranks.
};

// table.grad[a] [rank, columns], or [columns, rank] for kColumns, from the chunks' sums; blockIdx.y counts adapters, a
// thread eight ranks of a column.
template <class C, class G, bool kColumns>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Finish p) {
  const int a = blockIdx.y;
  G* grad = static_cast<G*>(p.table.grad[a]);
  if (!grad) return;
  const int64_t rank = p.table.rank[a], stride = p.total_rank * p.columns;
  const C* partial = static_cast<const C*>(p.partial) + p.table.offset[a] * p.columns;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < (rank + kVector - 1) / kVector * p.columns; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t column = i % p.columns, first = i / p.columns * kVector;
    C sums[kVector] = {};
#pragma unroll 4
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      const C* source = partial + chunk * stride + column;
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[j] += source[min(first + j, rank - 1) * p.columns];
    }
    if constexpr (kColumns) {
      store_elements(grad + column * rank + first, sums, rank - first, p.grads_aligned);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (first + j < rank) grad[(first + j) * p.columns + column] = static_cast<G>(sums[j]);
      }
    }
  }
}

int64_t rank_of(const at::Tensor& factor, Along along) {
  return factor.size(along == Along::kRows ? 0 : 1);
}

// Whether all factors can be read by vectors of so many columns or, where these lie along columns, ranks.
bool can_be_read(at::TensorList factors, Along along, int64_t columns, int64_t of_columns, int64_t of_ranks) {
  const int64_t vector = along == Along::kRows ? of_columns : of_ranks;
  return std::all_of(factors.begin(), factors.end(), [&](const at::Tensor& factor) {
    return columns % of_columns == 0 && rank_of(factor, along) % of_ranks == 0 &&
           is_aligned(factor, factor.size(1), vector);
  });
}

int64_t largest_rank(at::TensorList factors, Along along) {
  int64_t most = 0;
  for (const auto& factor : factors) most = std::max(most, rank_of(factor, along));
  return most;
}

FactorTable make_table(at::TensorList factors, Along along, const Mix& mix, int64_t first) {
  FactorTable table{};
  table.first = static_cast<int>(first);
  table.count = static_cast<int>(std::min<int64_t>(static_cast<int64_t>(factors.size()) - first, kTableSize));
  int64_t offset = 0;
  for (int i = 0; i < table.count; ++i) {
    const at::Tensor& factor = factors[first + i];
    const auto dropout = make_device_dropout(mix.dropout_p.empty() ? 0.0 : mix.dropout_p[first + i], mix.seed);
    table.factor[i] = factor.const_data_ptr();
    table.rank[i] = static_cast<int>(rank_of(factor, along));
    table.offset[i] = static_cast<int>(offset);
    table.threshold[i] = dropout.threshold;
    table.dropout_scale[i] = dropout.scale;
    offset += table.rank[i];
  }
  return table;
}

RowAdapters make_rows(const Mix& mix, int64_t rows) {
  RowAdapters adapters;
  if (mix.index.defined()) {
    adapters.index = mix.index.const_data_ptr<int64_t>();
    adapters.span = std::max<int64_t>(rows / std::max<int64_t>(mix.index.numel(), 1), 1);
  }
  if (mix.scalings.defined()) adapters.scalings = mix.scalings.const_data_ptr<double>();
  adapters.scaling = mix.scaling;
  if (mix.seed) adapters.seed = mix.seed->const_data_ptr<int64_t>();
  return adapters;
}

// Calls work(number of the first) for every table that the adapters fill.
template <class Work>
void for_each_table(at::TensorList factors, const Work& work) {
  for (size_t first = 0; first < factors.size(); first += kTableSize) work(static_cast<int64_t>(first));
}

template <class T, class F, bool kColumns>
void launch_project(Projection& p, int64_t ranks) {
  // Below this many rows a warp a tile would leave most of the chip idle: all warps of a block share a row, and few of
  // its ranks.
  constexpr int64_t kFewRows = 1024;
  constexpr int kTile = 4, kFewRanks = kBatch, kManyRanks = 16;
  const dim3 block(kProjectWarps * kWarp);
  if (p.rows < kFewRows) {
    p.warps_a_tile = kProjectWarps;
    const dim3 grid(grid_size(p.rows), grid_size(blocks_for(ranks, kFewRanks)));
    launch(project<T, F, kColumns, 1, kFewRanks>, grid, block, 0, p);
  } else {
    p.warps_a_tile = 1;
    const dim3 grid(grid_size(blocks_for(blocks_for(p.rows, kTile), kProjectWarps)),
                    grid_size(blocks_for(ranks, kManyRanks)));
    launch(project<T, F, kColumns, kTile, kManyRanks>, grid, block, 0, p);
  }
}

// Into how many chunks sum_rows cuts the rows: enough blocks for the chip, by the sizes alone.
int64_t count_chunks(int64_t rows, int64_t blocks) {
  constexpr int64_t kBlocks = 528, kLeastRows = 16;
  return std::clamp<int64_t>(kBlocks / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(rows / kLeastRows, 1));
}

// --- one adapter and many rows ---
//
// bfloat16 goes to skinny_bfloat16.h, float and double to GEMMs of at::, for which a masked x is made chunk by chunk,
// each of which stays in the caches. float16 is left to the kernels above: its range is too small for a hidden as the
// sum of two such values, and for a hidden of one its precision is.

bool tensor_cores_serve(const at::Tensor& x, const Mix& mix) {
  return !mix.index.defined() && x.size(0) >= bfloat16::kFewestRows && x.scalar_type() == at::kBFloat16 &&
         bfloat16::can_be_read(x);
}

// Likewise, with a hidden that bfloat16::project made, or one that happens to be like it.
bool tensor_cores_serve(const at::Tensor& x, const at::Tensor& hidden, const Mix& mix) {
  constexpr int64_t kRanks = 16;
  return tensor_cores_serve(x, mix) && hidden.stride(0) % kRanks == 0;
}

bool gemm_serves(const at::Tensor& x, const Mix& mix) {
  constexpr int64_t kRows = 1024;
  return !mix.index.defined() && x.size(0) >= kRows && x.size(1) > 0 && acc_type(x.scalar_type()) == x.scalar_type();
}

// target[row, k] = source[row, k] where the dropout keeps it, else 0; a thread eight columns. source may be target.
template <class T>
__global__ void mask_rows(const T* source, int64_t stride, T* target, int64_t rows, int64_t columns, int64_t first_row,
                          const int64_t* seed, uint32_t threshold, bool aligned) {
  const int64_t blocks = blocks_for(columns, kVector);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * blocks;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / blocks, column = i % blocks * kVector;
    Acc<T> values[kVector];
    load_elements(values, source + row * stride + column, columns - column, aligned);
    mask_elements(values, keep_bits(*seed, threshold, first_row + row, static_cast<uint32_t>(column / kVector)));
    store_elements(target + row * columns + column, values, columns - column, aligned);
  }
}

dim3 element_grid(int64_t elements) {
  return dim3(grid_size(blocks_for(elements, kThreads), 1 << 14));
}

DeviceDropout dropout_of(const Mix& mix, Masked masked) {
  if (masked == Masked::kNo || mix.dropout_p.empty()) return {};
  return make_device_dropout(mix.dropout_p[0], mix.seed);
}

double scaling_of(const Mix& mix) {
  return mix.scaling * (mix.dropout_p.empty() ? 1.0 : make_device_dropout(mix.dropout_p[0], mix.seed).scale);
}

void mask_into(const at::Tensor& target, const at::Tensor& source, int64_t first_row, const DeviceDropout& dropout) {
  const bool aligned = is_aligned(source, source.stride(0), kVector) && is_aligned(target, target.size(1), kVector);
  dispatch_storage(source.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch(mask_rows<T>, element_grid(blocks_for(source.numel(), kVector)), dim3(kThreads), 0,
           source.const_data_ptr<T>(), source.stride(0), target.data_ptr<T>(), source.size(0), source.size(1),
           first_row, dropout.seed, dropout.threshold, aligned);
  });
}

// Calls work(rows of x, masked if need be; number of the first).
template <class Work>
void for_each_chunk(const at::Tensor& x, const DeviceDropout& dropout, const Work& work) {
  if (dropout.threshold == 0) return work(x, 0);
  constexpr int64_t kChunkBytes = 8 << 20, kLeastRows = 256;
  const int64_t chunk = std::max(kChunkBytes / (x.size(1) * x.element_size()), kLeastRows);
  for (int64_t first = 0; first < x.size(0); first += chunk) {
    const at::Tensor rows = x.narrow(0, first, std::min(chunk, x.size(0) - first));
    const at::Tensor masked = at::empty(rows.sizes(), rows.options());
    mask_into(masked, rows, first, dropout);
    work(masked, first);
  }
}

// The factor as [rank, columns], or its transpose.
at::Tensor as_rows_of_ranks(const at::Tensor& factor, Along along) {
  return along == Along::kRows ? factor : factor.t();
}

at::Tensor project_by_gemm(const at::Tensor& x, const at::Tensor& factor, Along along, const Mix& mix, Masked masked) {
  const at::Tensor right = as_rows_of_ranks(factor, along).t(),
                   hidden = at::empty({x.size(0), right.size(1)}, x.options());
  for_each_chunk(x, dropout_of(mix, masked), [&](const at::Tensor& rows, int64_t first) {
    at::Tensor part = hidden.narrow(0, first, rows.size(0));
    at::mm_out(part, rows, right);
  });
  return hidden.mul_(scaling_of(mix));
}

void expand_by_gemm(at::Tensor y, const at::Tensor& hidden, const at::Tensor& factor, Along along, const Mix& mix,
                    Masked masked, Into into, const std::optional<at::Tensor>& bias) {
  const DeviceDropout dropout = dropout_of(mix, masked);
  const at::Tensor right = as_rows_of_ranks(factor, along);
  if (into == Into::kAdd) {
    at::addmm_out(y, y, hidden, right);
  } else if (bias) {
    at::addmm_out(y, *bias, hidden, right);
  } else {
    at::mm_out(y, hidden, right);
  }
  if (dropout.threshold != 0) mask_into(y, y, 0, dropout);
}

void sum_rows_by_gemm(at::Tensor grad, const at::Tensor& hidden, const at::Tensor& x, Along along, const Mix& mix,
                      Masked masked) {
  at::Tensor total;
  for_each_chunk(x, dropout_of(mix, masked), [&](const at::Tensor& rows, int64_t first) {
    const at::Tensor part = at::mm(hidden.narrow(0, first, rows.size(0)).t(), rows);
    total = total.defined() ? total.add_(part) : part;
  });
  grad.copy_(as_rows_of_ranks(total, along));
}

// The gradients of the table's adapters, of the factors' type, from the sums of chunks, [chunks, all ranks, columns].
void finish_grads(const FactorTable& table, at::TensorList grads, const at::Tensor& partial, at::ScalarType type,
                  Along along) {
  Finish f{table, partial.const_data_ptr(), partial.size(0), partial.size(1), partial.size(2), true};
  int64_t most = 0;
  for (int i = 0; i < table.count; ++i) {
    const at::Tensor& grad = grads[table.first + i];
    most = std::max<int64_t>(most, table.rank[i]);
    if (!grad.defined()) continue;
    f.table.grad[i] = grad.data_ptr();
    f.grads_aligned = f.grads_aligned && is_aligned(grad, table.rank[i], kVector);
  }
  const dim3 grid(grid_size(blocks_for(blocks_for(most, kVector) * f.columns, kThreads), 1024), grid_size(table.count));
  dispatch_storage(type, [&](auto g) {
    using G = decltype(g);
    using C = Acc<G>;
    launch(along == Along::kRows ? finish<C, G, false> : finish<C, G, true>, grid, dim3(kThreads), 0, f);
  });
}

}  // namespace

std::vector<at::Tensor> readable_factors(at::TensorList factors, at::ScalarType x_type) {
  const bool all_narrow = std::all_of(factors.begin(), factors.end(),
                                      [&](const at::Tensor& factor) { return factor.scalar_type() == x_type; });
  const at::ScalarType type = all_narrow ? x_type : acc_type(x_type);
  std::vector<at::Tensor> readable;
  readable.reserve(factors.size());
  for (const auto& factor : factors) readable.push_back(as_type(factor, type).contiguous());
  return readable;
}

at::Tensor project(const at::Tensor& x, at::TensorList factors, Along along, const Mix& mix, Masked masked) {
  if (tensor_cores_serve(x, mix)) {
    return bfloat16::project(x, factors[0], along, dropout_of(mix, masked), scaling_of(mix));
  }
  if (gemm_serves(x, mix)) return project_by_gemm(x, factors[0], along, mix, masked);
  const int64_t ranks = largest_rank(factors, along);
  const at::Tensor hidden = at::empty({x.size(0), ranks}, x.options().dtype(acc_type(x.scalar_type())));
  if (hidden.numel() == 0) return hidden;
  for_each_table(factors, [&](int64_t first) {
    Projection p{make_table(factors, along, mix, first), make_rows(mix, x.size(0))};
    p.x = x.const_data_ptr();
    p.x_stride = x.stride(0);
    p.rows = x.size(0);
    p.inner = x.size(1);
    p.hidden = hidden.data_ptr();
    p.hidden_stride = ranks;
    p.masking = masked == Masked::kYes;
    p.by_vectors = is_aligned(x, x.stride(0), kVector) && p.inner % kVector == 0 &&
                   can_be_read(factors, along, p.inner, kVector, kBatch);
    dispatch_pair(x.scalar_type(), factors[0].scalar_type(), [&](auto t, auto f) {
      using T = decltype(t);
      using F = decltype(f);
      if (along == Along::kRows) return launch_project<T, F, false>(p, ranks);
      launch_project<T, F, true>(p, ranks);
    });
  });
  return hidden;
}

void expand(const at::Tensor& y, const at::Tensor& hidden, at::TensorList factors, Along along, const Mix& mix,
            Masked masked, Into into, const std::optional<at::Tensor>& bias) {
  if (y.numel() == 0) return;
  if (tensor_cores_serve(y, hidden, mix)) {
    return bfloat16::expand(y, hidden, factors[0], along, dropout_of(mix, masked), into, bias);
  }
  // A mask on what is added, not on all of y, is for the kernel.
  if (gemm_serves(y, mix) && (into == Into::kOverwrite || dropout_of(mix, masked).threshold == 0)) {
    return expand_by_gemm(y, hidden, factors[0], along, mix, masked, into, bias);
  }
  const at::Tensor begin = bias ? bias->contiguous() : at::Tensor();
  for_each_table(factors, [&](int64_t first) {
    Expansion p{make_table(factors, along, mix, first), make_rows(mix, y.size(0))};
    p.hidden = hidden.const_data_ptr();
    p.hidden_stride = hidden.stride(0);
    p.rows = y.size(0);
    p.columns = y.size(1);
    p.y = y.data_ptr();
    p.y_stride = y.stride(0);
    p.overwrite = into == Into::kOverwrite && first == 0;
    p.bias = begin.defined() ? begin.const_data_ptr() : nullptr;
    p.masking = masked == Masked::kYes;
    p.y_aligned = is_aligned(y, y.stride(0), kExpandColumns);
    p.factors_by_vectors = can_be_read(factors, along, p.columns, kExpandColumns, kVector);
    // In a batch for decoding every row may have an adapter of its own: a block each keeps the chip busy.
    constexpr int64_t kFewRows = 256;
    constexpr int kTile = 8;
    const bool few = p.rows < kFewRows;
    const int64_t threads =
        std::clamp<int64_t>(blocks_for(blocks_for(p.columns, kExpandColumns), kWarp) * kWarp, kWarp, kExpandThreads);
    const dim3 grid(grid_size(blocks_for(p.rows, few ? 1 : kTile)),
                    grid_size(blocks_for(p.columns, threads * kExpandColumns)));
    const dim3 block(static_cast<unsigned>(threads));
    dispatch_pair(y.scalar_type(), factors[0].scalar_type(), [&](auto t, auto f) {
      using T = decltype(t);
      using F = decltype(f);
      const bool by_rows = along == Along::kRows;
      if (few) return launch(by_rows ? expand<T, F, false, 1> : expand<T, F, true, 1>, grid, block, 0, p);
      launch(by_rows ? expand<T, F, false, kTile> : expand<T, F, true, kTile>, grid, block, 0, p);
    });
  });
}

void sum_rows(at::TensorList grads, at::TensorList factors, const at::Tensor& hidden, const at::Tensor& x, Along along,
              const Mix& mix, Masked masked) {
  const int64_t columns = x.size(1), rank_chunks = blocks_for(largest_rank(factors, along), kRankChunk);
  if (columns == 0 || rank_chunks == 0) return;
  if (tensor_cores_serve(x, hidden, mix)) {
    const at::Tensor partial = bfloat16::sum_rows(hidden, x, dropout_of(mix, masked));
    return finish_grads(make_table(factors, along, mix, 0), grads, partial, factors[0].scalar_type(), along);
  }
  if (gemm_serves(x, mix)) return sum_rows_by_gemm(grads[0], hidden, x, along, mix, masked);
  for_each_table(factors, [&](int64_t first) {
    RowSums p{make_table(factors, along, mix, first), make_rows(mix, x.size(0))};
    const int last = p.table.count - 1;
    p.x = x.const_data_ptr();
    p.x_stride = x.stride(0);
    p.rows = x.size(0);
    p.columns = columns;
    p.hidden = hidden.const_data_ptr();
    p.hidden_stride = hidden.stride(0);
    p.total_rank = p.table.offset[last] + p.table.rank[last];
    p.rank_chunks = static_cast<int>(rank_chunks);
    p.masking = masked == Masked::kYes;
    p.by_vectors = is_aligned(x, x.stride(0), kSumColumns) && columns % kSumColumns == 0;
    const int64_t column_blocks = blocks_for(columns, kSumThreads * kSumColumns);
    const int64_t chunks = count_chunks(p.rows, column_blocks * p.table.count * rank_chunks);
    const at::Tensor partial = at::empty({chunks, p.total_rank, columns}, hidden.options());
    p.partial = partial.data_ptr();
    p.partial_aligned = is_aligned(partial, columns, kSumColumns);
    const dim3 grid(grid_size(column_blocks), grid_size(chunks), grid_size(p.table.count * rank_chunks));
    dispatch_storage(x.scalar_type(), [&](auto t) { launch(sum_rows<decltype(t)>, grid, dim3(kSumThreads), 0, p); });
    finish_grads(p.table, grads, partial, factors[0].scalar_type(), along);
  });
}

}  // namespace peft_ext::cuda
