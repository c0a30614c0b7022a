"""A search finds what fits, and nothing that the engine would refuse."""

from dataclasses import replace

import pytest

from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layouts.cluster import known_cluster
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.search import Search, least_cluster, nearest, settings_of
from megatron_ltd.settings.checks.all import violations
from megatron_ltd.settings.cli import parse_run_config

LARGE = ("--num-layers 24 --hidden-size 4096 --num-attention-heads 32 --seq-length 2048 --vocab-size 50304 --lr 1 "
         "--train-iters 1 --mock-data --bf16 --global-batch-size 96")


def search_for(gpus: int, gpu: str = "a100-40", flags: str = "") -> Search:
    config = parse_run_config((LARGE + flags).split())[0]
    return Search(config, known_cluster(gpus, gpu), 96, {policies(config).planned(0): 1.0})


def test_every_layout_can_run_and_is_what_its_settings_say() -> None:
    search = search_for(24)
    layouts = list(search.layouts())
    assert len(layouts) == len(set(layouts)) > 300
    for layout in layouts[::7]:
        chosen = settings_of(layout)
        micro = chosen.pop("micro_batch_size")
        config = replace(search.config, parallel=replace(search.config.parallel, **chosen),
                         training=replace(search.config.training, micro_batch_size=micro))
        assert not violations(config, 24)
        assert Layout.of(config, 24) == layout


def test_the_fastest_that_fit_come_first_and_no_cheaper_recomputation_is_left_out() -> None:
    search = search_for(8)
    found = search.fitting()
    assert found and all(candidate.memory.total <= search.cluster.usable_bytes for candidate in found)
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    fits = {candidate.layout for candidate in found}
    by_hand = min((search.timed(layout, search.memory(layout)) for layout in search.layouts()
                   if search.memory(layout).total <= search.cluster.usable_bytes), key=lambda c: c.seconds)
    assert by_hand.layout in fits and found[0].seconds == pytest.approx(by_hand.seconds)


def test_with_dropping_the_sequence_is_sharded_only_if_kept_tokens_are_chosen_in_as_many_strata() -> None:
    drop = " --random-ltd --random-ltd-start-length 512 --random-ltd-steps 100"
    assert not any(layout.sequence_parallel for layout in search_for(8, flags=drop).layouts())
    sharded = {layout.tp for layout in search_for(8, flags=drop + " --random-ltd-strata 4").layouts()
               if layout.sequence_parallel}
    assert sharded == {2, 4}


def test_the_nearest_that_fits_changes_as_little_as_possible() -> None:
    search = search_for(8)
    given = next(search.layouts())
    close = nearest(settings_of(given), search.fitting())
    assert close is not None
    changed = [name for name, value in settings_of(close.layout).items() if settings_of(given)[name] != value]
    assert changed == ["data_parallel_sharding_strategy", "recompute_granularity"] or len(changed) == 1


def test_a_cluster_that_is_too_small_is_told_the_least_that_is_not() -> None:
    search = search_for(1)
    assert not search.fitting()
    least = least_cluster(search)
    assert least is not None and least[0].gpus > 1
    assert search_for(least[0].gpus).fitting() and not search_for(least[0].gpus // 2).fitting()
