// Every lane holds the whole matrix of a fragment and computes the whole product.
#pragma once

#include "cuda_bf16.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static constexpr int kRows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int kColumns = std::is_same_v<Use, matrix_a> ? K : N;
  static constexpr int num_elements = kRows * kColumns;
  T x[num_elements];
};

template <class Fragment, class T>
void fill_fragment(Fragment& target, T value) {
  for (auto& element : target.x) element = value;
}

template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& target, const T* source, unsigned stride) {
  using Fragment = fragment<Use, M, N, K, T, Layout>;
  __syncwarp();
  for (int r = 0; r < Fragment::kRows; ++r) {
    for (int c = 0; c < Fragment::kColumns; ++c) {
      target.x[r * Fragment::kColumns + c] =
          std::is_same_v<Layout, col_major> ? source[c * stride + r] : source[r * stride + c];
    }
  }
}

template <int M, int N, int K, class T>
void store_matrix_sync(T* target, const fragment<accumulator, M, N, K, T>& source, unsigned stride, layout_t layout) {
  __syncwarp();
  for (int r = 0; r < M; ++r) {
    for (int c = 0; c < N; ++c) {
      target[layout == mem_col_major ? c * stride + r : r * stride + c] = source.x[r * N + c];
    }
  }
  __syncwarp();
}

template <int M, int N, int K, class T, class In, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, M, N, K, T>& target, const fragment<matrix_a, M, N, K, In, LayoutA>& a,
              const fragment<matrix_b, M, N, K, In, LayoutB>& b, const fragment<accumulator, M, N, K, T>& c) {
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      T sum = c.x[m * N + n];
      for (int k = 0; k < K; ++k) sum += static_cast<T>(a.x[m * K + k]) * static_cast<T>(b.x[k * N + n]);
      target.x[m * N + n] = sum;
    }
  }
}

}  // namespace nvcuda::wmma
