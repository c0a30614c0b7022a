"""Head, cross-entropy and z-loss in chunks, against `F.cross_entropy` of the full logits in float64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ltd.parallel import logit_chunks
from megatron_ltd.parallel.cross_entropy import VocabShard, head_loss
from megatron_ltd.parallel.logit_passes import LogitPasses, statistics, to_gradient
from tests.gloo import run_ranks
from tests.parallel.sharded import noise, tensor_parallel

TOKENS, WIDTH = 70, 12
PASSES = LogitPasses(statistics, to_gradient)
"""What --compile compiles, as it is written."""

CHUNKS = [1, 33 * 64, 1 << 22]
"""Logits of a chunk: the smallest chunk, one that leaves a remainder, and all at once."""


@dataclass(frozen=True)
class Case:
    """A vocabulary, the rows that hold it, the size of logits, and a loss mask."""

    vocab_size: int
    rows: int
    logit_scale: float = 1.0
    mask: str = "weights"
    biased: bool = False
    z_coefficient: float = 0.0

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        weights = noise(TOKENS, seed=3).abs()
        masks = {"weights": torch.where(weights < 0.4, 0.0, weights), "ones": torch.ones(TOKENS),
                 "nothing": torch.zeros(TOKENS)}
        labels = torch.randint(0, self.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(4))
        labels[:2] = torch.tensor([0, self.vocab_size - 1])
        return {"hidden": noise(TOKENS, WIDTH, seed=1).mul(self.logit_scale).to(dtype),
                "weight": noise(self.rows, WIDTH, seed=2).to(dtype), "labels": labels,
                "mask": masks[self.mask].float(), "bias": noise(self.rows, seed=5).mul(3.0 * self.biased).to(dtype)}


CASES = [
    Case(64, 64), Case(61, 64), Case(17, 32), Case(1, 4), Case(5, 64), Case(61, 64, mask="ones"),
    Case(61, 64, mask="nothing"), Case(61, 64, biased=True), Case(17, 32, biased=True),
    Case(61, 64, logit_scale=1000.0), Case(61, 64, logit_scale=1e-3),
    Case(61, 64, z_coefficient=0.03), Case(17, 32, biased=True, z_coefficient=1e-4),
    Case(5, 64, logit_scale=10.0, mask="ones", z_coefficient=0.01),
]
"""In `Case(17, 32)` the last of four ranks holds only padding, in `Case(5, 64)` the last three."""


def on_ranks(rank: int, ranks: int, chunk: int, passes: bool) -> list[tuple[torch.Tensor, ...]]:
    """Loss, gradients of the hidden states, the weight and the bias at an incoming 2.5, the loss of each token, and the
    z-loss, for each case."""
    tp = tensor_parallel(ranks)
    logit_chunks._CHUNK_LOGITS["cpu"] = chunk
    logit_chunks._LEAST_CHUNK_TOKENS = 16
    results: list[tuple[torch.Tensor, ...]] = []
    for case in CASES:
        t, shard = case.tensors(), VocabShard.of(case.rows, case.vocab_size, tp)
        shard = replace(shard, passes=PASSES) if passes else shard
        x = t["hidden"].requires_grad_()
        rows = slice(shard.first, shard.first + shard.rows)
        table, bias = t["weight"][rows].clone().requires_grad_(), t["bias"][rows].clone().requires_grad_()
        loss, losses, z_loss = head_loss(tp.enter(x), table, t["labels"], t["mask"], shard,
                                         bias if case.biased else None, case.z_coefficient)
        assert not losses.requires_grad and not z_loss.requires_grad
        (2.5 * loss).backward()
        assert x.grad is not None and table.grad is not None
        assert (bias.grad is not None) == case.biased
        results.append((loss.detach(), x.grad, table.grad, bias.grad if bias.grad is not None else bias * 0, losses,
                        z_loss))
    return results


def reference(t: dict[str, torch.Tensor], case: Case) -> tuple[torch.Tensor, ...]:
    x, table, bias = (t[name].double().requires_grad_() for name in ("hidden", "weight", "bias"))
    logits = x @ table[:case.vocab_size].T + bias[:case.vocab_size]
    losses = F.cross_entropy(logits, t["labels"], reduction="none")
    loss = (losses * t["mask"].double()).sum()
    z_loss = case.z_coefficient * (torch.log(logits.exp().sum(dim=1)) ** 2 * t["mask"].double()).sum() \
        if case.z_coefficient else torch.zeros((), dtype=torch.float64)
    (2.5 * (loss + z_loss)).backward()
    assert x.grad is not None and table.grad is not None and bias.grad is not None
    return loss.detach(), x.grad, table.grad, bias.grad * case.biased, losses.detach(), z_loss.detach()


@pytest.mark.parametrize(("ranks", "passes"), [(1, False), (2, False), (4, False), (1, True), (4, True)])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_are_those_of_the_full_logits(ranks: int, passes: bool, chunk: int) -> None:
    results = run_ranks(on_ranks, ranks, chunk, passes)
    for number, case in enumerate(CASES):
        loss, grad_hidden, grad_weight, grad_bias, losses, z_loss = reference(case.tensors(), case)
        for place, wanted in ((2, grad_weight), (3, grad_bias)):
            torch.testing.assert_close(torch.cat([of_rank[number][place] for of_rank in results]).double(), wanted,
                                       rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))
        for of_rank in results:
            torch.testing.assert_close(of_rank[number][4].double(), losses, rtol=2e-6,
                                       atol=1e-6 * max(1.0, case.logit_scale))
            torch.testing.assert_close(of_rank[number][0].double(), loss, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(of_rank[number][5].double(), z_loss, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(of_rank[number][1].double(), grad_hidden, rtol=1e-5,
                                       atol=2e-6 * float(grad_hidden.abs().max()))


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor has which an operation reads or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        tensors = [x for x in (*args, *results) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


def largest_tensor(rank: int, ranks: int) -> tuple[int, int]:
    """Forward and backward, on 400 tokens with 640 rows, in chunks of at least 16 tokens."""
    tp = tensor_parallel(ranks)
    logit_chunks._CHUNK_LOGITS["cpu"] = 1
    logit_chunks._LEAST_CHUNK_TOKENS = 16
    shard = VocabShard.of(640, 601, tp)
    x = noise(400, 4, dtype=torch.float32).requires_grad_()
    table = noise(shard.rows, 4, dtype=torch.float32).requires_grad_()
    with LargestTensor() as forward:
        loss = head_loss(tp.enter(x), table, torch.arange(400), torch.ones(400), shard)[0]
    with LargestTensor() as backward:
        loss.backward()
    return forward.elements, backward.elements


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_logits_never_exist(ranks: int) -> None:
    for forward, backward in run_ranks(largest_tensor, ranks):
        assert forward == 16 * 640 // ranks  # a chunk of logits, as wide as the table
        assert backward == max(400 * 4, 640 // ranks * 4)  # a gradient


def half_precision_errors(rank: int, ranks: int, passes: bool) -> dict[str, tuple[float, float]]:
    """Our largest error and that of plain bfloat16, for the loss and both gradients."""
    tp = tensor_parallel(ranks)
    case = Case(61, 64)
    t, shard = case.tensors(torch.bfloat16), VocabShard.of(64, 61, tp)
    shard = replace(shard, passes=PASSES) if passes else shard
    x, table = t["hidden"].clone().requires_grad_(), t["weight"].clone().requires_grad_()
    loss, _, _ = head_loss(x, table, t["labels"], t["mask"], shard)
    assert loss.dtype is torch.float32
    (2.5 * loss).backward()
    plain_x, plain_table = t["hidden"].clone().requires_grad_(), t["weight"].clone().requires_grad_()
    losses = F.cross_entropy((plain_x @ plain_table[:61].T).float(), t["labels"], reduction="none")
    plain = (losses * t["mask"]).sum()
    (2.5 * plain).backward()
    names, expected = ("loss", "hidden", "weight"), reference(t, case)
    ours, theirs = (loss.detach(), x.grad, table.grad), (plain.detach(), plain_x.grad, plain_table.grad)
    return {name: (float((o.double() - e).abs().max()), float((p.double() - e).abs().max()))  # type: ignore[union-attr]
            for name, o, p, e in zip(names, ours, theirs, expected[:3], strict=True)}


@pytest.mark.parametrize("passes", [False, True])
def test_errors_in_half_precision_are_at_most_twice_those_of_plain_torch(passes: bool) -> None:
    (errors,) = run_ranks(half_precision_errors, 1, passes)
    assert all(theirs > 0.0 for _, theirs in errors.values())
    assert {name: both for name, both in errors.items() if both[0] > 2.0 * both[1]} == {}


def gradients_in_parts(rank: int, ranks: int) -> list[torch.Tensor]:
    """As a split backward pass takes them: the inputs' first, the weights' later, from one graph."""
    tp = tensor_parallel(ranks)
    t = Case(61, 64).tensors()
    x, table = t["hidden"].requires_grad_(), t["weight"].requires_grad_()
    loss = head_loss(x, table, t["labels"], t["mask"], VocabShard.of(64, 61, tp))[0] * 2.5
    of_hidden = torch.autograd.grad(loss, x, retain_graph=True)
    of_weight = torch.autograd.grad(loss, table)
    return [*of_hidden, *of_weight]


def test_the_backward_pass_may_be_split() -> None:
    (parts,) = run_ranks(gradients_in_parts, 1)
    for part, expected in zip(parts, reference(Case(61, 64).tensors(), Case(61, 64))[1:3], strict=True):
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


def products_on_an_accelerator(rank: int, ranks: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """As they would be launched, in two chunks: which one, and the shape and the dtype of what it writes."""
    case, found = Case(61, 64), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            # torch 2.11 has this product on GPUs, but not on `meta`.
            result = kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                found.append((str(func), tuple(result.shape), result.dtype))
            return result

    t = {name: tensor.to("meta") for name, tensor in case.tensors(torch.bfloat16).items()}
    shard = VocabShard.of(case.rows, case.vocab_size, tensor_parallel(ranks))
    logit_chunks._CHUNK_LOGITS["meta"], logit_chunks._LEAST_CHUNK_TOKENS = 1, TOKENS // 2
    with Products():
        head_loss(t["hidden"].requires_grad_(), t["weight"].requires_grad_(), t["labels"], t["mask"], shard)
    return found


def test_on_an_accelerator_the_gradient_of_the_weight_is_never_rounded_to_half_precision() -> None:
    (found,) = run_ranks(products_on_an_accelerator, 1)
    assert found == 2 * [("aten.mm.out", (35, 64), torch.bfloat16), ("aten.mm.out", (35, WIDTH), torch.bfloat16),
                         ("aten.addmm.dtype_out", (64, WIDTH), torch.float32)]


def roundings_on_an_accelerator(rank: int, ranks: int) -> set[str]:
    """Products of a half-precision tensor with a scalar tensor of fp32, which a GPU, unlike a CPU, rounds first."""
    case, found = Case(61, 64), set()

    class Roundings(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            dtypes = {t.dtype for t in args if isinstance(t, torch.Tensor) and t.dim() == 0}
            if torch.float32 in dtypes and isinstance(result, torch.Tensor) and result.dtype is torch.bfloat16 and \
                    len(args) > 1 and func.overloadpacket is not torch.ops.aten._to_copy:
                found.add(str(func))
            return result

    t = case.tensors(torch.bfloat16)
    shard = VocabShard.of(case.rows, case.vocab_size, tensor_parallel(ranks))
    with Roundings():
        torch.ones(2, dtype=torch.bfloat16) / torch.ones(())
        head_loss(t["hidden"].requires_grad_(), t["weight"].requires_grad_(), t["labels"], t["mask"], shard,
                  t["bias"].requires_grad_())[0].mul(1 / 3).backward()
    return found


def test_on_an_accelerator_the_weight_of_the_loss_is_never_rounded_to_half_precision() -> None:
    assert run_ranks(roundings_on_an_accelerator, 1) == [{"aten.div.Tensor"}], "that of the test alone"
