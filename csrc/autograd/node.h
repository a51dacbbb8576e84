// How the ops enter the autograd graph.
//
// A node of torch's own kind in place of torch::autograd::Function, which prepares at every call for what these ops do
// not do (values by name, results made in place, sizes of each input): 4 us, a tenth of a linear layer of one row.
//
// An op is a struct with its name in the graph and its derivative:
//
//   static constexpr const char* kName;
//   static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs& needs,
//                                 Constants...);
//
// which gets the gradients of the results (not all undefined), the saved tensors, for each edge whether its gradient is
// asked for, and the constants; it returns a gradient, or none, for each edge.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <typeinfo>
#include <utility>
#include <vector>

#include "autograd/common.h"

namespace peft_ext {

using torch::autograd::collect_next_edges;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::variable_list;
using Needs = std::vector<bool>;
// std::shared_ptr up to torch 2.11; c10::intrusive_ptr in 2.13.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class Op, class... Constants>
class OpNode final : public Node {
 public:
  explicit OpNode(edge_list&& edges, const Constants&... constants)
      : Node(std::move(edges)), constants_(constants...) {}

  // After the results are this node's: one of them is saved without a reference to it, which would be a cycle.
  void save(const variable_list& tensors) {
    saved_.reserve(tensors.size());
    for (const auto& tensor : tensors) {
      const bool is_result = tensor.defined() && tensor.grad_fn().get() == this;
      saved_.emplace_back(tensor, is_result);
    }
  }

  std::string name() const override { return Op::kName; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return differentiate(grads, unpack(), needs(), constants_);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& tensor : saved_) tensor.reset_data();
  }

  // Compiled autograd: what a compiled backward is reused for, and how the node is written into its graph.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(saved_, /*is_output=*/true);
    std::apply([&args](const auto&... constant) { (args.collect(constant), ...); }, constants_);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    namespace dynamo = torch::dynamo::autograd;
    swap.before(saved_);
    const auto values =
        std::apply([this](const auto&... constant) { return std::vector<c10::IValue>{unpack(), needs(), constant...}; },
                   constants_);
    std::vector<at::TypePtr> schema;
    for (const auto& value : values) schema.push_back(value.type());

    const auto& compiler = dynamo::getPyCompilerInterface();
    const std::string bound = compiler->bind_function(swap.get_py_compiler(), typeid(Op).name(), apply_packed, schema,
                                                      /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto next = dynamo::get_input_metadata(next_edges());
    auto result =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", bound, grads, values,
                                dynamo::IValuePacker<std::vector<std::optional<dynamo::InputMetadata>>>::pack(next));
    swap.after(saved_);
    return result;
  }

 private:
  static variable_list differentiate(const variable_list& grads, const variable_list& saved, const Needs& needs,
                                     const std::tuple<Constants...>& constants) {
    const bool none = std::none_of(grads.begin(), grads.end(), [](const auto& grad) { return grad.defined(); });
    if (none) return variable_list(needs.size());
    return std::apply([&](const auto&... constant) { return Op::backward(grads, saved, needs, constant...); },
                      constants);
  }

  // `values` as apply_with_saved packs them.
  static variable_list apply_packed(const variable_list& grads, const std::vector<c10::IValue>& values) {
    auto next = values.begin();
    const auto saved = (next++)->to<variable_list>();
    const auto needs = (next++)->to<Needs>();
    const std::tuple<Constants...> constants{(next++)->to<Constants>()...};  // In order, as they are in braces.
    return differentiate(grads, saved, needs, constants);
  }

  variable_list unpack() {
    variable_list tensors;
    tensors.reserve(saved_.size());
    for (const auto& tensor : saved_) tensors.push_back(tensor.unpack(this->getptr()));
    return tensors;
  }

  Needs needs() const {
    Needs result(num_outputs());
    for (size_t i = 0; i < result.size(); ++i) result[i] = task_should_compute_output(i);
    return result;
  }

  std::vector<torch::autograd::SavedVariable> saved_;
  std::tuple<Constants...> constants_;
};

template <class N, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    return std::shared_ptr<N>(new N(std::forward<Args>(args)...), [](N* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
  }
}

// Makes `results`, computed below autograd, results of `Op` with `edges` to its inputs.
template <class Op, class... Constants>
void record(const variable_list& results, edge_list&& edges, const variable_list& saved,
            const Constants&... constants) {
  const auto node = make_node<OpNode<Op, Constants...>>(std::move(edges), constants...);
  torch::autograd::set_history(results, node);
  node->save(saved);
}

// For ops whose backward has an argument `needs` of so many inputs.
template <size_t kInputs>
std::array<bool, kInputs> as_array(const Needs& needs) {
  std::array<bool, kInputs> result;
  std::copy_n(needs.begin(), kInputs, result.begin());
  return result;
}

// The gradients that a backward returned for what was needed, each at the place of its input.
inline variable_list spread(std::vector<at::Tensor> grads, const Needs& needs) {
  variable_list result(needs.size());
  auto next = grads.begin();
  for (size_t i = 0; i < needs.size(); ++i) {
    if (needs[i]) result[i] = std::move(*next++);
  }
  return result;
}

struct NoDerivative {
  static constexpr const char* kName = "NoDerivative";
  static variable_list backward(const variable_list&, const variable_list&, const Needs&, const std::string& op) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, op, " has no derivative: double backward is not implemented");
  }
};

// Runs `call`, a backward op named `op`, below autograd. Its results have no derivative: asking for one is an error.
template <class Call, class... Tensors>
std::vector<at::Tensor> without_derivative(const char* op, const Call& call, const Tensors&... inputs) {
  check_no_tangent(op, inputs...);
  std::vector<at::Tensor> grads = below_autograd(call);
  if (any_requires_grad(inputs...)) record<NoDerivative>(grads, collect_next_edges(inputs...), {}, std::string(op));
  return grads;
}

}  // namespace peft_ext
