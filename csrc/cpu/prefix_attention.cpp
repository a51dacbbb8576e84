#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "common/prefix_attention_checks.h"
#include "cpu/chunk_sums.h"
#include "cpu/dropout.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"

namespace peft_ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// empty_like, but with contiguous features: of memory that overlaps it may give another order of strides.
at::Tensor empty_rows_like(const at::Tensor& like) {
  const at::Tensor result = at::empty_like(like);
  return has_contiguous_rows(result) ? result : at::empty(like.sizes(), like.options());
}

Strided<const void*> view(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Strided<void*> mutable_view(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The mask as the kernel reads it: broadcast dimensions stay strides of 0, only the keys' is written out.
at::Tensor prepare_mask(const OptionalTensor& mask, const at::Tensor& q, const at::Tensor& k, at::ScalarType acc) {
  if (!mask) return {};
  at::Tensor prepared = mask->scalar_type() == at::kBool ? *mask : mask->to(acc);
  while (prepared.dim() < 4) prepared = prepared.unsqueeze(0);
  if (prepared.size(3) != k.size(2)) prepared = prepared.expand({-1, -1, -1, k.size(2)});
  if (prepared.size(3) > 1 && prepared.stride(3) != 1) prepared = prepared.contiguous();
  return prepared.expand({q.size(0), q.size(1), q.size(2), k.size(2)});
}

// The tensors as the kernels want them, kept alive while they run.
struct Arguments {
  Arguments(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& prefix_key,
            const at::Tensor& prefix_value, const OptionalTensor& attn_mask)
      : q(with_contiguous_rows(q_)), k(with_contiguous_rows(k_)), v(with_contiguous_rows(v_)) {
    const auto acc = acc_type(q.scalar_type());
    mask = prepare_mask(attn_mask, q, k, acc);
    key = prefix_key.to(acc).transpose(0, 1).contiguous();
    value = prefix_value.to(acc).transpose(0, 1).contiguous();
    key_t = key.transpose(1, 2).contiguous();
  }

  void fill(PrefixAttention& problem, bool is_causal, double scale, const Dropout& dropout) const {
    problem.batch = q.size(0);
    problem.heads = q.size(1);
    problem.kv_heads = k.size(1);
    problem.queries = q.size(2);
    problem.keys = k.size(2);
    problem.prefix = key.size(1);
    problem.dim = q.size(3);
    problem.scale = scale;
    problem.causal = is_causal;
    problem.widen = acc_type(q.scalar_type()) != q.scalar_type();
    problem.dropout = dropout;
    if (mask.defined()) {
      problem.mask = {mask.const_data_ptr(), mask.scalar_type() == at::kBool, mask.stride(0), mask.stride(1),
                      mask.stride(2)};
    }
    problem.q = view(q);
    problem.k = view(k);
    problem.v = view(v);
    problem.prefix_key = key.const_data_ptr();
    problem.prefix_value = value.const_data_ptr();
    problem.prefix_key_t = key_t.const_data_ptr();
  }

  at::Tensor q, k, v, mask, key, value, key_t;
};

// The prefix as right operands of AMX products, kept alive likewise.
struct PrefixTiles {
  PrefixTiles(const Arguments& arguments, int parts_, bool backward) : parts(parts_) {
    const auto pack = [&](const at::Tensor& source) {
      return pack_tiles(source.flatten(0, 1), source.size(0), parts, false);
    };
    key_t = pack(arguments.key);
    if (!backward) value = pack(arguments.value.transpose(1, 2).contiguous());
    if (backward) value_t = pack(arguments.value);
    if (backward) key = pack(arguments.key_t);
  }

  void fill(PrefixAttention& problem) const {
    problem.parts = parts;
    problem.prefix_key_t_tiles = key_t.const_data_ptr();
    problem.prefix_value_tiles = data_or_null(value);
    problem.prefix_value_t_tiles = data_or_null(value_t);
    problem.prefix_key_tiles = data_or_null(key);
  }

  int parts;
  at::Tensor key, value, key_t, value_t;
};

// Calls task(index, memory) for each index, with scratch memory for each thread.
template <class Task>
void run_each(int64_t elements, int64_t tasks, const at::Tensor& like, const Task& task) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  run_tasks(tasks, at::empty({threads, elements}, like.options()), [&](int64_t begin, int64_t end, void* memory) {
    for (int64_t i = begin; i < end; ++i) task(i, memory);
  });
}

// Whether the products run on AMX (kernels/amx.h): where a head has so many queries.
constexpr int64_t kForwardTileQueries = 16, kBackwardTileQueries = 32;

bool worth_tiles(const PrefixAttention& problem, at::ScalarType type, int64_t queries) {
  return type == at::kBFloat16 && cpu_has_amx() && problem.heads / problem.kv_heads * problem.queries >= queries;
}

std::tuple<at::Tensor, at::Tensor> prefix_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& prefix_key, const at::Tensor& prefix_value,
                                                    const OptionalTensor& attn_mask, bool is_causal, double scale,
                                                    double dropout_p, const OptionalTensor& seed) {
  check_prefix_attention(q, k, v, prefix_key, prefix_value, attn_mask, scale, dropout_p, seed);
  const Arguments arguments(q, k, v, prefix_key, prefix_value, attn_mask);
  const at::Tensor out = make_output(q);
  const at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(acc_type(q.scalar_type())));
  if (out.numel() == 0) return {out, lse};

  PrefixAttentionForward problem{};
  arguments.fill(problem, is_causal, scale, make_dropout(dropout_p, seed));
  problem.out = mutable_view(out);
  problem.lse = lse.data_ptr();
  const auto& kernels = prefix_attention_kernels(q.scalar_type());
  const auto run = [&](int64_t batch, int64_t elements) {
    const int64_t groups = (problem.batch + batch - 1) / batch;
    run_each(elements, groups * problem.kv_heads, arguments.key, [&](int64_t task, void* memory) {
      const int64_t begin = task / problem.kv_heads * batch;
      kernels.forward(problem, task % problem.kv_heads, begin, std::min(problem.batch, begin + batch), memory);
    });
  };
  if (!worth_tiles(problem, q.scalar_type(), kForwardTileQueries)) {
    const PrefixAttentionPlan plan(problem);
    run(plan.batch, plan.elements(problem));
    return {out, lse};
  }
  const PrefixTiles tiles(arguments, tile_parts(prefix_key, prefix_value), false);
  tiles.fill(problem);
  const PrefixAttentionTiles plan(problem);
  run(plan.batch, plan.forward_elements());
  return {out, lse};
}

// The groups of batch entries are split into so many parts, each with a sum of the prefix's gradient: enough to share
// among threads, few enough that the sums stay small beside k and v.
int64_t count_parts(const PrefixAttention& problem, int64_t groups) {
  constexpr int64_t kTasks = 64;
  return std::clamp<int64_t>((kTasks + problem.kv_heads - 1) / problem.kv_heads, 1, groups);
}

std::vector<at::Tensor> prefix_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& prefix_key,
                                                  const at::Tensor& prefix_value, const OptionalTensor& attn_mask,
                                                  const at::Tensor& out, const at::Tensor& lse, bool is_causal,
                                                  double scale, double dropout_p, const OptionalTensor& seed,
                                                  std::array<bool, 5> needs) {
  check_prefix_attention(q, k, v, prefix_key, prefix_value, attn_mask, scale, dropout_p, seed);
  check_prefix_attention_saved(grad_out, q, out, lse);
  const auto [needs_q, needs_k, needs_v, needs_key, needs_value] = needs;
  const Arguments arguments(q, k, v, prefix_key, prefix_value, attn_mask);
  const bool empty = out.numel() == 0;
  const auto make_grad = [empty](bool needed, const at::Tensor& like) {
    if (!needed) return at::Tensor();
    const at::Tensor grad = empty_rows_like(like);
    return empty ? grad.zero_() : grad;
  };
  const at::Tensor grad_q = make_grad(needs_q, arguments.q), grad_k = make_grad(needs_k, arguments.k),
                   grad_v = make_grad(needs_v, arguments.v);

  PrefixAttentionBackward problem{};
  arguments.fill(problem, is_causal, scale, make_dropout(dropout_p, seed));
  std::optional<PrefixTiles> tiles;
  if (!empty && worth_tiles(problem, q.scalar_type(), kBackwardTileQueries)) {
    tiles.emplace(arguments, tile_parts(prefix_key, prefix_value), true).fill(problem);
  }
  const PrefixAttentionPlan plan(problem);
  const PrefixAttentionTiles tile_plan(problem);
  const int64_t batch = tiles ? tile_plan.batch : plan.batch;
  const int64_t groups = empty ? 1 : (problem.batch + batch - 1) / batch, parts = count_parts(problem, groups);
  const std::array<int64_t, 3> prefix_shape{problem.kv_heads, problem.prefix, problem.dim};
  const ChunkSums key_sums(needs_key, parts, prefix_shape, arguments.key.options()),
      value_sums(needs_value, parts, prefix_shape, arguments.key.options());
  key_sums.clear();
  value_sums.clear();
  if (!empty) {
    const at::Tensor value_t = tiles ? at::Tensor() : arguments.value.transpose(1, 2).contiguous();
    const at::Tensor grad_rows = with_contiguous_rows(grad_out), out_rows = with_contiguous_rows(out);
    const at::Tensor lse_rows = lse.contiguous();
    problem.prefix_value_t = data_or_null(value_t);
    problem.out = view(out_rows);
    problem.grad_out = view(grad_rows);
    problem.lse = lse_rows.const_data_ptr();
    problem.grad_q = mutable_view(grad_q);
    problem.grad_k = mutable_view(grad_k);
    problem.grad_v = mutable_view(grad_v);
    const auto& kernels = prefix_attention_kernels(q.scalar_type());
    const int64_t elements = tiles ? tile_plan.backward_elements() : plan.elements(problem);
    run_each(elements, parts * problem.kv_heads, arguments.key, [&](int64_t task, void* memory) {
      const int64_t part = task / problem.kv_heads;
      const int64_t begin = part * groups / parts * batch, end = (part + 1) * groups / parts * batch;
      kernels.backward(problem, task % problem.kv_heads, begin, std::min(problem.batch, end), key_sums.of_chunk(part),
                       value_sums.of_chunk(part), memory);
    });
  }
  std::vector<at::Tensor> grads;
  for (const at::Tensor& grad : {grad_q, grad_k, grad_v}) {
    if (grad.defined()) grads.push_back(grad);
  }
  const auto total = [](const ChunkSums& sums) { return sums.total().transpose(0, 1).contiguous(); };
  if (needs_key) grads.push_back(total(key_sums).to(prefix_key.scalar_type()));
  if (needs_value) grads.push_back(total(value_sums).to(prefix_value.scalar_type()));
  return grads;
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("prefix_attention", prefix_attention);
  m.impl("prefix_attention_backward", prefix_attention_backward);
}

}  // namespace
}  // namespace peft_ext
