"""A layout changes where the arithmetic happens and not what it comes to: on a real corpus with random-LTD, every
layout gives the curve, the kept positions and the final weights of the run on one process.

Tolerances, in fp32: the loss to 1e-5 and the gradient norm to 1e-4, relative and at every step. Final weights to 1e-4
absolute, a thirtieth of what one step may move a weight. Moments, which are linear and quadratic in the gradients, to
1e-3 of their tensor's largest. AdamW divides by the root of the mean square, so a gradient that is nothing but rounding
(of a key's bias, which the softmax does not see) would move its weight like any other; an epsilon above rounding keeps
it where it is.
"""

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gloo import launch_ranks
from tests.train.runs import (
    TINY,
    VOCABULARY,
    Corpus,
    Ending,
    Run,
    SentenceCorpus,
    Settings,
    pretrain,
    read_lines,
    run,
    saved_tensors,
)

STEPS = 12
SHORT = {**TINY, "train_iters": STEPS, "random_ltd_steps": 9, "eval_interval": 6}

GPT2 = dict(SHORT)
LLAMA = {**SHORT, "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
         "disable_bias_linear": True, "group_query_attention": True, "num_query_groups": 2,
         "untie_embeddings_and_output_weights": True,
         # Embeddings of the default size stay so small for some steps that RMSNorm blows rounding up a thousandfold.
         "init_method_std": 0.1}
IMPORTANCE = {"random_ltd": False, "token_drop_policy": "importance", "random_ltd_layers": "1-4",
              # Kept sets that move with the losses: by default a step moves importance by half a percent.
              "token_drop_beta": 0.5}
BERT = {**SHORT, "family": "bert", "random_ltd_steps": None, "seq_length": 64, "random_ltd_start_length": 16}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "bloom-untied": {**GPT2, "untie_embeddings_and_output_weights": True, "position_embedding_type": "alibi",
                     "embed_layernorm": True, "apply_layernorm_1p": True, "no_scaled_init": True,
                     "do_layernorm_bias_weight_decay": True, "z_loss_coeff": 1e-2, "decoupled_lr": 6e-3},
    "gpt2-one-stratum": {**GPT2, "random_ltd_strata": 1},
    "gpt2-dropout": {**GPT2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "gpt2-importance": {**SHORT, **IMPORTANCE},
    "bert": {**BERT, "hidden_dropout": 0.1, "attention_dropout": 0.1, "random_ltd_steps": 9},
    "bert-no-binary-head": {**BERT, "bert_no_binary_head": True, "random_ltd_steps": 9},
    "bert-importance": {**BERT, **IMPORTANCE, "random_ltd_layers": "2-4", "random_ltd_start_length": 32},
    "llama": LLAMA,
    "llama-ngrams": {**LLAMA, "ngram_rows": 512, "ngram_length": 3, "optimizer": "muon", "lr": 1e-2},
    "llama-convolution": {**LLAMA, "qkv_conv_kernel": 4, "optimizer": "muon", "lr": 1e-2},
    "one-key-convolution": {**LLAMA, "num_query_groups": 1, "qkv_conv_kernel": 3},
    "llama-muon": {**LLAMA, "num_query_groups": 1, "optimizer": "muon", "lr": 1e-2},
    "llama-completep": {**LLAMA, "optimizer": "muon", "lr": 1e-2, "parametrization": "completep",
                        "base_hidden_size": 16, "base_num_layers": 2},
    "llama-documents": {**LLAMA, "reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
    "llama-importance": {**LLAMA, **IMPORTANCE, "token_drop_no_cross_layer": True},
    "llama-tied-dropout": {**LLAMA, "untie_embeddings_and_output_weights": False, "hidden_dropout": 0.1,
                           "attention_dropout": 0.1},
    "qwen3": {**LLAMA, "qk_layernorm": True, "kv_channels": 12, "window_size": (15, 0), "window_attn_skip_freq": (3,)},
    "olmo2": {**LLAMA, "qk_layernorm": True, "qk_layernorm_all_heads": True, "norm_placement": "after",
              "use_rope_scaling": True},
}

TP2 = {"tensor_model_parallel_size": 2}
SP2 = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**PP2, "pipeline_schedule": "interleaved", "num_layers_per_virtual_pipeline_stage": 1}
ZERO_BUBBLE = {**INTERLEAVED, "pipeline_schedule": "interleaved-zero-bubble"}
ZBV = {**PP2, "pipeline_schedule": "zbv"}
ZERO_2 = {"use_distributed_optimizer": True}
ZERO_3 = {"data_parallel_sharding_strategy": "optim_grads_params"}
RECOMPUTE = {"recompute_granularity": "full"}

CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("gpt2", "tp2", 2, TP2),
    ("gpt2", "tp2-sp", 2, SP2),
    ("gpt2", "pp2-1f1b", 2, PP2),
    ("gpt2", "pp2-interleaved", 2, INTERLEAVED),
    ("gpt2", "pp2-interleaved-zero-bubble", 2, ZERO_BUBBLE),
    ("gpt2", "pp2-zbv", 2, ZBV),
    ("gpt2", "pp2-uneven-split", 2, {**PP2, "pipeline_split": "2,4"}),
    ("gpt2", "pp4", 4, {"pipeline_model_parallel_size": 4}),
    ("gpt2", "dp2", 2, {}),
    ("gpt2", "dp4-zero3", 4, ZERO_3),
    ("gpt2", "tp2-pp2", 4, {**TP2, **PP2}),
    ("gpt2", "tp2-sp-dp2-zero2", 4, {**SP2, **ZERO_2}),
    ("gpt2", "tp2-pp2-dp2", 8, {**TP2, **PP2}),
    ("gpt2", "recompute-full", 1, RECOMPUTE),
    ("gpt2", "recompute-selective-workers", 1, {"recompute_granularity": "selective", "num_workers": 2}),
    ("gpt2", "micro-batch-1", 1, {"micro_batch_size": 1}),
    ("gpt2", "micro-batch-4", 1, {"micro_batch_size": 4}),
    ("bloom-untied", "tp2-sp-pp2-interleaved", 4, {**SP2, **INTERLEAVED}),
    ("gpt2-one-stratum", "tp2-dp2", 4, TP2),
    ("llama-muon", "tp2-sp", 2, SP2),
    ("llama-muon", "dp2", 2, {}),
    ("llama-muon", "dp2-zero2", 2, ZERO_2),
    ("llama-muon", "tp2-dp2-zero3", 4, {**TP2, **ZERO_3}),
    ("llama-ngrams", "tp2-sp-pp2-zbv", 4, {**SP2, **ZBV}),
    ("llama-ngrams", "tp2-dp2-zero3", 4, {**TP2, **ZERO_3}),
    ("llama-convolution", "tp2-sp-pp2-zbv", 4, {**SP2, **ZBV}),
    ("llama-convolution", "tp2-dp2-zero3-recompute", 4, {**TP2, **ZERO_3, **RECOMPUTE}),
    ("one-key-convolution", "tp2", 2, TP2),
    ("llama-completep", "tp2-sp-pp2-zbv", 4, {**SP2, **ZBV}),
    ("gpt2-importance", "tp2-sp", 2, SP2),
    ("gpt2-importance", "pp2-zbv-dp2-zero3", 4, {**ZBV, **ZERO_3}),
    ("gpt2-importance", "tp2-pp2-interleaved-recompute", 4, {**TP2, **INTERLEAVED, **RECOMPUTE}),
    ("gpt2-importance", "dp2-micro-batch-1", 2, {"micro_batch_size": 1}),
    ("llama-importance", "tp2-pp2-dp2", 8, {**TP2, **PP2}),
    ("bert", "tp2-sp", 2, SP2),
    ("bert", "tp2-pp2-zbv", 4, {**TP2, **ZBV}),
    ("bert", "pp2-interleaved-dp2-zero3-recompute", 4, {**INTERLEAVED, **ZERO_3, **RECOMPUTE}),
    ("bert-no-binary-head", "tp2-sp-pp2-zero-bubble", 4, {**SP2, **ZERO_BUBBLE}),
    ("bert-importance", "tp2-sp-pp2-dp2", 8, {**SP2, **PP2}),
    ("bert-importance", "pp2-zbv-micro-batch-1", 2, {**ZBV, "micro_batch_size": 1}),
    ("gpt2-dropout", "tp2-sp-recompute-full", 2, {**SP2, **RECOMPUTE}),
    ("gpt2-dropout", "pp2-zero-bubble-micro-batch-1", 2, {**ZERO_BUBBLE, "micro_batch_size": 1}),
    ("llama", "tp2-sp", 2, SP2),
    ("llama-documents", "tp2-sp-pp2-interleaved", 4, {**SP2, **INTERLEAVED}),
    ("llama-documents", "dp2-zero3-micro-batch-1", 2, {**ZERO_3, "micro_batch_size": 1}),
    ("llama", "pp2-zbv-recompute-selective", 2, {**ZBV, "recompute_activations": True}),
    ("qwen3", "tp2-pp2-zero-bubble", 4, {**TP2, **ZERO_BUBBLE}),
    ("olmo2", "tp2-sp-pp2-dp2-zero3", 8, {**SP2, **PP2, **ZERO_3}),
    ("llama-tied-dropout", "tp2-sp-pp2-zbv-dp2-zero3-recompute-workers", 8,
     {**SP2, **ZBV, **ZERO_3, **RECOMPUTE, "num_workers": 2}),
]


@dataclass
class Truths:
    """The corpora, and the run of each model on one process, made when it is first asked for."""

    folder: Path
    corpus: Corpus
    sentences: SentenceCorpus
    runs: dict[str, Run]

    def settings(self, model: str, folder: Path) -> dict[str, Any]:
        corpus = self.sentences if MODELS[model].get("family") == "bert" else self.corpus
        return {**MODELS[model], **corpus.settings, "save": str(folder / "checkpoints")}

    def of(self, model: str) -> tuple[Run, dict[str, torch.Tensor]]:
        folder = self.folder / model
        if model not in self.runs:
            folder.mkdir()
            self.runs[model] = run(folder, self.settings(model, folder))
        return self.runs[model], saved_tensors(folder / "checkpoints", STEPS)


@pytest.fixture(scope="module")
def truths(corpus: Corpus, sentence_corpus: SentenceCorpus, tmp_path_factory: pytest.TempPathFactory) -> Truths:
    return Truths(tmp_path_factory.mktemp("one-process"), corpus, sentence_corpus, {})


def assert_same_curve(found: list[dict[str, Any]], truth: list[dict[str, Any]]) -> None:
    """Every line has the truth's numbers: counters exactly, loss, norm and validation loss within tolerance."""
    assert [line["step"] for line in found] == [line["step"] for line in truth]
    for line, wanted in zip(found, truth, strict=True):
        for name in ("lm_loss", "z_loss", "validation_loss", "sentence_order_loss", "validation_sentence_order_loss"):
            if name in wanted:
                assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=0.0), (name, wanted["step"])
        if "lm_loss" in wanted:
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4, abs=0.0), wanted["step"]
            for name in ("consumed_samples", "consumed_tokens", "consumed_layer_tokens", "learning_rate",
                         "decoupled_learning_rate", "kept_length", "global_batch_size", "model_flops",
                         "theoretical_saving"):
                assert line.get(name) == wanted.get(name), (name, wanted["step"])


def assert_same_tensors(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    """The checkpoints hold the same tensors, with equal weights and moments up to the tolerance."""
    assert found.keys() == truth.keys()
    for name, wanted in truth.items():
        difference = float((found[name] - wanted).abs().max())
        assert difference <= (1e-4 if name.startswith("model.") else 1e-3 * float(wanted.abs().max())), name


@pytest.mark.parametrize("model", MODELS)
def test_on_one_process_the_loss_falls_and_every_dropped_layer_keeps_what_the_schedule_says(
    truths: Truths, model: str,
) -> None:
    truth, _ = truths.of(model)
    settings = MODELS[model]
    losses, full = truth.column("lm_loss"), int(settings["seq_length"])
    # BERT learns from a sixth of the tokens.
    assert len(losses) == STEPS and losses[-1] < losses[0] - (0.3 if settings.get("family") != "bert" else 0.15)
    lengths = [int(length) for length in truth.column("kept_length")]
    start = int(settings["random_ltd_start_length"])
    assert lengths == sorted(lengths) and lengths[0] == start
    if settings["random_ltd_steps"] is None:
        assert set(lengths) == {start}
    else:
        assert len(set(lengths)) >= 5 and lengths[-1] == full
    layers = (2, 3, 4) if settings.get("random_ltd_layers") == "2-4" else (1, 2, 3, 4)
    batch = int(settings["global_batch_size"])
    expected = {(layer, sample): lengths[sample // batch] for layer in layers
                for sample in range(STEPS * batch) if lengths[sample // batch] < full}
    assert {place: len(positions) for place, positions in truth.kept.items()} == expected
    assert all(positions == sorted(set(positions)) for positions in truth.kept.values())
    first_step = [[tuple(truth.kept[layer, sample]) for layer in layers] for sample in range(batch)]
    if MODELS[model].get("token_drop_policy") == "importance":
        assert all(len(set(of_layers)) == 1 for of_layers in first_step)  # layers share their set
    else:
        # No layer and no sample shares its set with another.
        assert len(set(itertools.chain(*first_step))) == len(layers) * batch


def test_the_z_loss_is_reported_apart_from_the_cross_entropy_and_the_embedding_has_its_own_rate(
    truths: Truths,
) -> None:
    """Before the first step all tokens are about equally probable, so log Z is about the logarithm of their number."""
    first, *_, last = truths.of("bloom-untied")[0].steps
    assert first["lm_loss"] == pytest.approx(math.log(VOCABULARY), rel=0.02)
    assert first["z_loss"] == pytest.approx(1e-2 * math.log(VOCABULARY) ** 2, rel=0.02)
    assert last["decoupled_learning_rate"] == pytest.approx(2.0 * last["learning_rate"]) and last["learning_rate"] > 0.0


@pytest.mark.parametrize(("model", "world_size", "layout"), [(m, n, layout) for m, _, n, layout in CASES],
                         ids=[f"{model}-{name}" for model, name, _, _ in CASES])
def test_every_layout_gives_the_curve_the_kept_positions_and_the_weights_of_one_process(
    truths: Truths, tmp_path: Path, model: str, world_size: int, layout: dict[str, Any],
) -> None:
    truth, weights = truths.of(model)
    found = run(tmp_path, {**truths.settings(model, tmp_path), **layout}, world_size)
    assert_same_curve(found.lines, truth.lines)
    assert found.kept == truth.kept
    assert_same_tensors(saved_tensors(tmp_path / "checkpoints", STEPS), weights)


def test_a_batch_that_grows_gives_the_curve_of_one_process(truths: Truths, tmp_path: Path) -> None:
    """One microbatch a process at first, and then two."""
    found: list[Run] = []
    for number, (world_size, layout) in enumerate([
            (1, {}), (2, {}), (2, ZERO_2), (2, ZERO_3), (4, {**PP2, "micro_batch_size": 1})]):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(run(folder, {**truths.settings("gpt2", folder), "rampup_batch_size": (4, 4, 12), **layout},
                         world_size))
    truth = found[0]
    assert truth.column("global_batch_size") == [4] * 3 + [8] * (STEPS - 3)
    for other in found[1:]:
        assert_same_curve(other.lines, truth.lines)


def compiled(rank: int, world_size: int, init_method: str, settings: Settings) -> Ending:
    """`pretrain` with the compiler's helper processes turned off."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    return pretrain(rank, world_size, init_method, settings)


@pytest.mark.parametrize("name", ["gpt2", "llama-convolution"])
def test_compiled_layers_give_the_curve_of_plain_ones(truths: Truths, tmp_path: Path, name: str) -> None:
    steps = 8  # kept lengths 8, 12, 16, 20 and, in the first and the last layer, 32
    path = tmp_path / "metrics.jsonl"
    endings = launch_ranks(compiled, 2, {
        **truths.settings(name, tmp_path), **SP2, "compile": True, "train_iters": STEPS, "exit_interval": steps,
        "metrics_file": str(path)}, timeout=280)
    assert {ending.code for ending in endings} == {11}, endings[0].said
    truth, _ = truths.of(name)
    assert_same_curve(read_lines(path), [line for line in truth.lines if line["step"] <= steps])


@pytest.mark.parametrize("extra", [{}, {"hidden_dropout": 0.1, "attention_dropout": 0.1}], ids=["plain", "dropout"])
def test_dropping_from_the_full_length_on_is_bit_for_bit_a_run_without_dropping(
    truths: Truths, tmp_path: Path, extra: dict[str, Any],
) -> None:
    done: list[Run] = []
    tensors: list[dict[str, torch.Tensor]] = []
    plain = {name: value for name, value in truths.settings("gpt2", tmp_path).items()
             if not name.startswith("random_ltd")}
    for name, drop in (("off", {}), ("full", {"random_ltd": True, "random_ltd_start_length": TINY["seq_length"]})):
        folder = tmp_path / name
        folder.mkdir()
        done.append(run(folder, {**plain, **extra, **drop, "save": str(folder / "checkpoints")}))
        tensors.append(saved_tensors(folder / "checkpoints", STEPS))
    off, full = done
    for name in ("lm_loss", "grad_norm", "validation_loss"):
        assert off.column(name) == full.column(name)
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])
    assert off.kept == full.kept == {}
    assert full.steps[-1]["consumed_layer_tokens"] == full.steps[-1]["consumed_tokens"]
