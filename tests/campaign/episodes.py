"""The runs that the faults disturb, their true curves, and the law."""

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.data.corpus.indexed import IndexedCorpus
from tests.campaign.faults import FAULTS, FOR_ROOT
from tests.campaign.play import Broken, Play, demand
from tests.data.corpora import described
from tests.hosts import why_not
from tests.train.runs import TINY, VOCABULARY, read_lines, write_corpus, write_sentence_corpus

STEPS = 10
SHORT: dict[str, Any] = {**TINY, "num_layers": 4, "micro_batch_size": 4, "train_iters": STEPS, "random_ltd_steps": 8,
                         "eval_interval": 5, "save_interval": 2, "distributed_timeout_minutes": 0.25}
NO_LTD = {name: None for name in TINY if name.startswith("random_ltd")}
LLAMA = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True,
         "init_method_std": 0.1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, random-LTD, dropout": ("pretrain_gpt", {**SHORT, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "llama, TREAD": ("pretrain_gpt", {**SHORT, **NO_LTD, **LLAMA, "token_drop_policy": "tread",
                                      "random_ltd_start_length": 16, "random_ltd_strata": 2}),
    "llama, Muon, layer dropout": ("pretrain_gpt", {**SHORT, **NO_LTD, **LLAMA, "optimizer": "muon", "lr": 1e-2,
                                                    "layer_dropout_rate": 0.8, "layer_dropout_steps": 6}),
    "gpt2, Token Dropping": ("pretrain_gpt", {**SHORT, "random_ltd": False, "token_drop_policy": "importance",
                                              "random_ltd_layers": "1-2", "token_drop_beta": 0.5}),
    "gpt2, superposition": ("pretrain_gpt", {**SHORT, **NO_LTD, "token_superposition": 2,
                                             "token_superposition_steps": 5}),
    "bert, random-LTD": ("pretrain_bert", {**SHORT, "seq_length": 64, "random_ltd_start_length": 16}),
}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}), (1, {"async_save": True}), (2, TP2), (2, {**TP2, "sequence_parallel": True, "async_save": True}),
    (2, PP2), (2, {**PP2, "pipeline_schedule": "zbv", "async_save": True}), (2, {"use_distributed_optimizer": True}),
    (2, {"data_parallel_sharding_strategy": "optim_grads_params", "async_save": True}), (4, {**TP2, **PP2}),
    (4, {**TP2, "data_parallel_sharding_strategy": "optim_grads_params"}),
]


class Stage:
    """The corpora, the uninterrupted run of each model, and the faults that this machine allows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.corpora = folder / "corpora"
        self.corpora.mkdir()
        self._settings = {"pretrain_gpt": write_corpus(self.corpora).settings,
                          "pretrain_bert": write_sentence_corpus(self.corpora).settings}
        for settings in self._settings.values():
            described(IndexedCorpus(settings["data_path"][0]), None, VOCABULARY)
        self.faults = [name for name in FAULTS if name not in FOR_ROOT] if why_not() else list(FAULTS)
        self.truths = {model: self._truth(model, folder / f"truth-{number}") for number, model in enumerate(MODELS)}

    def play(self, model: str, folder: Path, chance: random.Random) -> Play:
        """A run of a model on its own copy of the corpora."""
        recipe, settings = MODELS[model]
        shutil.copytree(self.corpora, folder / "corpora")
        prefix = folder / "corpora" / Path(self._settings[recipe]["data_path"][0]).name
        settings = {**settings, **self._settings[recipe], "data_path": (str(prefix),),
                    "data_cache_path": str(folder / "cache"), "save": str(folder / "checkpoints"),
                    "load": str(folder / "checkpoints"), "metrics_file": str(folder / "metrics.jsonl")}
        return Play(chance, folder, recipe, settings, prefix, LAYOUTS, STEPS)

    def _truth(self, model: str, folder: Path) -> list[dict[str, Any]]:
        play = self.play(model, folder, random.Random(0))
        ended = play.attempt((1, {}))
        demand({end.code for end in ended} == {0}, f"the uninterrupted run of {model} failed", ended)
        return read_lines(play.metrics)


def check_curve(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """The curves are one, within the tolerance of any two layouts."""
    def steps(lines: list[dict[str, Any]]) -> list[tuple[int, bool]]:
        return [(line["step"], "lm_loss" in line) for line in lines]

    if steps(found) != steps(wanted):
        raise Broken(f"the curve has the lines {steps(found)} in place of {steps(wanted)}")
    for line, expected in zip(found, wanted, strict=True):
        for name in ("lm_loss", "validation_loss"):
            if name in expected and line[name] != pytest.approx(expected[name], rel=1e-5, abs=0.0):
                raise Broken(f"{name} of step {line['step']} is {line[name]} in place of {expected[name]}")


def episode(stage: Stage, seed: int, number: int) -> Counter[tuple[str, str]]:
    """Play one run; if it is complete before its last fault, it begins anew.

    Returns:
        how many faults of each kind ended in which way.

    Raises:
        Broken: the law does not hold.
    """
    chance = random.Random(f"{seed} {number}")
    model = chance.choice(list(MODELS))
    names = chance.choices(stage.faults, k=chance.choice([1, 2, 2, 3]))
    folder = stage.folder / f"episode-{number}"
    truth, play = stage.truths[model], stage.play(model, folder, chance)
    counts: Counter[tuple[str, str]] = Counter()
    name = names[0]
    try:
        for name in names:
            if play.complete:
                check_curve(read_lines(play.metrics), truth)
                play.begin_anew()
            counts[name, FAULTS[name](play)] += 1
        ended = play.attempt()
        demand({end.code for end in ended} == {0}, "the run cannot be completed", ended)
        check_curve(read_lines(play.metrics), truth)
    except Broken as broken:
        raise Broken(f"{name}, in {names} of {model}: {broken}", name) from broken
    shutil.rmtree(folder)
    return counts
