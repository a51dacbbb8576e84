// The kernels of quantized_linear for one instruction set. Formulas, shapes and layout: quantized_linear.h.
//
// Up to kTileRows rows of x, values are widened in registers as they come. For more rows, a panel of kPanel rows of the
// weight is widened once, chunk by chunk into the first-level cache, and serves all of them.
#include "quantized_linear.h"

#include "vec.h"

namespace peft_ext {
namespace {

using Floats = Vec<float>;
constexpr int kWidth = kLanes<float>;
constexpr int64_t kHalfBlock = kPackedBlock / 2;
constexpr int kTileRows = 4;
// As many sums as there are registers for, with the factors they are made of.
constexpr int kPanel = kVectorBytes == 64 ? 6 : 3;
constexpr int kDirectPanel = kVectorBytes == 64 ? 4 : 2;
constexpr int64_t kChunk = 512;

inline Int32Vec widen_signed(const int8_t* source) {
#if defined(__AVX512F__)
  return bit_cast<Int32Vec>(_mm512_cvtepi8_epi32(load_unaligned<__m128i>(source)));
#elif defined(__AVX2__)
  return bit_cast<Int32Vec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
  Int32Vec value;
  for (int lane = 0; lane < kWidth; ++lane) value[lane] = source[lane];
  return value;
#endif
}

inline Int32Vec widen_unsigned(const uint8_t* source) {
#if defined(__AVX512F__)
  return bit_cast<Int32Vec>(_mm512_cvtepu8_epi32(load_unaligned<__m128i>(source)));
#elif defined(__AVX2__)
  return bit_cast<Int32Vec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
  Int32Vec value;
  for (int lane = 0; lane < kWidth; ++lane) value[lane] = source[lane];
  return value;
#endif
}

inline Floats to_floats(Int32Vec value) {
  return __builtin_convertvector(value, Floats);
}

// How a row of values is read: visit(begin, end, body) calls body(k, load) for the vectors of the columns [begin, end),
// where load(row, scale) has the vector of column k of a row.
struct Int8Values {
  static int64_t row_bytes(int64_t columns) { return columns; }

  static int value(const void* row, int64_t k) { return static_cast<const int8_t*>(row)[k]; }

  template <class Body>
  static void visit(int64_t begin, int64_t end, const Body& body) {
    int64_t k = begin;
    for (; k + kWidth <= end; k += kWidth) {
      body(k, [k](const void* row, Floats scale) {
        return scale * to_floats(widen_signed(static_cast<const int8_t*>(row) + k));
      });
    }
    if (k == end) return;
    body(k, [k, end](const void* row, Floats scale) {
      int8_t last[kWidth] = {};
      std::memcpy(last, static_cast<const int8_t*>(row) + k, end - k);
      return scale * to_floats(widen_signed(last));
    });
  }
};

struct Int4Values {
  static constexpr int kZero = 8;

  static int64_t row_bytes(int64_t columns) { return columns / 2; }

  static int value(const void* row, int64_t k) {
    const int64_t place = k % kPackedBlock;
    const int byte = static_cast<const uint8_t*>(row)[k / kPackedBlock * kHalfBlock + place % kHalfBlock];
    return (place < kHalfBlock ? byte & 15 : byte >> 4) - kZero;
  }

  // The values in the lowest four bits.
  static Floats scaled(Int32Vec bits, Floats scale) {
#if defined(__AVX512F__)
    // All that a value can be, in the order of its bits, of which the permutation uses four.
    const Floats all = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return bit_cast<Floats>(_mm512_permutexvar_ps(bit_cast<__m512i>(bits), bit_cast<__m512>(scale * all)));
#else
    return scale * to_floats((bits & 15) - kZero);
#endif
  }

  template <class Body>
  static void visit(int64_t begin, int64_t end, const Body& body) {
    for (int64_t k = begin; k < end; k += kPackedBlock) {
      for (int64_t j = 0; j < kHalfBlock; j += kWidth) {
        const int64_t byte = k / 2 + j;
        const auto pair = [byte](const void* row) { return widen_unsigned(static_cast<const uint8_t*>(row) + byte); };
        body(k + j, [&](const void* row, Floats scale) { return scaled(pair(row), scale); });
        body(k + kHalfBlock + j, [&](const void* row, Floats scale) { return scaled(pair(row) >> 4, scale); });
      }
    }
  }
};

// The rows of one format, and their scales.
template <class Values>
struct Rows {
  explicit Rows(const QuantizedWeight& weight)
      : weight(weight), group(weight.groups == 0 ? 0 : weight.columns / weight.groups) {}

  const void* row(int64_t n) const {
    return static_cast<const char*>(weight.values) + n * Values::row_bytes(weight.columns);
  }
  const void* at(int64_t n, int64_t k) const { return static_cast<const char*>(row(n)) + Values::row_bytes(k); }
  float scale(int64_t n, int64_t g) const { return weight.scale[n * weight.groups + g]; }

  // Calls body(g, begin, end) for the parts of the columns [begin, end) that have one scale.
  template <class Body>
  void by_group(int64_t begin, int64_t end, const Body& body) const {
    int64_t g = begin / group;
    for (int64_t k = begin, next; k < end; k = next, ++g) {
      next = (g + 1) * group < end ? (g + 1) * group : end;
      body(g, k, next);
    }
  }

  const QuantizedWeight& weight;
  const int64_t group;
};

template <class Values, class T>
void dequantize_rows(const QuantizedWeight& weight, const WeightBlock& block) {
  const Rows<Values> rows(weight);
  for (int64_t n = block.row_begin; n < block.row_end; ++n) {
    T* target = static_cast<T*>(block.target) + (n - block.row_begin) * block.target_stride - block.column_begin;
    const void* row = rows.row(n);
    rows.by_group(block.column_begin, block.column_end, [&](int64_t g, int64_t begin, int64_t end) {
      const float scale = rows.scale(n, g);
      const Floats scales = Floats{} + scale;
      int64_t k = begin;
      if constexpr (!std::is_same_v<T, double>) {
        const int64_t whole = begin + (end - begin) / kWidth * kWidth;
        Values::visit(begin, whole, [&](int64_t at, auto load) { store(target + at, load(row, scales)); });
        k = whole;
      }
      for (; k < end; ++k) {
        target[k] = from_acc<T>(static_cast<Acc<T>>(scale) * static_cast<Acc<T>>(Values::value(row, k)));
      }
    });
  }
}

template <class T>
void dequantize(const QuantizedWeight& weight, const WeightBlock& block) {
  weight.packed ? dequantize_rows<Int4Values, T>(weight, block) : dequantize_rows<Int8Values, T>(weight, block);
}

template <class T>
inline void write(const QuantizedProduct& problem, int64_t m, int64_t n, Floats sum) {
  const float bias = problem.bias ? problem.bias[n] : 0.0f;
  static_cast<T*>(problem.y)[m * problem.y_stride + n] = from_acc<T>(sum_of_lanes(sum) + bias);
}

// kFew rows of x by kRows rows of the weight from n on, widened in registers.
template <class Values, class T, int kFew, int kRows>
void direct_tile(const QuantizedProduct& problem, const Rows<Values>& rows, int64_t n) {
  Floats sums[kFew][kRows] = {};
  const void* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = rows.row(n + i);
  rows.by_group(0, problem.weight.columns, [&](int64_t g, int64_t begin, int64_t end) {
    Floats scale[kRows];
    for (int i = 0; i < kRows; ++i) scale[i] = Floats{} + rows.scale(n + i, g);
    Values::visit(begin, end, [&](int64_t k, auto load_row) {
      Floats factor[kRows];
      for (int i = 0; i < kRows; ++i) factor[i] = load_row(row[i], scale[i]);
      for (int m = 0; m < kFew; ++m) {
        const Floats x = load(problem.x + m * problem.x_stride + k);
        for (int i = 0; i < kRows; ++i) sums[m][i] += x * factor[i];
      }
    });
  });
  for (int m = 0; m < kFew; ++m) {
    for (int i = 0; i < kRows; ++i) write<T>(problem, m, n + i, sums[m][i]);
  }
}

template <class Values, class T, int kFew>
void direct_product(const QuantizedProduct& problem, int64_t begin, int64_t end) {
  const Rows<Values> rows(problem.weight);
  int64_t n = begin;
  for (; n + kDirectPanel <= end; n += kDirectPanel) direct_tile<Values, T, kFew, kDirectPanel>(problem, rows, n);
  for (; n < end; ++n) direct_tile<Values, T, kFew, 1>(problem, rows, n);
}

// A chunk of kPanel rows of the weight, and the sums of all rows of x with them.
struct Panel {
  float factors[kPanel][kChunk];
  Floats sums[kQuantizedFewRows][kPanel];
};

template <int kFew>
inline void add_chunk(Panel& panel, const QuantizedProduct& problem, int64_t first, int64_t begin, int64_t length) {
  Floats sums[kFew][kPanel];
  for (int m = 0; m < kFew; ++m) {
    for (int i = 0; i < kPanel; ++i) sums[m][i] = panel.sums[first + m][i];
  }
  const float* x = problem.x + first * problem.x_stride + begin;
  for (int64_t k = 0; k < length; k += kWidth) {
    Floats factor[kPanel];
    for (int i = 0; i < kPanel; ++i) factor[i] = load(panel.factors[i] + k);
    for (int m = 0; m < kFew; ++m) {
      const Floats value = load(x + m * problem.x_stride + k);
      for (int i = 0; i < kPanel; ++i) sums[m][i] += value * factor[i];
    }
  }
  for (int m = 0; m < kFew; ++m) {
    for (int i = 0; i < kPanel; ++i) panel.sums[first + m][i] = sums[m][i];
  }
}

// Into the first cache what is needed for the next chunk, while this one is multiplied.
inline void prefetch(const void* source, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(static_cast<const char*>(source) + at);
}

template <class Values>
void fill_chunk(Panel& panel, const Rows<Values>& rows, int64_t n, int64_t count, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    const void* row = rows.row(n + i);
    prefetch(end < rows.weight.columns ? rows.at(n + i, end) : rows.at(n + i + kPanel, 0),
             Values::row_bytes(end - begin));
    rows.by_group(begin, end, [&](int64_t g, int64_t from, int64_t to) {
      const Floats scale = Floats{} + rows.scale(n + i, g);
      Values::visit(from, to,
                    [&](int64_t k, auto load_row) { store(panel.factors[i] + (k - begin), load_row(row, scale)); });
    });
  }
}

template <class Values, class T>
void panel_product(const QuantizedProduct& problem, int64_t row_begin, int64_t row_end) {
  const Rows<Values> rows(problem.weight);
  const int64_t columns = problem.weight.columns, few = problem.few;
  Panel panel = {};
  for (int64_t n = row_begin; n < row_end; n += kPanel) {
    const int64_t count = row_end - n < kPanel ? row_end - n : kPanel;
    std::memset(panel.sums, 0, sizeof(panel.sums));
    for (int64_t begin = 0; begin < columns; begin += kChunk) {
      const int64_t length = columns - begin < kChunk ? columns - begin : kChunk;
      fill_chunk(panel, rows, n, count, begin, begin + length);
      int64_t m = 0;
      for (; m + kTileRows <= few; m += kTileRows) add_chunk<kTileRows>(panel, problem, m, begin, length);
      if (m + 2 <= few) add_chunk<2>(panel, problem, m, begin, length), m += 2;
      if (m < few) add_chunk<1>(panel, problem, m, begin, length);
    }
    for (int64_t m = 0; m < few; ++m) {
      for (int64_t i = 0; i < count; ++i) write<T>(problem, m, n + i, panel.sums[m][i]);
    }
  }
}

template <class Values, class T>
void product_of(const QuantizedProduct& problem, int64_t begin, int64_t end) {
  switch (problem.few) {
    case 1:
      return direct_product<Values, T, 1>(problem, begin, end);
    case 2:
      return direct_product<Values, T, 2>(problem, begin, end);
    case 3:
      return direct_product<Values, T, 3>(problem, begin, end);
    case 4:
      return direct_product<Values, T, 4>(problem, begin, end);
    default:
      return panel_product<Values, T>(problem, begin, end);
  }
}

template <class T>
void product(const QuantizedProduct& problem, int64_t begin, int64_t end) {
  problem.weight.packed ? product_of<Int4Values, T>(problem, begin, end)
                        : product_of<Int8Values, T>(problem, begin, end);
}

template <class T>
constexpr QuantizedKernels kernels() {
  return {dequantize<T>, product<T>};
}

}  // namespace

namespace PEFT_EXT_ISA {

extern const QuantizedKernels quantized_kernels[kNumStorages];
const QuantizedKernels quantized_kernels[kNumStorages] = {
    kernels<float>(), {dequantize<double>, nullptr}, kernels<BFloat16>(), kernels<Half>()};

}  // namespace PEFT_EXT_ISA
}  // namespace peft_ext
