// prefix_attention on the device: out = drop(softmax(scale q [Pk; k]^T + mask)) [Pv; v]; the formulas of the backward
// are those of cpu/kernels/prefix_attention.h. The prefix is never concatenated to the keys. Three ways:
//
//   decode    a few queries, no dropout, forward: one kernel, a block a query and head, whose lanes share the columns
//   flash     half precision without mask and dropout: PyTorch's flash attention over the prefix and over the keys,
//             joined by their log-sum-exps; its backward twice, given the joint log-sum-exp
//   products  everything else: scores in the accumulation type, by batched products
//
// Types     All sums in the accumulation type (float32; float64 for float64). The flash backward adds up grad_q in an
//           order that may change from run to run, unless torch.use_deterministic_algorithms is on.
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/prefix_attention_checks.h"
#include "common/tensors.h"
#include "cuda/dropout.h"
#include "cuda/vectors.h"

namespace peft_ext::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// [prefix, kv_heads, dim] as keys or values of every batch entry, without a copy.
at::Tensor as_keys(const at::Tensor& prefix, const at::Tensor& k) {
  return prefix.to(k.scalar_type()).transpose(0, 1).expand({k.size(0), -1, -1, -1});
}

struct Options {
  const OptionalTensor& mask;
  bool causal;
  double scale, dropout_p;
  const OptionalTensor& seed;
};

// --- decode ---

constexpr int kDecodeWarps = 4, kMostDim = 256;
constexpr int kNeighbours = 8;  // Features of a row that a lane holds.
constexpr int kDecodeBatch =
    4;  // Columns of a group of lanes whose loads are all on their way before the first is used.

struct Decode {
  const void *q, *k, *v, *prefix_key, *prefix_value;  // The prefix is contiguous.
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  void *out, *lse;
  int heads, kv_heads, queries, keys, prefix, dim;
  double scale;
  bool causal, by_vectors;
};

// What a group of lanes has seen: sum = sum_c e**(score_c - most) v_c for its eight features, total = sum_c of the
// factor.
template <class C>
struct Seen {
  C most = -std::numeric_limits<C>::infinity(), total = 0, sum[kNeighbours] = {};
};

// Takes the group's share of `columns` keys and values: kLanes lanes a row of theirs, and every warp of the block, and
// every group of a warp, other columns. `left` is how many features there are from this lane's first on.
template <int kLanes, class C, class S>
__device__ inline void attend(Seen<C>& seen, const C (&query)[kNeighbours], const S* keys, const S* values,
                              int64_t key_stride, int64_t value_stride, int columns, int left, bool by_vectors) {
  constexpr int kGroups = kWarp / kLanes, kStep = kGroups * kDecodeBatch;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / kLanes;
  for (int first = warp * kStep; first < columns; first += kDecodeWarps * kStep) {
    S key[kDecodeBatch][kNeighbours], value[kDecodeBatch][kNeighbours];
    if (by_vectors) {
      // The last column in place of one beyond; a lane beyond the features reads those of the first.
      const int feature = left > 0 ? 0 : -lane % kLanes * kNeighbours;
#pragma unroll
      for (int i = 0; i < kDecodeBatch; ++i) {
        const int64_t column = min(first + i * kGroups + group, columns - 1);
        load_whole(key[i], keys + column * key_stride + feature);
        load_whole(value[i], values + column * value_stride + feature);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kDecodeBatch; ++i) {
        const int64_t column = first + i * kGroups + group;
        const int there = column < columns ? left : 0;
        load_elements(key[i], keys + column * key_stride, there, false);
        load_elements(value[i], values + column * value_stride, there, false);
      }
    }
    C scores[kDecodeBatch], most = seen.most;
#pragma unroll
    for (int i = 0; i < kDecodeBatch; ++i) {
      C product = 0;
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) product += query[j] * static_cast<C>(key[i][j]);
      if (left <= 0) product = 0;
#pragma unroll
      for (int bit = kLanes / 2; bit > 0; bit /= 2) product += __shfl_xor_sync(0xffffffffu, product, bit);
      scores[i] = first + i * kGroups + group < columns ? product : -std::numeric_limits<C>::infinity();
      most = most < scores[i] ? scores[i] : most;
    }
    const C shrink = most == seen.most ? C(1) : exp(seen.most - most);
    seen.most = most;
    seen.total *= shrink;
#pragma unroll
    for (int j = 0; j < kNeighbours; ++j) seen.sum[j] *= shrink;
#pragma unroll
    for (int i = 0; i < kDecodeBatch; ++i) {
      const bool there = first + i * kGroups + group < columns;
      const C weight = scores[i] == -std::numeric_limits<C>::infinity() ? C(0) : exp(scores[i] - most);
      seen.total += weight;
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) seen.sum[j] += there ? weight * static_cast<C>(value[i][j]) : C(0);
    }
  }
}

// Block x is query x of the flattened [batch, heads, queries]. What its groups of lanes have seen is joined in order.
template <class T, class P, int kLanes>
__global__ void __launch_bounds__(kDecodeWarps* kWarp) decode(const __grid_constant__ Decode p) {
  using C = Acc<T>;
  constexpr int kDim = kLanes * kNeighbours, kGroups = kDecodeWarps * kWarp / kLanes;
  __shared__ C sums[kGroups][kDim];
  __shared__ C largest[kGroups], totals[kGroups];
  const int64_t t = blockIdx.x % p.queries, head = blockIdx.x / p.queries % p.heads,
                batch = blockIdx.x / p.queries / p.heads, kv_head = head / (p.heads / p.kv_heads);
  const int group = threadIdx.x / kLanes, feature = threadIdx.x % kLanes * kNeighbours, left = p.dim - feature;
  const T* q = static_cast<const T*>(p.q) + batch * p.q_strides[0] + head * p.q_strides[1] + t * p.q_strides[2];
  C query[kNeighbours];
  load_elements(query, q + feature, left, false);
#pragma unroll
  for (int j = 0; j < kNeighbours; ++j) query[j] *= static_cast<C>(p.scale);

  Seen<C> seen;
  const int64_t prefix_stride = static_cast<int64_t>(p.kv_heads) * p.dim, prefix_place = kv_head * p.dim + feature;
  attend<kLanes>(seen, query, static_cast<const P*>(p.prefix_key) + prefix_place,
                 static_cast<const P*>(p.prefix_value) + prefix_place, prefix_stride, prefix_stride, p.prefix, left,
                 p.by_vectors);
  const int visible = p.causal ? max(min(static_cast<int>(t) + p.keys - p.queries + 1, p.keys), 0) : p.keys;
  attend<kLanes>(seen, query, static_cast<const T*>(p.k) + batch * p.k_strides[0] + kv_head * p.k_strides[1] + feature,
                 static_cast<const T*>(p.v) + batch * p.v_strides[0] + kv_head * p.v_strides[1] + feature,
                 p.k_strides[2], p.v_strides[2], visible, left, p.by_vectors);

  if (feature == 0) {
    largest[group] = seen.most;
    totals[group] = seen.total;
  }
#pragma unroll
  for (int j = 0; j < kNeighbours; ++j) sums[group][feature + j] = seen.sum[j];
  __syncthreads();

  C joint = largest[0], joint_total = 0;
  for (int g = 1; g < kGroups; ++g) joint = max(joint, largest[g]);
  C factors[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    factors[g] = totals[g] == C(0) ? C(0) : exp(largest[g] - joint);
    joint_total += totals[g] * factors[g];
  }
  T* out = static_cast<T*>(p.out) + batch * p.out_strides[0] + head * p.out_strides[1] + t * p.out_strides[2];
  for (int d = threadIdx.x; d < p.dim; d += kDecodeWarps * kWarp) {
    C value = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) value += factors[g] * sums[g][d];
    out[d] = static_cast<T>(joint_total == C(0) ? C(0) : value / joint_total);  // A NaN stays one.
  }
  if (threadIdx.x == 0) static_cast<C*>(p.lse)[blockIdx.x] = joint + log(joint_total);
}

void copy_strides(int64_t (&target)[3], const at::Tensor& tensor) {
  for (int i = 0; i < 3; ++i) target[i] = tensor.stride(i);
}

bool rows_are_aligned(const at::Tensor& tensor) {
  return is_aligned(tensor, tensor.stride(0), kNeighbours) && is_aligned(tensor, tensor.stride(1), kNeighbours) &&
         is_aligned(tensor, tensor.stride(2), kNeighbours);
}

std::tuple<at::Tensor, at::Tensor> decode_forward(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                                                  const at::Tensor& prefix_key, const at::Tensor& prefix_value,
                                                  const Options& options) {
  const at::Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
  const at::ScalarType acc = acc_type(q.scalar_type());
  const bool same = prefix_key.scalar_type() == q.scalar_type() && prefix_value.scalar_type() == q.scalar_type();
  const at::Tensor key = as_type(prefix_key, same ? q.scalar_type() : acc).contiguous();
  const at::Tensor value = as_type(prefix_value, same ? q.scalar_type() : acc).contiguous();
  const at::Tensor out = make_output(q);
  const at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(acc));
  Decode p{q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), key.const_data_ptr(), value.const_data_ptr()};
  copy_strides(p.q_strides, q);
  copy_strides(p.k_strides, k);
  copy_strides(p.v_strides, v);
  copy_strides(p.out_strides, out);
  p.out = out.data_ptr();
  p.lse = lse.data_ptr();
  p.heads = static_cast<int>(q.size(1));
  p.kv_heads = static_cast<int>(k.size(1));
  p.queries = static_cast<int>(q.size(2));
  p.keys = static_cast<int>(k.size(2));
  p.prefix = static_cast<int>(key.size(0));
  p.dim = static_cast<int>(q.size(3));
  p.scale = options.scale;
  p.causal = options.causal;
  p.by_vectors = rows_are_aligned(k) && rows_are_aligned(v) && is_aligned(key, q.size(3), kNeighbours) &&
                 is_aligned(value, q.size(3), kNeighbours) && q.size(3) % kNeighbours == 0;
  dispatch_pair(q.scalar_type(), key.scalar_type(), [&](auto t, auto f) {
    using T = decltype(t);
    using P = decltype(f);
    const auto run = [&](void (*kernel)(Decode)) {
      launch(kernel, dim3(grid_size(lse.numel())), dim3(kDecodeWarps * kWarp), 0, p);
    };
    constexpr int kFew = 8, kMore = 16;
    if (p.dim <= kFew * kNeighbours) return run(decode<T, P, kFew>);
    run(p.dim <= kMore * kNeighbours ? decode<T, P, kMore> : decode<T, P, kWarp>);
  });
  return {out, lse};
}

// --- flash ---

constexpr int kThreads = 256;
constexpr int kJoinLanes = 8;  // That share a row.

struct Join {
  const void *a, *b;  // [batch, heads, queries, dim] with contiguous dim.
  int64_t a_strides[3], b_strides[3], out_strides[3];
  const float *a_lse, *b_lse;  // [batch, heads, queries]
  void* out;
  float* lse;
  int64_t rows;
  int heads, queries, dim;
  bool aligned;
};

// out = (a e**lse_a + b e**lse_b) / e**lse, lse = log(e**lse_a + e**lse_b); eight lanes a row, eight neighbours each.
template <class T>
__global__ void __launch_bounds__(kThreads) join(const __grid_constant__ Join p) {
  const int lane = threadIdx.x % kJoinLanes;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kJoinLanes;
  if (row >= p.rows) return;
  const int64_t t = row % p.queries, head = row / p.queries % p.heads, batch = row / p.queries / p.heads;
  const float a_lse = p.a_lse[row], b_lse = p.b_lse[row];
  const float most = max(a_lse, b_lse);
  const float a_part = exp(a_lse - most), b_part = exp(b_lse - most), total = a_part + b_part;
  if (lane == 0) p.lse[row] = most + log(total);
  const T* a = static_cast<const T*>(p.a) + batch * p.a_strides[0] + head * p.a_strides[1] + t * p.a_strides[2];
  const T* b = static_cast<const T*>(p.b) + batch * p.b_strides[0] + head * p.b_strides[1] + t * p.b_strides[2];
  T* out = static_cast<T*>(p.out) + batch * p.out_strides[0] + head * p.out_strides[1] + t * p.out_strides[2];
  for (int d = lane * kNeighbours; d < p.dim; d += kJoinLanes * kNeighbours) {
    T left[kNeighbours], right[kNeighbours];
    load_elements(left, a + d, p.dim - d, p.aligned);
    load_elements(right, b + d, p.dim - d, p.aligned);
    float values[kNeighbours];
#pragma unroll
    for (int i = 0; i < kNeighbours; ++i) {
      values[i] = (a_part * static_cast<float>(left[i]) + b_part * static_cast<float>(right[i])) / total;
    }
    store_elements(out + d, values, p.dim - d, p.aligned);
  }
}

// What flash attention serves, and where every query sees its first key, so that no log-sum-exp is -inf.
bool flash_serves(const at::Tensor& q, const at::Tensor& k, const at::Tensor& prefix_key, const Options& options) {
  const bool half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  constexpr int64_t kEights = 8;
  return q.is_cuda() && half && !options.mask && options.dropout_p == 0.0 && q.numel() > 0 && k.size(2) > 0 &&
         prefix_key.size(0) > 0 && q.size(3) <= kMostDim && q.size(3) % kEights == 0 &&
         (!options.causal || q.size(2) == k.size(2));
}

struct Flash {
  at::Tensor out, lse, cum_q, cum_k;
  c10::SymInt max_q, max_k;
  at::Tensor seed, offset;
};

Flash flash(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal, double scale) {
  Flash result;
  at::Tensor debug_mask;
  std::tie(result.out, result.lse, result.cum_q, result.cum_k, result.max_q, result.max_k, result.seed, result.offset,
           debug_mask) = at::_scaled_dot_product_flash_attention(q, k, v, 0.0, causal, false, scale);
  return result;
}

std::tuple<at::Tensor, at::Tensor> flash_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                 const at::Tensor& prefix_key, const at::Tensor& prefix_value,
                                                 const Options& options) {
  const Flash prefix = flash(q, as_keys(prefix_key, k), as_keys(prefix_value, v), false, options.scale);
  const Flash own = flash(q, k, v, options.causal, options.scale);
  const at::Tensor prefix_lse = prefix.lse.contiguous(), own_lse = own.lse.contiguous();
  const at::Tensor out = make_output(q), lse = at::empty_like(own_lse);
  Join p{prefix.out.const_data_ptr(), own.out.const_data_ptr()};
  copy_strides(p.a_strides, prefix.out);
  copy_strides(p.b_strides, own.out);
  copy_strides(p.out_strides, out);
  p.a_lse = prefix_lse.const_data_ptr<float>();
  p.b_lse = own_lse.const_data_ptr<float>();
  p.out = out.data_ptr();
  p.lse = lse.data_ptr<float>();
  p.rows = lse.numel();
  p.heads = static_cast<int>(q.size(1));
  p.queries = static_cast<int>(q.size(2));
  p.dim = static_cast<int>(q.size(3));
  p.aligned = rows_are_aligned(prefix.out) && rows_are_aligned(own.out) && rows_are_aligned(out);
  const dim3 grid(grid_size(blocks_for(p.rows * kJoinLanes, kThreads)));
  dispatch_storage(q.scalar_type(), [&](auto t) { launch(join<decltype(t)>, grid, dim3(kThreads), 0, p); });
  return {out, lse};
}

// The gradients of q, k, v, prefix_key and prefix_value.
using Gradients = std::array<at::Tensor, 5>;

Gradients flash_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& out,
                         const at::Tensor& lse, const Options& options) {
  // As the kernel wants it, [batch, queries, heads, dim]: given otherwise it is copied by each of the two.
  const at::Tensor grad = grad_out.transpose(1, 2).contiguous().transpose(1, 2);
  // Without dropout nothing is drawn: the seeds are not read.
  const at::Tensor none, unused = at::empty({2}, q.options().dtype(at::kLong));
  const auto run = [&](const at::Tensor& keys, const at::Tensor& values, bool causal) {
    return at::_scaled_dot_product_flash_attention_backward(grad, q, keys, values, out, lse, none, none, q.size(2),
                                                            keys.size(2), 0.0, causal, unused, unused, options.scale);
  };
  const auto [q_prefix, key, value] = run(as_keys(prefix_key, k), as_keys(prefix_value, v), false);
  const auto [q_own, own_k, own_v] = run(k, v, options.causal);
  const auto over_batch = [&](const at::Tensor& grad) { return grad.sum(0, false, at::kFloat).transpose(0, 1); };
  at::Tensor grad_q = at::empty(q.sizes(), q.options());
  at::add_out(grad_q, q_own, q_prefix);
  return {grad_q, own_k, own_v, over_batch(key), over_batch(value)};
}

// --- products ---

// values[row, column] scaled where the dropout keeps it, else 0; the columns are those from `first` on.
template <class C>
__global__ void __launch_bounds__(kThreads)
    drop(C* values, int64_t count, int64_t columns, int64_t first, DeviceDropout dropout) {
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = at / columns, column = at % columns + first;
    const uint32_t bits =
        keep_bits(*dropout.seed, dropout.threshold, row, static_cast<uint32_t>(column / kColumnsPerBlock));
    values[at] = bits >> (column % kColumnsPerBlock) & 1 ? values[at] * static_cast<C>(dropout.scale) : C(0);
  }
}

// Scores, weights and their gradients, [batch, heads, queries, columns], of the prefix and of the keys.
struct Pair {
  at::Tensor prefix, own;
};

// All in the accumulation type, with a head of its own for every query head.
struct Products {
  Products(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_key,
           const at::Tensor& prefix_value, const Options& options)
      : options(options),
        dropout(make_device_dropout(options.dropout_p, options.seed)),
        groups(q.size(1) / k.size(1)),
        q(as_type(q, acc_type(q.scalar_type()))) {
    const auto type = this->q.scalar_type();
    const auto widened = [&](const at::Tensor& keys) { return as_type(keys, type).repeat_interleave(groups, 1); };
    this->k = widened(k);
    this->v = widened(v);
    key = as_type(prefix_key, type).transpose(0, 1).repeat_interleave(groups, 0);
    value = as_type(prefix_value, type).transpose(0, 1).repeat_interleave(groups, 0);
  }

  Pair scores() const {
    const at::Tensor scaled = q.mul(options.scale);
    Pair result{at::matmul(scaled, key.transpose(1, 2)), at::matmul(scaled, k.transpose(2, 3))};
    const double hidden = -std::numeric_limits<double>::infinity();
    if (options.causal) {
      const int64_t queries = q.size(2), keys = k.size(2);
      const at::Tensor visible = at::ones({queries, keys}, q.options().dtype(at::kBool)).tril(keys - queries);
      result.own.masked_fill_(visible.logical_not(), hidden);
    }
    if (options.mask && options.mask->scalar_type() == at::kBool) {
      result.own.masked_fill_(options.mask->logical_not(), hidden);
    } else if (options.mask) {
      result.own.add_(*options.mask);
    }
    return result;
  }

  // The softmax, 0 where nothing is visible.
  Pair weights(const at::Tensor& lse) const {
    Pair result = scores();
    const at::Tensor shift = lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1);
    result.prefix.sub_(shift).exp_();
    result.own.sub_(shift).exp_();
    return result;
  }

  Pair dropped(const Pair& pair) const {
    if (dropout.threshold == 0) return pair;
    return {dropped(pair.prefix, 0), dropped(pair.own, key.size(1))};
  }

  at::Tensor dropped(const at::Tensor& values, int64_t first) const {
    const at::Tensor result = values.clone(at::MemoryFormat::Contiguous);
    if (result.numel() == 0) return result;
    const dim3 grid(grid_size(blocks_for(result.numel(), kThreads), 1 << 16));
    dispatch_storage(result.scalar_type(), [&](auto t) {
      using T = decltype(t);
      if constexpr (std::is_same_v<T, Acc<T>>) {
        launch(drop<T>, grid, dim3(kThreads), 0, result.data_ptr<T>(), result.numel(), result.size(3), first, dropout);
      }
    });
    return result;
  }

  // The gradient of k or v from that of its copies for the query heads.
  at::Tensor over_groups(const at::Tensor& grad) const {
    if (groups == 1) return grad;
    return grad.view({grad.size(0), grad.size(1) / groups, groups, grad.size(2), grad.size(3)}).sum(2);
  }

  // Likewise of the prefix, [prefix, kv_heads, dim].
  at::Tensor over_batch(const at::Tensor& grad) const { return over_groups(grad).sum(0).transpose(0, 1); }

  const Options& options;
  const DeviceDropout dropout;
  const int64_t groups;
  const at::Tensor q;     // [batch, heads, queries, dim]
  at::Tensor k, v;        // [batch, heads, keys, dim]
  at::Tensor key, value;  // [heads, prefix, dim]
};

std::tuple<at::Tensor, at::Tensor> products_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& prefix_key, const at::Tensor& prefix_value,
                                                    const Options& options) {
  const Products products(q, k, v, prefix_key, prefix_value, options);
  const Pair scores = products.scores();
  const at::Tensor lse =
      at::logaddexp(at::logsumexp(scores.prefix, {-1}, false), at::logsumexp(scores.own, {-1}, false));
  const Pair weights = products.dropped(products.weights(lse));
  const at::Tensor out = make_output(q);
  out.copy_(at::matmul(weights.prefix, products.value).add_(at::matmul(weights.own, products.v)));
  return {out, lse};
}

Gradients products_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& out,
                            const at::Tensor& lse, const Options& options) {
  const Products products(q, k, v, prefix_key, prefix_value, options);
  const at::Tensor grad = as_type(grad_out, products.q.scalar_type());
  const Pair weights = products.weights(lse), dropped = products.dropped(weights);
  const at::Tensor delta = grad.mul(out).sum(-1, true);
  const Pair through = products.dropped(
      {at::matmul(grad, products.value.transpose(1, 2)), at::matmul(grad, products.v.transpose(2, 3))});
  const at::Tensor prefix = weights.prefix.mul(through.prefix.sub(delta)).mul_(options.scale);
  const at::Tensor own = weights.own.mul(through.own.sub(delta)).mul_(options.scale);
  return {at::matmul(prefix, products.key).add_(at::matmul(own, products.k)),
          products.over_groups(at::matmul(own.transpose(2, 3), products.q)),
          products.over_groups(at::matmul(dropped.own.transpose(2, 3), grad)),
          products.over_batch(at::matmul(prefix.transpose(2, 3), products.q)),
          products.over_batch(at::matmul(dropped.prefix.transpose(2, 3), grad))};
}

// --- the op ---

std::tuple<at::Tensor, at::Tensor> prefix_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& prefix_key, const at::Tensor& prefix_value,
                                                    const OptionalTensor& attn_mask, bool is_causal, double scale,
                                                    double dropout_p, const OptionalTensor& seed) {
  check_prefix_attention(q, k, v, prefix_key, prefix_value, attn_mask, scale, dropout_p, seed);
  const c10::cuda::CUDAGuard guard(q.device());
  const Options options{attn_mask, is_causal, scale, dropout_p, seed};
  if (q.numel() == 0) {
    const auto acc = q.options().dtype(acc_type(q.scalar_type()));
    return {make_output(q), at::empty({q.size(0), q.size(1), q.size(2)}, acc)};
  }
  constexpr int64_t kFewQueries = 4;
  if (q.size(2) <= kFewQueries && q.size(3) <= kMostDim && !attn_mask && dropout_p == 0.0) {
    return decode_forward(q, k, v, prefix_key, prefix_value, options);
  }
  if (flash_serves(q, k, prefix_key, options)) return flash_forward(q, k, v, prefix_key, prefix_value, options);
  return products_forward(q, k, v, prefix_key, prefix_value, options);
}

std::vector<at::Tensor> prefix_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& prefix_key,
                                                  const at::Tensor& prefix_value, const OptionalTensor& attn_mask,
                                                  const at::Tensor& out, const at::Tensor& lse, bool is_causal,
                                                  double scale, double dropout_p, const OptionalTensor& seed,
                                                  std::array<bool, 5> needs) {
  check_prefix_attention(q, k, v, prefix_key, prefix_value, attn_mask, scale, dropout_p, seed);
  check_prefix_attention_saved(grad_out, q, out, lse);
  const c10::cuda::CUDAGuard guard(q.device());
  const Options options{attn_mask, is_causal, scale, dropout_p, seed};
  const auto run = flash_serves(q, k, prefix_key, options) ? flash_backward : products_backward;
  const Gradients all = run(grad_out, q, k, v, prefix_key, prefix_value, out, lse.contiguous(), options);
  const at::Tensor* likes[] = {&q, &k, &v, &prefix_key, &prefix_value};
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < needs.size(); ++i) {
    if (needs[i]) grads.push_back(as_type(all[i], likes[i]->scalar_type()).contiguous());
  }
  return grads;
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("prefix_attention", prefix_attention);
  m.impl("prefix_attention_backward", prefix_attention_backward);
}

}  // namespace
}  // namespace peft_ext::cuda
