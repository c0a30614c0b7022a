"""Mixture-of-Depths on other layouts, and over a resume. Rounding can change a choice between two nearly equal scores,
so layouts need not agree as closely as elsewhere; in these runs, they do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.runs import Corpus, Run, invented_documents, run, saved_tensors, write_corpus
from tests.train.test_equivalence import (
    RECOMPUTE,
    SP2,
    TP2,
    ZBV,
    ZERO_3,
    ZERO_BUBBLE,
    assert_same_curve,
    assert_same_tensors,
)
from tests.train.test_policies import SHORT, STEPS, WITHOUT_LTD

ARM: dict[str, Any] = {**SHORT, **WITHOUT_LTD, "mixture_of_depths_capacity": 0.25, "mixture_of_depths_strata": 2,
                       "layer_drop_rate": 0.2, "position_embedding_type": "rope", "init_method_std": 0.1}
LEGS: list[tuple[int, dict[str, Any]]] = [(4, {**SP2, **ZERO_3, **RECOMPUTE}), (4, {**TP2, **ZERO_BUBBLE}),
                                          (2, {**ZBV, "micro_batch_size": 1})]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Text on which no two scores are so nearly equal."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), invented_documents())


@pytest.fixture(scope="module")
def truth(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("one-process")
    done = run(folder, settings(corpus, folder))
    return done, saved_tensors(folder / "checkpoints", STEPS)


def settings(corpus: Corpus, folder: Path) -> dict[str, Any]:
    return {**ARM, **corpus.settings, "save": str(folder / "checkpoints")}


def test_every_layout_chooses_the_tokens_and_continues_the_curve_of_one_process(
    corpus: Corpus, truth: tuple[Run, dict[str, torch.Tensor]], tmp_path: Path,
) -> None:
    resumed = {**settings(corpus, tmp_path), "load": str(tmp_path / "checkpoints"), "exit_interval": 3}
    kept: dict[tuple[int, int], list[int]] = {}
    for number, (world_size, layout) in enumerate(LEGS, start=1):
        leg = run(tmp_path, {**resumed, **layout}, world_size, code=0 if number == len(LEGS) else 11)
        kept |= leg.kept
    assert kept == truth[0].kept
    assert_same_curve(leg.lines, truth[0].lines)
    assert leg.column("consumed_flops") == truth[0].column("consumed_flops")
    assert_same_tensors(saved_tensors(tmp_path / "checkpoints", STEPS), truth[1])


def test_the_router_and_its_predictor_learn(truth: tuple[Run, dict[str, torch.Tensor]]) -> None:
    done, tensors = truth
    assert {len(positions) for positions in done.kept.values()} == {8}
    assert {layer for layer, _ in done.kept} == {1, 3, 5} and len(set(map(tuple, done.kept.values()))) > 30
    assert all(len([t for t in positions if t < 16]) == 4 for positions in done.kept.values())
    assert done.column("lm_loss")[-1] < done.column("lm_loss")[0] - 0.3
    # A quarter is chosen, so the predictor learns to say no.
    assert all(float(tensors[f"model.layers.{layer}.router.predictor.bias"]) < 0.0 for layer in (1, 3, 5))
    assert 0.3 < done.column("theoretical_saving")[0] < 0.75
