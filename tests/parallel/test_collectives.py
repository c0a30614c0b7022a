"""Conjugate collectives, by hand, and how much they send."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.parallel import collectives, entrance
from megatron_ltd.parallel.collectives import TensorParallel
from tests.gloo import run_ranks
from tests.model.tiny import LLAMA_LIKE, build_gpt, following, run, tiny_batch, tiny_config
from tests.parallel.sharded import tensor_parallel
from tests.plans import plan_of


def enter_and_exit(rank: int, ranks: int, sequence_parallel: bool) -> dict[str, list[float]]:
    """Each function and its derivative, on numbers that tell the ranks and places apart."""
    tp = tensor_parallel(ranks, sequence_parallel)
    _, share = tp.sequence_span(4)
    outside = (torch.arange(1.0, share + 1) * 10 ** rank).requires_grad_()
    inside = (torch.arange(1.0, 5.0) * 10 ** rank).requires_grad_()
    entered, left = tp.enter(outside), tp.exit(inside)
    (entered * torch.arange(1.0, 5.0) * 10 ** rank).sum().backward()
    (left * torch.arange(1.0, share + 1) * 10 ** rank).sum().backward()
    assert outside.grad is not None and inside.grad is not None
    return {"enter": entered.tolist(), "enter'": outside.grad.tolist(), "exit": left.tolist(),
            "exit'": inside.grad.tolist()}


def test_regions_without_sequence_parallelism() -> None:
    own = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]
    total = [11.0, 22.0, 33.0, 44.0]
    assert run_ranks(enter_and_exit, 2, False) == [
        {"enter": own[rank], "enter'": total, "exit": total, "exit'": own[rank]} for rank in (0, 1)]


def test_regions_with_sequence_parallelism() -> None:
    everything, halves = [1.0, 2.0, 10.0, 20.0], [[11.0, 22.0], [33.0, 44.0]]
    assert run_ranks(enter_and_exit, 2, True) == [
        {"enter": everything, "enter'": halves[rank], "exit": halves[rank], "exit'": everything} for rank in (0, 1)]


def test_a_region_of_one_process_does_nothing() -> None:
    own = [1.0, 2.0, 3.0, 4.0]
    for sequence_parallel in (False, True):
        assert run_ranks(enter_and_exit, 1, sequence_parallel) == [
            {"enter": own, "enter'": own, "exit": own, "exit'": own}]


def spans(rank: int, ranks: int) -> list[tuple[int, int]]:
    plain, sliced = tensor_parallel(ranks), tensor_parallel(ranks, sequence_parallel=True)
    return [plain.sequence_span(12), sliced.sequence_span(12), plain.shard_span(8), sliced.shard_span(8)]


def test_spans_of_the_sequence_and_of_shards() -> None:
    assert run_ranks(spans, 4) == [[(0, 12), (3 * rank, 3), (2 * rank, 2), (2 * rank, 2)] for rank in range(4)]


def all_reduce_twice(rank: int, ranks: int) -> list[list[float]]:
    """The argument is left as it was, also where it is not contiguous."""
    group = tensor_parallel(ranks).group
    x = torch.arange(6.0).view(2, 3).t() + rank
    total = collectives.all_reduce(x, group)
    largest = collectives.all_reduce(x, group, dist.ReduceOp.MAX)
    return [x.flatten().tolist(), total.flatten().tolist(), largest.flatten().tolist()]


def test_reductions_leave_their_argument_alone() -> None:
    order = [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    for rank, result in enumerate(run_ranks(all_reduce_twice, 2)):
        assert result == [[x + rank for x in order], [2 * x + 1 for x in order], [x + 1 for x in order]]


def traffic(rank: int, ranks: int, config: ModelConfig, sequence_parallel: bool,
            kept_lengths: list[int]) -> list[dict[str, int]]:
    """Elements of full length that each kind of collective moves in one forward and backward pass."""
    tp = TensorParallel(tensor_parallel(ranks).mesh, sequence_parallel)
    tally: dict[str, int] = {}

    def counting(name: str) -> Any:
        original = getattr(collectives, name)

        def counted(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
            result = original(x, group)
            tally[name] = tally.get(name, 0) + max(x.numel(), result.numel())
            return result

        return counted

    def counting_started(name: str) -> Any:
        original = getattr(collectives, f"start_{name}")

        def started(x: torch.Tensor, group: dist.ProcessGroup) -> Any:
            sent = x.numel()
            pending = original(x, group)

            def finished() -> torch.Tensor:
                result: torch.Tensor = pending()
                tally[name] = tally.get(name, 0) + max(sent, result.numel())
                return result

            return finished

        return started

    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        setattr(collectives, name, counting(name))
        setattr(entrance, f"start_{name}", counting_started(name))
    entrance.all_gather = collectives.all_gather
    model = build_gpt(config, tp, dropped=[1, 2, 3], strata=ranks)
    tallies = []
    for kept in kept_lengths:
        tally.clear()
        plan = plan_of(config.seq_length, config.num_layers, kept, [1, 2, 3])
        run(following(model, plan), tiny_batch(config)).backward()
        tallies.append(dict(tally))
    return tallies


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_what_is_sent_falls_with_the_kept_length(sequence_parallel: bool) -> None:
    """In each layer attention and MLP enter and leave a region, there and back; of the embedding one leaves, into the
    head one enters. A dropped layer sends only kept tokens, since it takes them before its regions gather."""
    config = tiny_config(**LLAMA_LIKE)
    kept_lengths = [2, 16, 24]
    for tallies in run_ranks(traffic, 2, config, sequence_parallel, kept_lengths):
        for kept, tally in zip(kept_lengths, tallies, strict=True):
            in_layers = (2 * 24 + 3 * kept) * 3 * 32
            outside = 24 * 3 * 32
            if sequence_parallel:
                # What a region's products read is gathered once more, for the gradients of their weights.
                assert tally == {"all_gather": 6 * in_layers + 2 * outside,
                                 "reduce_scatter": 4 * in_layers + 2 * outside}
            else:
                assert tally == {"all_reduce": 4 * in_layers + 2 * outside}
