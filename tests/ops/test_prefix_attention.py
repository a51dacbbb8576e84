from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from peft_ext import ops, reference
from peft_ext._loader import native_devices

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GRADIENTS = ("q", "k", "v", "prefix_key", "prefix_value")
# Largest error allowed, relative to the largest element of the float64 result.
TOLERANCE = {F64: 1e-13, F32: 5e-6, BF16: 2e-2, F16: 4e-3}
# batch, heads, kv_heads, queries, keys, prefix, head_dim: odd sizes, tails, GQA, decoding alone and in a batch, a
# prefix longer than the keys, none, no keys, several blocks of queries.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 17, 17, 5, 16),
    (3, 4, 2, 7, 7, 33, 8),
    (70, 2, 2, 1, 9, 10, 16),
    (2, 4, 1, 3, 40, 3, 17),
    (5, 6, 3, 2, 11, 4, 33),
    (2, 2, 2, 130, 130, 10, 32),
    (1, 2, 1, 70, 150, 0, 16),
    (2, 2, 1, 5, 0, 6, 8),
    (1, 1, 1, 9, 2100, 7, 16),
    (2, 4, 2, 17, 33, 40, 17),
    (1, 4, 2, 33, 50, 20, 40),
]

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")


@dataclass
class Problem:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 6
    keys: int = 6
    prefix: int = 3
    dim: int = 8
    dtype: torch.dtype = F32
    prefix_dtype: torch.dtype | None = None
    mask: str = "none"
    is_causal: bool = False
    dropout_p: float = 0.0
    device: torch.device | str = "cpu"
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        def random(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, device=self.device).to(dtype)

        prefix_dtype = self.prefix_dtype or self.dtype
        self.tensors = {
            "q": random(self.batch, self.heads, self.queries, self.dim),
            "k": random(self.batch, self.kv_heads, self.keys, self.dim),
            "v": random(self.batch, self.kv_heads, self.keys, self.dim),
            "prefix_key": random(self.prefix, self.kv_heads, self.dim, dtype=prefix_dtype),
            "prefix_value": random(self.prefix, self.kv_heads, self.dim, dtype=prefix_dtype),
        }
        self.attn_mask = self.make_mask()
        self.seed = torch.tensor([0x123456789ABCDEF], device=self.device) if self.dropout_p else None

    def make_mask(self) -> Tensor | None:
        if self.mask == "none":
            return None
        if self.mask == "padding":
            lengths = (self.keys - 1 - torch.arange(self.batch, device=self.device)).clamp_min(1)
            return (torch.arange(self.keys, device=self.device) < lengths[:, None])[:, None, None]
        if self.mask == "bool":
            return torch.rand(self.batch, 1, self.queries, self.keys, device=self.device) > 0.5
        return torch.randn(self.heads, self.queries, self.keys, device=self.device).to(self.dtype)

    def call(self, op, **tensors: Tensor) -> Tensor:
        values = {**self.tensors, **tensors}
        mask = self.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(values["q"].dtype)
        options = {"is_causal": self.is_causal, "dropout_p": self.dropout_p, "seed": self.seed}
        return op(*values.values(), mask, scale=0.3, **options)

    def solve(self, op, dtype: torch.dtype | None = None, needs: tuple[str, ...] = GRADIENTS) -> dict[str, Tensor]:
        tensors = {
            name: tensor.to(dtype or tensor.dtype).detach().requires_grad_(name in needs)
            for name, tensor in self.tensors.items()
        }
        out = self.call(op, **tensors)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(self.dtype).to(out)
        grads = torch.autograd.grad(out, [tensors[n] for n in needs], grad) if needs else []
        return {"out": out.detach(), **dict(zip(needs, grads, strict=True))}

    def check(self) -> None:
        """The op against its oracle in float64."""
        got, wanted = self.solve(ops.prefix_attention), self.solve(reference.prefix_attention, F64)
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[self.prefix_dtype or self.dtype])
        # the gradients' own magnitude may vanish (one key: softmax is constant)
        smallest = max((value.abs().max().item() for value in wanted.values() if value.numel()), default=0.0) * 1e-2
        for name, value in got.items():
            like = self.tensors["q" if name == "out" else name]
            assert value.dtype == like.dtype, name
            assert value.shape == wanted[name].shape, name
            if value.numel():
                scale = max(wanted[name].abs().max().item(), smallest, 1e-30)
                error = (value.double() - wanted[name]).abs().max().item() / scale
                assert error <= tolerance, f"{name}: error {error:.1e} > {tolerance:.1e}"


NAMES = ("batch", "heads", "kv_heads", "queries", "keys", "prefix", "dim")


def sized(size: tuple[int, ...], **options: object) -> Problem:
    return Problem(**dict(zip(NAMES, size, strict=True)), **options)


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("mask", ["none", "padding", "bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, is_causal, mask, device):
    sized(size, is_causal=is_causal, mask=mask, device=device).check()


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "prefix_dtype"), [(F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)], ids=str
)
def test_dtypes(dtype, prefix_dtype, size, is_causal, device):
    sized(size, dtype=dtype, prefix_dtype=prefix_dtype, is_causal=is_causal, mask="float", device=device).check()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [SIZES[6], SIZES[-2], SIZES[-1]], ids=str)
def test_float32_prefix_beside_bfloat16(size, is_causal, device):
    """The gradient of its values is as exact as float32, since it is of what is given: also in parts of bfloat16."""
    problem = sized(size, dtype=BF16, prefix_dtype=F32, is_causal=is_causal, device=device)
    got, wanted = problem.solve(ops.prefix_attention), problem.solve(reference.prefix_attention, F64)
    torch.testing.assert_close(got["prefix_value"].double(), wanted["prefix_value"], rtol=1e-5, atol=1e-5)


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dropout_matches_float64(size, is_causal, dtype, device):
    sized(size, dtype=dtype, is_causal=is_causal, dropout_p=0.3, device=device).check()


@pytest.mark.parametrize("p", [1e-9, 1.0])
def test_dropout_extremes(p):
    problem = Problem(dropout_p=p)
    problem.check()
    out = problem.call(ops.prefix_attention)
    problem.dropout_p = 0.0
    wanted = problem.call(ops.prefix_attention) * (0.0 if p == 1.0 else 1.0)
    torch.testing.assert_close(out, wanted)


def test_seed_follows_the_generator():
    problem = Problem(dropout_p=0.5)
    problem.seed = None
    torch.manual_seed(5)
    first, second = problem.call(ops.prefix_attention), problem.call(ops.prefix_attention)
    torch.manual_seed(5)
    assert torch.equal(problem.call(ops.prefix_attention), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [SIZES[1], SIZES[2], SIZES[3], SIZES[6]], ids=str)
def test_equals_concatenation_and_sdpa(size):
    """The peer, on the same problem: the prefix expanded over the batch and concatenated."""
    problem = sized(size, is_causal=True)
    q, k, v, prefix_key, prefix_value = problem.tensors.values()
    keys, values = (
        torch.cat([prefix.transpose(0, 1).expand(len(q), -1, -1, -1), own], 2)
        for prefix, own in ((prefix_key, k), (prefix_value, v))
    )
    visible = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
    mask = torch.cat([torch.ones(q.size(2), len(prefix_key), dtype=torch.bool), visible], 1)
    wanted = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
    got = ops.prefix_attention(q, k, v, prefix_key, prefix_value, is_causal=True)
    torch.testing.assert_close(got, wanted)


def test_causal_is_aligned_to_the_last_key():
    """Decoding step by step over a cache gives what the whole sequence gives."""
    problem = Problem(queries=9, keys=9, is_causal=True)
    whole = problem.call(ops.prefix_attention)
    q, k, v = (problem.tensors[name] for name in "qkv")
    for t in range(9):
        step = problem.call(ops.prefix_attention, q=q[:, :, t : t + 1], k=k[:, :, : t + 1], v=v[:, :, : t + 1])
        torch.testing.assert_close(step, whole[:, :, t : t + 1])
    tail = problem.call(ops.prefix_attention, q=q[:, :, 5:])
    torch.testing.assert_close(tail, whole[:, :, 5:])


def test_query_that_sees_nothing_gives_zero():
    problem = Problem(prefix=0, is_causal=True, queries=6, keys=4)
    solution = problem.solve(ops.prefix_attention)
    assert torch.equal(solution["out"][:, :, :2], torch.zeros_like(solution["out"][:, :, :2]))
    assert torch.equal(solution["q"][:, :, :2], torch.zeros_like(solution["q"][:, :, :2]))
    problem.check()


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("queries", [0, 3])
@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("prefix", [0, 2])
def test_empty(batch, queries, keys, prefix):
    Problem(batch=batch, queries=queries, keys=keys, prefix=prefix).check()


@pytest.mark.parametrize("queries", [1, 5, 70])
@pytest.mark.parametrize("mask", ["none", "float"])
def test_non_contiguous_arguments(queries, mask):
    problem = Problem(queries=queries, keys=70, mask=mask)
    for name, tensor in problem.tensors.items():
        strided = torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
        assert not strided.is_contiguous()
        problem.tensors[name] = strided
    problem.check()


@pytest.mark.parametrize("queries", [1, 5, 70])
def test_layouts_of_transformers(queries):
    """[batch, length, heads, dim] transposed; slices of one projection; keys expanded over the batch."""
    problem = Problem(queries=queries, keys=queries, kv_heads=4)
    joint = torch.randn(2, queries, 3, 4, 8)
    problem.tensors.update(zip("qkv", (joint[:, :, i].transpose(1, 2) for i in range(3)), strict=True))
    problem.check()
    problem.tensors["k"] = torch.randn(1, 4, 1, 8).expand(2, 4, queries, 8)
    problem.tensors["prefix_key"] = torch.randn(3, 6, 4, 8)[:, 2]
    problem.check()


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("dim", [5, 8])
def test_rows_that_overlap(queries, dim):
    """Windows over one sequence, whose strides do not say which dimension is the last."""
    problem = Problem(queries=queries, dim=dim)
    for name in "qkv":
        _, heads, length, _ = problem.tensors[name].shape
        problem.tensors[name] = torch.randn(2, heads, length + dim - 1).unfold(-1, dim, 1)
    tensors = {name: tensor.detach() for name, tensor in problem.tensors.items()}
    found = []
    for op, dtype in ((ops.prefix_attention, F32), (reference.prefix_attention, F64)):
        # not through solve(), which copies the arguments
        leaves = [
            t.requires_grad_() if dtype == F32 else t.detach().to(dtype).requires_grad_() for t in tensors.values()
        ]
        out = op(*leaves, scale=0.3)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted.float())
    if "cpu" in native_devices:
        plain = [tensor.detach() for tensor in tensors.values()]
        out, lse = torch.ops.peft_ext.prefix_attention(*plain)
        opcheck(
            torch.ops.peft_ext.prefix_attention_backward,
            (torch.randn_like(out), *plain, None, out, lse, False, 1.0, 0.0, None, [True] * 5),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_prefix_with_a_leading_one():
    problem = Problem()
    batched = {name: problem.tensors[name][None] for name in ("prefix_key", "prefix_value")}
    assert torch.equal(problem.call(ops.prefix_attention, **batched), problem.call(ops.prefix_attention))


def test_expanded_gradient():
    problem = Problem()
    q = problem.tensors["q"].requires_grad_()
    problem.call(ops.prefix_attention).sum().backward()
    oracle = q.detach().clone().requires_grad_()
    problem.call(reference.prefix_attention, q=oracle).sum().backward()
    torch.testing.assert_close(q.grad, oracle.grad)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("queries", [1, 5])
def test_gradcheck(queries, mask, dropout_p):
    problem = Problem(
        queries=queries, keys=5, prefix=2, dim=3, dtype=F64, mask=mask, is_causal=True, dropout_p=dropout_p
    )
    inputs = tuple(problem.tensors[name].requires_grad_() for name in GRADIENTS)
    assert torch.autograd.gradcheck(
        lambda *tensors: problem.call(ops.prefix_attention, **dict(zip(GRADIENTS, tensors, strict=True))), inputs
    )


@native
def test_double_backward_is_an_explicit_error():
    problem = Problem()
    q = problem.tensors["q"].requires_grad_()
    (grad,) = torch.autograd.grad(problem.call(ops.prefix_attention).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("needs", [s for n in range(6) for s in itertools.combinations(GRADIENTS, n)], ids=str)
@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_subset_of_gradients(needs, queries, dropout_p, dtype):
    problem = Problem(queries=queries, keys=30, dropout_p=dropout_p, dtype=dtype)
    everything, some = problem.solve(ops.prefix_attention), problem.solve(ops.prefix_attention, needs=needs)
    assert set(some) == {"out", *needs}
    for name, value in some.items():
        torch.testing.assert_close(value, everything[name])


@native
def test_opcheck():
    for options in ({}, {"dropout_p": 0.5}, {"mask": "bool"}, {"mask": "float", "is_causal": True}, {"dtype": BF16}):
        problem = Problem(**options)
        tensors = [t.requires_grad_() for t in problem.tensors.values()]
        rest = (problem.attn_mask, problem.is_causal, 0.5, problem.dropout_p, problem.seed)
        opcheck(torch.ops.peft_ext.prefix_attention, (*tensors, *rest))
        tensors = [t.detach() for t in tensors]
        out, lse = torch.ops.peft_ext.prefix_attention(*tensors, *rest)
        for needs in itertools.product([False, True], repeat=5):
            opcheck(
                torch.ops.peft_ext.prefix_attention_backward,
                (torch.randn_like(out), *tensors, problem.attn_mask, out, lse, *rest[1:], needs),
                test_utils=("test_schema", "test_faketensor"),
            )


@native
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_saves_only_arguments_and_results(dropout_p):
    """No scores, no weights, no dropout mask, no widened or expanded copy."""
    problem = Problem(dtype=BF16, prefix_dtype=F32, dropout_p=dropout_p)
    for tensor in problem.tensors.values():
        tensor.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = problem.call(ops.prefix_attention)
    arguments = [*problem.tensors.values(), out] + ([] if problem.seed is None else [problem.seed])
    pointers = {t.data_ptr() for t in arguments}
    others = [t for t in saved if t.data_ptr() not in pointers]
    assert [tuple(t.shape) for t in others] == [(2, 4, 6)]  # the log-sum-exp
    assert len(saved) == len(arguments) + 1


@pytest.mark.parametrize("size", [SIZES[3], SIZES[5], SIZES[6]], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_at_any_thread_count(size, dropout_p, dtype, two_threads):
    problem = sized(size, dropout_p=dropout_p, is_causal=True, dtype=dtype)
    two = problem.solve(ops.prefix_attention)
    torch.set_num_threads(1)
    one = problem.solve(ops.prefix_attention)
    if "cpu" in native_devices:
        for name, value in one.items():
            assert torch.equal(value, two[name]), name


@native
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype, device):
    """As scaled_dot_product_attention: q, k and v in the autocast dtype; the prefix stays float32."""
    problem = Problem(mask="float", device=device)
    with torch.autocast(device.type, dtype=dtype):
        got = problem.solve(ops.prefix_attention)
    wanted = problem.solve(reference.prefix_attention, F64)
    assert got["out"].dtype == dtype
    for name, value in got.items():
        assert name == "out" or value.dtype == F32
        error = (value.double() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < {BF16: 3e-2, F16: 4e-3}[dtype], name


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("given", [F32, BF16, F16])
def test_autocast_of_the_reference_is_the_ops(dtype, given, same_roundings, device):
    """Also where all arguments are of the other half precision."""
    problem = Problem(dtype=given, mask="float", device=device)
    with torch.autocast(device.type, dtype=dtype):
        got, wanted = problem.solve(reference.prefix_attention), problem.solve(ops.prefix_attention)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in wanted.items()}
    assert got["out"].dtype == dtype
    same_roundings(got["out"], wanted["out"])


@native
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile_has_one_graph_for_all_sizes(dropout_p):
    torch._dynamo.reset()

    def layer(q, k, v, prefix_key, prefix_value, seed):
        return ops.prefix_attention(
            q, k, v, prefix_key, prefix_value, is_causal=True, dropout_p=dropout_p, seed=seed
        ).sin()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 17, 70):
        problem = Problem(queries=length, keys=length, prefix=length + 1, dropout_p=dropout_p)
        tensors = [t.requires_grad_() for t in problem.tensors.values()]
        with torch.compiler.set_stance("default" if length == 5 else "fail_on_recompile"):
            got = compiled(*tensors, problem.seed)
        wanted = layer(*tensors, problem.seed)
        torch.testing.assert_close(got, wanted)
        for one, other in zip(
            torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(wanted.sum(), tensors), strict=True
        ):
            torch.testing.assert_close(one, other)


@native
def test_meta_tensors():
    q, k = torch.empty(2, 4, 3, 8, device="meta"), torch.empty(2, 2, 5, 8, device="meta")
    prefix = torch.empty(6, 2, 8, device="meta")
    assert ops.prefix_attention(q, k, k, prefix, prefix).shape == (2, 4, 3, 8)


def test_extreme_scores():
    """Scores of thousands, and a mask of the lowest float as transformers has it, overflow nothing."""
    problem = Problem(is_causal=True)
    problem.tensors["q"] = 1e4 * problem.tensors["q"]
    solution, wanted = problem.solve(ops.prefix_attention), problem.solve(reference.prefix_attention, F64)
    torch.testing.assert_close(solution["out"], wanted["out"].float(), rtol=1e-2, atol=1e-2)
    assert all(value.isfinite().all() for value in solution.values())
    problem = Problem()
    problem.attn_mask = torch.full((2, 1, 1, 6), torch.finfo(F32).min)
    out = problem.call(ops.prefix_attention)
    nothing = {name: problem.tensors[name][:, :, :0] for name in "kv"}
    problem.attn_mask = None
    torch.testing.assert_close(out, problem.call(ops.prefix_attention, **nothing))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize(("value", "scale"), [(49152.0, 0.2), (1.0, 1e-46), (1.0, -1e-46)])
def test_equal_scores_of_any_size(value, scale, queries, dtype):
    """Whatever all keys score, each has the same part."""
    q, k = torch.full((1, 1, queries, 64), value, dtype=dtype), torch.full((1, 1, 32, 64), value, dtype=dtype)
    v, prefix = torch.randn(1, 1, 32, 64).to(dtype).requires_grad_(), torch.zeros(0, 1, 64, dtype=dtype)
    out = ops.prefix_attention(q, k, v, prefix, prefix, scale=scale)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=1e-2, atol=1e-2)
    if value == 1.0:  # log(32) is lost beside a score of 3e10
        out.sum().backward()
        torch.testing.assert_close(v.grad, torch.full_like(v, queries / 32), rtol=1e-2, atol=1e-2)


BAD = {
    "q: dimensions": ({"q": torch.ones(4, 6, 8)}, ValueError, "q must be .batch, heads, queries, head_dim"),
    "q: integer": ({"q": torch.ones(2, 4, 6, 8, dtype=torch.int64)}, TypeError, "q must be float32"),
    "k: dtype": ({"k": torch.ones(2, 2, 6, 8, dtype=F64)}, TypeError, "k is .*but q is"),
    "k: batch": ({"k": torch.ones(3, 2, 6, 8)}, ValueError, "k must be .2, kv_heads, keys, 8"),
    "v: shape": ({"v": torch.ones(2, 2, 5, 8)}, ValueError, "v must have k's shape"),
    "heads": (
        {"k": torch.ones(2, 3, 6, 8), "v": torch.ones(2, 3, 6, 8)},
        ValueError,
        "k has 3 heads, which do not divide q's 4",
    ),
    "prefix: heads": ({"prefix_key": torch.ones(3, 4, 8)}, ValueError, "prefix_key must be .prefix_len, 2, 8"),
    "prefix: of the whole batch": ({"prefix_key": torch.ones(2, 3, 2, 8)}, ValueError, "prefix_key must be"),
    "prefix: length": ({"prefix_value": torch.ones(4, 2, 8)}, ValueError, "prefix_value must have prefix_key's shape"),
    "prefix: dtype": ({"prefix_value": torch.ones(3, 2, 8, dtype=F64)}, TypeError, "prefix_value must have q's dtype"),
    "mask: shape": ({"attn_mask": torch.ones(6, 5, dtype=torch.bool)}, ValueError, "attn_mask must broadcast"),
    "mask: dtype": ({"attn_mask": torch.ones(6, 6, dtype=torch.int64)}, TypeError, "attn_mask must be bool"),
    "mask: grad": ({"attn_mask": torch.ones(6, 6).requires_grad_()}, ValueError, "attn_mask requires grad"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite"),
    "dropout": ({"dropout_p": 1.5, "seed": torch.tensor([1])}, ValueError, r"dropout_p must be in \[0, 1\]"),
    "seed": ({"dropout_p": 0.5, "seed": torch.tensor([1.0])}, TypeError, "seed must be int64"),
}


@pytest.mark.parametrize("op", [ops.prefix_attention, reference.prefix_attention], ids=["op", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(op, change, error, message):
    with pytest.raises(error, match=message):
        op(**{**Problem().tensors, **change})


@native
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_refuses_what_does_not_fit(device):
    tensors = list(Problem(device=device).tensors.values())
    good = {"grad_out": torch.ones(2, 4, 6, 8), "out": torch.ones(2, 4, 6, 8), "lse": torch.ones(2, 4, 6)}
    for name, bad, error in (
        ("grad_out", torch.ones(2, 4, 6, 7), ValueError),
        ("grad_out", torch.ones(2, 4, 6, 8, dtype=F64), TypeError),
        ("out", torch.ones(2, 4, 5, 8), ValueError),
        ("out", torch.ones(0), ValueError),
        ("out", torch.ones(2, 4, 6, 8, dtype=BF16), TypeError),
        ("lse", torch.ones(2, 4), ValueError),
        ("lse", torch.ones(2, 4, 6, dtype=BF16), TypeError),
    ):
        grad, out, lse = (tensor.to(device) for tensor in {**good, name: bad}.values())
        with pytest.raises(error, match=f"{name} must be"):
            torch.ops.peft_ext.prefix_attention_backward(
                grad, *tensors, None, out, lse, False, 1.0, 0.0, None, [True] * 5
            )


@pytest.mark.parametrize("where", ["q", "k", "prefix_key", "v"])
@pytest.mark.parametrize("queries", [1, 9])
def test_a_nan_is_not_hidden(device, where, queries):
    """What diverged shows: a NaN in what a query sees makes its result NaN."""
    tensors = {
        "q": torch.randn(1, 1, queries, 16),
        "k": torch.randn(1, 1, 12, 16),
        "v": torch.randn(1, 1, 12, 16),
        "prefix_key": torch.randn(5, 1, 16),
        "prefix_value": torch.randn(5, 1, 16),
    }
    tensors[where].view(-1, 16)[-1] = torch.nan
    out = ops.prefix_attention(*(tensor.to(device) for tensor in tensors.values()))
    assert out[0, 0, -1].isnan().all()
