"""Every policy, alone and with others: every layout gives the curve, the draws and the final weights of the run on one
process, within the tolerances of `test_equivalence`.

Six layers of which some are skipped at nearly every step, so that stages of one layer are often skipped whole; and
samples that are cut to 8, 16, 24 and at last 32 tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import policies
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.token_drop.registry import POLICIES
from tests.train.runs import TINY, Corpus, Run, SentenceCorpus, run, saved_tensors, words
from tests.train.test_equivalence import (
    INTERLEAVED,
    PP2,
    RECOMPUTE,
    SP2,
    TP2,
    ZBV,
    ZERO_2,
    ZERO_3,
    ZERO_BUBBLE,
    assert_same_curve,
    assert_same_tensors,
)

STEPS = 8
SHORT = {**TINY, "train_iters": STEPS, "random_ltd_steps": 7, "eval_interval": 4}
WITHOUT_LTD = {name: None for name in TINY if name.startswith("random_ltd")}
LAYER_DROP = {"layer_drop_rate": 0.4}
TREAD = {"token_drop_policy": "tread", "random_ltd_length_list": "0:8,5:16,7:32", "random_ltd_strata": 2}
LAYER_DROPOUT = {"layer_dropout_rate": 0.8, "layer_dropout_steps": 7}
CURRICULUM = {"seq_length_curriculum_start_length": 8, "seq_length_curriculum_steps": 7,
              "seq_length_curriculum_length_step": 8}
ARMS: dict[str, dict[str, Any]] = {
    "layer-drop": {**SHORT, **WITHOUT_LTD, **LAYER_DROP},
    "layer-drop-ltd": {**SHORT, **LAYER_DROP, "layer_drop_layers": "0,2-4"},
    "layer-drop-bert": {**SHORT, "family": "bert", "seq_length": 64, "random_ltd_start_length": 16, **LAYER_DROP},
    "layer-drop-importance": {**SHORT, **LAYER_DROP, "random_ltd": False, "token_drop_policy": "importance",
                              "random_ltd_layers": "1-4", "token_drop_beta": 0.5},
    "curriculum": {**SHORT, **WITHOUT_LTD, **CURRICULUM},
    # 8 of 8 and of 16, then 16 of 24, and 24 of 32 tokens are kept
    "curriculum-ltd": {**SHORT, **CURRICULUM, "random_ltd_steps": None, "random_ltd_length_list": "0:8,5:16,7:24",
                       "random_ltd_start_length": None, "reset_position_ids": True, "reset_attention_mask": True,
                       "eod_mask_loss": True},
    "both": {**SHORT, **LAYER_DROP, **CURRICULUM, "random_ltd_steps": 8},
    "tread": {**SHORT, **WITHOUT_LTD, **TREAD, "position_embedding_type": "rope"},
    "tread-bert": {**SHORT, **WITHOUT_LTD, **TREAD, "family": "bert", "seq_length": 64, "tread_set_layers": 2,
                   "hidden_dropout": 0.1},
    "layer-dropout": {**SHORT, **WITHOUT_LTD, **LAYER_DROPOUT},
    # tokens pass around layers of which some are skipped, too, and the first is dropped as well
    "layer-dropout-tread": {**SHORT, **WITHOUT_LTD, **TREAD, **LAYER_DROPOUT, "random_ltd_layers": "0-4",
                            "tread_set_layers": 3},
    "drop-backward": {**SHORT, "drop_backward_rate": 0.6},
    # all of 16 bags for three steps, then 16 of 32 tokens in the middle layers
    "superposition": {**SHORT, **WITHOUT_LTD, "token_superposition": 2, "token_superposition_steps": 3,
                      "random_ltd": True, "random_ltd_strata": 2, "random_ltd_length_list": "0:16,7:32"},
    # 8 of 32 bags are kept, then 16 of 32 tokens
    "superposition-more": {**SHORT, **WITHOUT_LTD, "token_superposition": 4, "token_superposition_steps": 3,
                           "token_superposition_text": "more", "random_ltd": True, "random_ltd_strata": 2,
                           "random_ltd_length_list": "0:8,3:16", "hidden_dropout": 0.1, "eod_mask_loss": True},
    "alternate-pld": {**SHORT, **WITHOUT_LTD, "alternate_tokens": 4, "alternate_tokens_steps": 6, "pld_theta": 0.2,
                      "pld_gamma": 0.5},
    "pld-bert": {**SHORT, "family": "bert", "seq_length": 64, "random_ltd_start_length": 16, "pld_theta": 0.2,
                 "pld_gamma": 0.5, "hidden_dropout": 0.1},
    "raptr-tread": {**SHORT, **WITHOUT_LTD, **TREAD, "raptr_stages": "0:2,3:4,7:6", "drop_backward_rate": 0.3},
}

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("layer-drop", 2, {}),
    ("layer-drop", 4, {**ZERO_BUBBLE, **ZERO_2}),
    ("layer-drop", 4, {**INTERLEAVED, **ZERO_3, **RECOMPUTE}),
    ("layer-drop-ltd", 2, {**SP2}),
    ("layer-drop-ltd", 4, {**TP2, **PP2, "pipeline_split": "1,5"}),
    ("layer-drop-bert", 2, INTERLEAVED),
    ("layer-drop-importance", 2, ZBV),
    ("curriculum", 2, {**ZERO_3, "micro_batch_size": 1}),
    ("curriculum", 2, INTERLEAVED),
    ("curriculum-ltd", 2, SP2),
    ("curriculum-ltd", 2, ZERO_BUBBLE),
    ("both", 1, RECOMPUTE),
    ("both", 4, {**TP2, **ZBV}),
    ("both", 4, {**SP2, **PP2}),
    ("tread", 2, {**PP2, "micro_batch_size": 1}),
    ("tread", 4, {**SP2, **ZERO_3}),
    ("tread", 4, {**TP2, **ZBV}),
    ("tread-bert", 4, {**SP2, **INTERLEAVED}),
    ("layer-dropout", 4, {**ZERO_BUBBLE, **ZERO_2}),
    ("layer-dropout", 4, {**TP2, **ZERO_3, "micro_batch_size": 1}),
    ("layer-dropout-tread", 2, {**PP2, "pipeline_split": "2,4", **RECOMPUTE}),
    ("layer-dropout-tread", 4, {**SP2, **ZERO_2}),
    ("drop-backward", 2, {**PP2, **RECOMPUTE}),
    ("drop-backward", 4, {**SP2, **ZERO_3}),
    ("drop-backward", 4, {**ZERO_BUBBLE, **ZERO_2}),
    ("drop-backward", 2, {"micro_batch_size": 1, **ZERO_2}),
    ("superposition", 4, {**SP2, **PP2, "micro_batch_size": 1}),
    ("superposition", 2, {**ZBV, **RECOMPUTE}),
    ("superposition-more", 4, {**SP2, **ZERO_3}),
    ("superposition-more", 4, {**ZERO_BUBBLE, **ZERO_2}),
    ("alternate-pld", 2, {**ZBV, **RECOMPUTE}),
    ("alternate-pld", 4, {**SP2, **PP2}),
    ("alternate-pld", 2, {**ZERO_3, "micro_batch_size": 1, **RECOMPUTE}),
    ("pld-bert", 4, {**SP2, **PP2}),
    ("raptr-tread", 4, {**ZERO_BUBBLE, **ZERO_2}),
    ("raptr-tread", 2, {**PP2, "pipeline_split": "1,5", "micro_batch_size": 1}),
    ("raptr-tread", 4, {**SP2, **ZERO_3}),
]
RESUMED = ["both", "layer-dropout-tread", "raptr-tread", "superposition-more", "alternate-pld", "layer-drop-importance"]
LEGS: list[tuple[int, dict[str, Any]]] = [(2, PP2), (4, {**SP2, **ZERO_3}), (2, ZBV)]


def name_of(case: tuple[str, int, dict[str, Any]]) -> str:
    arm, world_size, layout = case
    return "-".join([arm, str(world_size), *(str(value) for value in layout.values() if value is not True)])


@dataclass
class Truths:
    """The corpora, and the run of each arm on one process, made when it is first asked for."""

    folder: Path
    corpus: Corpus
    sentences: SentenceCorpus
    runs: dict[str, Run] = field(default_factory=dict)

    def settings(self, arm: str, folder: Path) -> dict[str, Any]:
        corpus = self.sentences if ARMS[arm].get("family") == "bert" else self.corpus
        return {**ARMS[arm], **corpus.settings, "save": str(folder / "checkpoints")}

    def of(self, arm: str) -> tuple[Run, dict[str, torch.Tensor]]:
        folder = self.folder / arm
        if arm not in self.runs:
            folder.mkdir()
            self.runs[arm] = run(folder, self.settings(arm, folder))
        return self.runs[arm], saved_tensors(folder / "checkpoints", STEPS)


@pytest.fixture(scope="module")
def truths(corpus: Corpus, sentence_corpus: SentenceCorpus, tmp_path_factory: pytest.TempPathFactory) -> Truths:
    return Truths(tmp_path_factory.mktemp("one-process"), corpus, sentence_corpus)


@pytest.mark.parametrize(("arm", "world_size", "layout"), CASES, ids=map(name_of, CASES))
def test_every_layout_gives_the_curve_the_draws_and_the_weights_of_one_process(
    truths: Truths, tmp_path: Path, arm: str, world_size: int, layout: dict[str, Any],
) -> None:
    truth, weights = truths.of(arm)
    found = run(tmp_path, {**truths.settings(arm, tmp_path), **layout}, world_size)
    assert_same_curve(found.lines, truth.lines)
    for name in ("skipped_layers", "sequence_length", "consumed_flops", "cumulative_saving"):
        assert found.column(name) == truth.column(name), name
    assert found.kept == truth.kept
    assert_same_tensors(saved_tensors(tmp_path / "checkpoints", STEPS), weights)


def test_every_registered_policy_is_resumed_in_the_middle_of_a_run() -> None:
    resumed = {policy.name for arm in RESUMED for policy in policies(config_of(ARMS[arm])).active}
    assert resumed == {policy.name for policy in POLICIES}


def test_every_registered_policy_is_run_on_every_kind_of_layout() -> None:
    """Random-LTD and Token Dropping alone are run on more layouts in `test_equivalence`."""
    cases = [(policy.name, layout) for arm, _, layout in CASES for policy in policies(config_of(ARMS[arm])).active]
    for policy in POLICIES:
        layouts = {name for case, layout in cases if case == policy.name for name in layout}
        assert policy.name in {case for case, _ in cases}, f"no arm runs {policy.name}"
        if policy.name not in ("random", "importance", "sequence-curriculum"):
            assert {"tensor_model_parallel_size", "pipeline_model_parallel_size"} <= layouts, policy.name
            assert layouts & {"use_distributed_optimizer", "data_parallel_sharding_strategy"}, policy.name


def config_of(settings: dict[str, Any]) -> RunConfig:
    config, _ = parse_run_config(words({name: value for name, value in settings.items() if name != "family"}),
                                 settings.get("family", "gpt"))
    return config


@pytest.mark.parametrize("arm", RESUMED)
def test_a_run_that_changes_its_layout_in_the_middle_keeps_its_curve(
    truths: Truths, tmp_path: Path, arm: str,
) -> None:
    truth, weights = truths.of(arm)
    settings = {**truths.settings(arm, tmp_path), "load": str(tmp_path / "checkpoints"), "exit_interval": 3}
    for number, (world_size, layout) in enumerate(LEGS, start=1):
        leg = run(tmp_path, {**settings, **layout}, world_size, code=0 if number == len(LEGS) else 11)
    assert_same_curve(leg.steps, truth.steps)
    assert leg.column("skipped_layers") == truth.column("skipped_layers")
    assert leg.column("sequence_length") == truth.column("sequence_length")
    assert leg.column("consumed_flops") == truth.column("consumed_flops")
    assert_same_tensors(saved_tensors(tmp_path / "checkpoints", STEPS), weights)


def test_the_curves_are_those_of_the_settings(truths: Truths) -> None:
    """Lengths and counters by hand; most steps skip layers, not always the same, and validation reads whole samples."""
    both, curriculum, plain = (truths.of(arm)[0] for arm in ("both", "curriculum", "layer-drop"))
    # 8 + 24 t / 7, in whole eights
    assert both.column("sequence_length") == curriculum.column("sequence_length") == [8, 8, 8, 16, 16, 24, 24, 32]
    assert [line["kept_length"] for line in both.steps] == [8, 8, 8, 16, 16, 20, 24, 28]
    assert curriculum.column("consumed_tokens") == [64, 128, 192, 320, 448, 640, 832, 1088]
    assert curriculum.column("consumed_layer_tokens") == curriculum.column("consumed_tokens")
    assert set(curriculum.column("theoretical_saving")) == {0.0}
    skipped = [line["skipped_layers"] for line in plain.steps]
    assert len({tuple(layers) for layers in skipped}) > 4 and both.column("skipped_layers") == skipped
    processed = [8 * 32 * (6 - len(layers)) for layers in skipped]
    assert plain.column("consumed_layer_tokens") == [sum(processed[:step + 1]) // 6 for step in range(STEPS)]
    assert plain.column("consumed_tokens") == [256 * (step + 1) for step in range(STEPS)]
    for run_of in (both, curriculum, plain):
        losses = run_of.column("lm_loss")
        assert losses[-1] < losses[0] - 0.2  # the text, and so the fall, is another with each version of Python
        assert run_of.column("validation_loss")[-1] < run_of.column("validation_loss")[0]


def test_superposed_steps_count_their_text_and_are_marked(truths: Truths) -> None:
    """8 samples of 32 tokens a step, and of 4 x 32 in the first three steps of the arm that reads more."""
    same, more = (truths.of(arm)[0] for arm in ("superposition", "superposition-more"))
    assert same.column("token_superposition") == [2] * 3 + [1] * 5
    assert more.column("token_superposition") == [4] * 3 + [1] * 5
    assert same.column("consumed_tokens") == [256 * (step + 1) for step in range(STEPS)]
    assert more.column("consumed_tokens") == [1024 * min(step + 1, 3) + 256 * max(0, step - 2) for step in range(STEPS)]
    assert [line["kept_length"] for line in same.steps] == [16] * 7 + [32]
    flops = [line["model_flops"] for line in same.steps]
    assert flops[0] < 0.5 * flops[7] and flops[0] < flops[3] < flops[7]
