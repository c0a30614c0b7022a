"""Balanced splits against trying all of them, and against published ratios."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.flops import layer_flops
from megatron_ltd.parallel import balance
from megatron_ltd.parallel.balance import balanced_split, rank_costs, stage_sums
from megatron_ltd.parallel.partition import uniform_split

COSTS = st.lists(st.integers(1, 50), min_size=6, max_size=9)


def smallest_maximum(costs: list[int], head: int, schedule: str, pp: int, chunks: int) -> int:
    """By trying all splits, with the placement written out."""
    places = {"1f1b": [[rank] for rank in range(pp)], "zbv": [[rank, 2 * pp - 1 - rank] for rank in range(pp)],
              "interleaved": [[rank + pp * chunk for chunk in range(chunks)] for rank in range(pp)]}[schedule]
    best = sum(costs) + head
    for cuts in itertools.combinations(range(1, len(costs)), pp * chunks - 1):
        ends = [0, *cuts, len(costs)]
        work = [sum(costs[begin:end]) for begin, end in itertools.pairwise(ends)]
        work[-1] += head
        best = min(best, max(sum(work[stage] for stage in stages) for stages in places))
    return best


@given(COSTS, st.integers(0, 80), st.integers(1, 5))
def test_one_stage_a_process_is_split_as_well_as_possible(costs: list[int], head: int, pp: int) -> None:
    split = balanced_split(costs, head, "1f1b", pp, 1)
    assert sum(split) == len(costs) and len(split) == pp and min(split) >= 1
    assert max(rank_costs(split, costs, head, "1f1b", pp)) == smallest_maximum(costs, head, "1f1b", pp, 1)


@given(COSTS, st.integers(0, 80), st.sampled_from([("zbv", 2, 2), ("zbv", 3, 2), ("interleaved", 2, 2),
                                                   ("interleaved", 2, 3), ("interleaved", 3, 2)]))
def test_few_splits_are_all_tried(costs: list[int], head: int, layout: tuple[str, int, int]) -> None:
    schedule, pp, chunks = layout
    split = balanced_split(costs, head, schedule, pp, chunks)
    assert sum(split) == len(costs) and len(split) == pp * chunks and min(split) >= 1
    assert max(rank_costs(split, costs, head, schedule, pp)) == smallest_maximum(costs, head, *layout)


@pytest.mark.parametrize("layout", [("zbv", 2, 2), ("zbv", 3, 2), ("interleaved", 2, 3), ("interleaved", 3, 2)])
@pytest.mark.parametrize("dropped", [range(1, 13), range(6, 13), range(3, 9)])
def test_the_search_for_many_splits_comes_within_five_percent_of_the_best(
        layout: tuple[str, int, int], dropped: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "_FEW_SPLITS", 0)
    costs = [40 if layer in dropped else 100 for layer in range(14)]
    found = balanced_split(costs, 90, *layout)
    assert max(rank_costs(found, costs, 90, layout[0], layout[1])) <= 1.05 * smallest_maximum(costs, 90, *layout)


def test_a_large_pipeline_is_split_better_than_uniformly() -> None:
    costs = [100] * 47 + [40] * 48 + [100]
    for schedule, pp, chunks in (("interleaved", 8, 4), ("zbv", 16, 2)):
        split = balanced_split(costs, 150, schedule, pp, chunks)
        equal = uniform_split(96, pp * chunks)
        assert max(rank_costs(split, costs, 150, schedule, pp)) < max(rank_costs(equal, costs, 150, schedule, pp))
        assert sum(split) == 96 and min(split) >= 1


def test_of_equally_good_splits_the_others_are_alike_too() -> None:
    """The head alone sets the maximum; the rest is dealt evenly rather than anyhow."""
    assert balanced_split([1] * 10, 100, "1f1b", 4, 1) == [3, 3, 3, 1]


def test_work_by_hand() -> None:
    costs = [1, 2, 3, 4, 5, 6]
    assert stage_sums([1, 2, 1, 2], costs, 10) == [1, 5, 4, 21]
    assert rank_costs([1, 2, 1, 2], costs, 10, "interleaved", 2) == [5, 26]
    assert rank_costs([1, 2, 1, 2], costs, 10, "zbv", 2) == [22, 9]


def importance_costs(config: ModelConfig) -> list[int]:
    """Token Dropping keeps half of the tokens from the layer before the middle, a cross layer, to the last but one."""
    full, half = layer_flops(config, config.seq_length), layer_flops(config, config.seq_length // 2)
    cross, first = layer_flops(config, config.seq_length // 2, attends_to_all=True), config.num_layers // 2 - 1
    return [full] * first + [cross] + [half] * (config.num_layers - first - 2) + [full]


BERT_LARGE = ModelConfig(family="bert", num_layers=24, hidden_size=1024, num_attention_heads=16, seq_length=512)
GPT_1_3B = ModelConfig(num_layers=24, hidden_size=2048, num_attention_heads=16, seq_length=2048)


@pytest.mark.parametrize(("model", "pp", "uniform", "best"), [
    (BERT_LARGE, 2, 1.037, 1.333), (BERT_LARGE, 4, 1.000, 1.200), (BERT_LARGE, 8, 1.000, 1.040),
    (GPT_1_3B, 4, 1.000, 1.209)], ids=["BERT pp2", "BERT pp4", "BERT pp8", "GPT pp4"])
def test_the_published_gains_of_a_balanced_pipeline(model: ModelConfig, pp: int, uniform: float, best: float) -> None:
    """Throughput with Token Dropping as a multiple of that without, layers alone, as many microbatches as one likes."""
    costs = importance_costs(model)
    dense = max(stage_sums(uniform_split(24, pp), [layer_flops(model, model.seq_length)] * 24, 0))
    assert dense / max(stage_sums(uniform_split(24, pp), costs, 0)) == pytest.approx(uniform, abs=0.005)
    split = balanced_split(costs, 0, "1f1b", pp, 1)
    assert dense / max(stage_sums(split, costs, 0)) == pytest.approx(best, abs=0.012)
    if pp == 2:
        assert split == [9, 15]
