"""Finetuning GPT: against a plain PyTorch loop over `transformers`, on every kind of layout, from epoch to epoch, and
what is refused.
"""

import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from megatron_ltd.checkpoint.convert.huggingface.importing import import_model
from megatron_ltd.checkpoint.layout import checkpoints
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.finetuning.epochs import EpochDataset
from megatron_ltd.data.finetuning.packing import PackedDataset
from megatron_ltd.data.finetuning.responses import ResponseForm, Responses, read_responses
from megatron_ltd.data.text.tokenizer import NullTokenizer
from megatron_ltd.train import validate
from megatron_ltd.train.result import HeldOut
from megatron_ltd.train.state import TrainState
from tests.train.refusals import CONFIG, DATA, assert_clear, refused_in_this_process
from tests.train.runs import TINY, Corpus, Run, pretrain, read_lines, run, saved_tensors
from tests.train.test_equivalence import (
    INTERLEAVED,
    RECOMPUTE,
    SP2,
    TP2,
    ZBV,
    ZERO_2,
    ZERO_3,
    assert_same_curve,
    assert_same_tensors,
)

VOCABULARY, LENGTH, SEED = 64, 32, 7
EXAMPLES, BATCH, EPOCHS = 90, 4, 2


def write_lines(path: Path, count: int, seed: int) -> str:
    """Prompts of numbers, and responses that go on counting."""
    random = np.random.default_rng(seed)
    with open(path, "w") as file:
        for _ in range(count):
            start, prompt, response = random.integers(0, 40), random.integers(1, 8), random.integers(1, 12)
            words = [str(int(n) % (VOCABULARY - 1)) for n in range(start, start + prompt + response)]
            file.write(json.dumps({"prompt": " ".join(words[:prompt]), "response": " ".join(words[prompt:])}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of `transformers`, imported, and lines to train on."""
    folder = tmp_path_factory.mktemp("finetuning")
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=32, n_head=4, n_positions=40, vocab_size=VOCABULARY,
                                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1))
    model.save_pretrained(folder / "hf")
    import_model(folder / "hf", folder / "base", TrainState().counters())
    write_lines(folder / "train.jsonl", EXAMPLES, 1)
    write_lines(folder / "valid.jsonl", 21, 2)
    return folder


def settings(home: Path, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": "finetune_gpt", "load": str(home / "base"), "finetune": True, "use_checkpoint_args": True,
        "train_jsonl": str(home / "train.jsonl"), "valid_jsonl": str(home / "valid.jsonl"),
        "tokenizer_type": "NullTokenizer", "seq_length": LENGTH, "micro_batch_size": 2, "global_batch_size": BATCH,
        "train_epochs": EPOCHS, "seed": SEED, "lr": 3e-3, "adam_eps": 1e-6,
        "lr_decay_style": "constant", "log_interval": 1, **changes}


def examples(path: Path, vocabulary: int, length: int) -> Responses:
    form = ResponseForm("prompt", "response", length)
    return read_responses("--train-jsonl", [str(path)], NullTokenizer(vocabulary - 1), form)


def response_losses(model: PreTrainedModel, responses: Responses, chosen: list[int]) -> list[torch.Tensor]:
    """Of each example by itself, unpacked: the losses of its response and of the end after it."""
    losses = []
    for index in chosen:
        text, learned = responses.example(index)
        ids = torch.from_numpy(text)[None]
        logits = model(ids[:, :-1]).logits[0]
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none")[torch.from_numpy(learned)[1:]])
    return losses


def plain_loop(model: PreTrainedModel, responses: Responses, steps: int, batch: int, length: int) -> list[float]:
    """Finetuning as one would write it down: no packing, no microbatches, AdamW, clipping."""
    model.train()
    decaying = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
                                  lr=3e-3, betas=(0.9, 0.999), eps=1e-6)
    packed = PackedDataset(responses, length, 0)
    order = EpochDataset(packed, steps * batch, SEED)
    means = []
    for step in range(steps):
        chosen = [example for place in range(step * batch, (step + 1) * batch)
                  for example in packed.packs[order.place(place)]]
        loss = torch.cat(response_losses(model, responses, chosen)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        means.append(float(loss.detach()))
    return means


@torch.no_grad()
def plain_validation(model: PreTrainedModel, responses: Responses) -> float:
    return float(torch.cat(response_losses(model.eval(), responses, list(range(len(responses))))).mean())


def test_prompts_and_responses_give_the_losses_of_a_plain_loop_over_transformers(home: Path, tmp_path: Path) -> None:
    others = write_lines(tmp_path / "others.jsonl", 9, 3)
    found = run(tmp_path, settings(home, valid_jsonl=(f"first={home}/valid.jsonl", f"others={others}")))
    model = GPT2LMHeadModel.from_pretrained(home / "hf")
    train = examples(home / "train.jsonl", VOCABULARY, LENGTH)
    packs = len(PackedDataset(train, LENGTH, 0))
    steps = math.ceil(EPOCHS * packs / BATCH)
    assert packs % BATCH and len(found.steps) == steps  # the last step begins another epoch
    losses = plain_loop(model, train, steps, BATCH, LENGTH)
    assert found.column("lm_loss") == pytest.approx(losses, rel=1e-5, abs=0.0)
    assert losses[-1] < 0.8 * losses[0]
    valid = [line for line in found.lines if "validation_loss" in line]
    assert [line["step"] for line in valid] == [0, math.ceil(packs / BATCH), steps]
    before = GPT2LMHeadModel.from_pretrained(home / "hf")
    for place, scored in ((0, before), (-1, model)):
        losses = [plain_validation(scored, examples(path, VOCABULARY, LENGTH))
                  for path in (home / "valid.jsonl", Path(others))]
        assert valid[place]["validation_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        for name, loss in zip(("first", "others"), losses, strict=True):
            assert found.column(f"validation-{name}_loss")[place] == pytest.approx(loss, rel=1e-5)


def test_the_stories_model_gives_the_losses_of_a_plain_loop_over_transformers(tmp_path: Path) -> None:
    data = os.environ.get("MEGATRON_LTD_DATA")
    if data is None:
        pytest.skip("MEGATRON_LTD_DATA is not set")
    source = Path(data) / "models" / "stories260K" / "hf"
    import_model(source, tmp_path / "base", TrainState().counters())
    write_lines(tmp_path / "train.jsonl", EXAMPLES, 4)
    write_lines(tmp_path / "valid.jsonl", 8, 5)
    found = run(tmp_path, settings(tmp_path, train_epochs=1))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    train = examples(tmp_path / "train.jsonl", model.config.vocab_size, LENGTH)
    losses = plain_loop(model, train, len(found.steps), BATCH, LENGTH)
    assert found.column("lm_loss") == pytest.approx(losses, rel=1e-5, abs=0.0)
    dropping = run(tmp_path, settings(tmp_path, train_epochs=3, random_ltd=True, random_ltd_length_step=4))
    lengths = [line["kept_length"] for line in dropping.steps]
    growing = round(0.3 * len(lengths))
    assert lengths[0] == LENGTH // 2 and growing > 2
    assert all(length < LENGTH for length in lengths[:growing]) and set(lengths[growing:]) == {LENGTH}
    assert dropping.column("lm_loss")[0] != losses[0]
    assert dropping.column("lm_loss")[-1] < 0.8 * losses[0]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp": (2, SP2), "pp2-zbv-dp2-zero3": (4, {**ZBV, **ZERO_3}),
    "tp2-pp2-interleaved-recompute": (4, {**TP2, **INTERLEAVED, **RECOMPUTE}),
    "tp2-dp2-zero2": (4, {**TP2, **ZERO_2}), "micro-batch-1": (1, {"micro_batch_size": 1})}
DROPPING = {"random_ltd": True, "random_ltd_strata": 2, "random_ltd_length_step": 4, "random_ltd_start_length": 8,
            "adam_eps": 1e-6}  # well above the rounding that is all of the gradient of a key's bias


@pytest.fixture(scope="module")
def truth(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("truth")
    found = run(folder, settings(home, **DROPPING, save=str(folder / "checkpoints")))
    return found, saved_tensors(folder / "checkpoints", len(found.steps))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_curve_and_the_weights_of_one_process(
    home: Path, tmp_path: Path, truth: tuple[Run, dict[str, torch.Tensor]], layout: str,
) -> None:
    world_size, flags = LAYOUTS[layout]
    found = run(tmp_path, settings(home, **DROPPING, save=str(tmp_path / "checkpoints"), **flags), world_size)
    assert_same_curve(found.lines, truth[0].lines)
    assert found.kept == truth[0].kept and len(found.kept) > 0
    assert_same_tensors(saved_tensors(tmp_path / "checkpoints", len(found.steps)), truth[1])


CORPUS_RUN = {**{name: value for name, value in TINY.items() if not name.startswith(("random_ltd", "train_iters"))},
              "recipe": "finetune_gpt", "train_epochs": 2, "global_batch_size": 128, "micro_batch_size": 16,
              "num_layers": 2, "lr": 1e-2}


def test_a_corpus_is_read_for_whole_epochs_with_the_perplexity_after_each(corpus: Corpus, tmp_path: Path) -> None:
    found = run(tmp_path, {**CORPUS_RUN, **corpus.settings, "eval_iters": 100, "eval_interval": 1000})
    valid = [line for line in found.lines if "validation_ppl" in line]
    assert valid[2]["validation_ppl"] < valid[1]["validation_ppl"] < valid[0]["validation_ppl"]
    indexed = IndexedCorpus(corpus.prefix)
    epoch = (int(indexed.sequence_lengths[:round(0.9 * len(indexed))].sum()) - 1) // TINY["seq_length"]
    assert [line["step"] for line in valid] == [0, math.ceil(epoch / 128), math.ceil(2 * epoch / 128)]
    assert len(found.steps) == valid[2]["step"]
    assert valid[0]["validation_ppl"] == pytest.approx(math.exp(valid[0]["validation_loss"]))


def test_a_run_stops_when_validation_no_longer_improves_and_keeps_the_best_weights(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    save = tmp_path / "checkpoints"
    metrics = tmp_path / "metrics.jsonl"
    command = settings(home, train_epochs=40, early_stopping_patience=2, lr=3e-2, save=str(save), weight_decay=0.0,
                       metrics_file=str(metrics))
    assert pretrain(0, 1, "", command).code == 0
    losses = {line["step"]: line["validation_loss"] for line in read_lines(metrics)[1:] if "validation_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    steps = list(losses)
    assert steps[-1] == steps[steps.index(best) + 2] and len(steps) < 40
    assert list(checkpoints(save / "best")) == [best]
    assert list(checkpoints(save)) == [steps[-1]]
    said = capfd.readouterr().out.splitlines()
    improved = [step for step in steps if losses[step] == min(losses[s] for s in steps[:steps.index(step) + 1])]
    assert [int(line.split("at step ")[1].split(",")[0]) for line in said if line.startswith("best model so far")] \
        == improved
    saved = [line for line in said if line.startswith("saved ")]
    assert [line.split(":")[0] for line in saved] == [
        *(f"saved {save}/best/iter_{step:07d}" for step in improved), f"saved {save}/iter_{steps[-1]:07d}"]
    assert said[-2].startswith("complete: step ") and said[-2].endswith(", where early stopping ended it")
    assert pretrain(0, 1, "", {**command, "load": str(save), "finetune": None}).code == 0
    assert read_lines(metrics)[-1]["step"] == steps[-1]  # it is over: nothing is added
    assert capfd.readouterr().out.splitlines()[-1].startswith(f"already complete: {save} holds step {steps[-1]} of ")
    folder = tmp_path / "scored"
    folder.mkdir()
    scored = run(folder, settings(home, load=str(save / "best"), lr=1e-9, train_epochs=None, train_iters=1))
    assert scored.column("validation_loss")[0] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_run_whose_validation_loss_is_never_finite_has_no_best_model_and_is_saved(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], loss: float,
) -> None:
    save = tmp_path / "checkpoints"
    command = settings(home, train_epochs=40, early_stopping_patience=3, save=str(save))
    with mock.patch.object(validate, "held_out_loss", lambda *_: HeldOut(loss)):
        assert pretrain(0, 1, "", command).code == 0
    assert "stopped after 3 evaluations without a lower validation loss\n" in capfd.readouterr().out
    [checkpoint] = checkpoints(save).values()
    assert read_manifest(checkpoint).counters["best"]["loss"] is None and not (save / "best").exists()


def test_a_run_that_was_interrupted_goes_on_with_the_same_command_and_gives_the_same_curve(
    home: Path, tmp_path: Path,
) -> None:
    command = settings(home, **DROPPING, finetune=None, pretrained_checkpoint=str(home / "base"), async_save=True,
                       save_interval=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    found = run(whole, {**command, "load": str(whole / "c"), "save": str(whole / "c")})
    half = {**command, "load": str(parts / "c"), "save": str(parts / "c")}
    run(parts, {**half, "exit_interval": 5}, code=11)
    resumed = run(parts, half, 2)
    assert_same_curve(resumed.lines, found.lines)
    assert list(checkpoints(parts / "c" / "best")) == list(checkpoints(whole / "c" / "best"))


REFUSED: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "no-lines": (DATA, {"train_jsonl": "nowhere.jsonl"}, ["--train-jsonl = nowhere.jsonl", "no such file"]),
    "too-long": (DATA, {"seq_length": 8}, ["do not fit into --seq-length = 8", "--overlong-samples skip"]),
    "other-key": (DATA, {"response_key": "answer"}, ["no key 'answer'", "--response-key"]),
    "two-sources": (CONFIG, {"data_path": "corpus"}, ["--train-jsonl and --data-path are given", "keep one"]),
    "only-validation": (CONFIG, {"train_jsonl": None}, ["--valid-jsonl = ", "is given without --train-jsonl"]),
    "patience": (CONFIG, {"valid_jsonl": None, "early_stopping_patience": 1},
                 ["--early-stopping-patience = 1", "add --valid-jsonl"]),
    "two-budgets": (CONFIG, {"train_iters": 5}, ["--train-iters = 5 and --train-epochs = 2 are given"]),
    "mock": (CONFIG, {"mock_data": True, "train_jsonl": None, "valid_jsonl": None}, ["--mock-data is given"]),
    "positions": (CONFIG, {"seq_length": 64}, ["--seq-length = 64", "--max-position-embeddings = 40"]),
    "two-models": (CONFIG, {"pretrained_checkpoint": "elsewhere"},
                   ["--finetune is given with --pretrained-checkpoint = elsewhere", "leave --finetune out"]),
    "weights": (CONFIG, {"train_jsonl": None, "valid_jsonl": None, "data_path": ("1", "a", "2", "b")},
                ["--data-path = 1 a 2 b", "without weights"]),
    "pretraining": (CONFIG, {"recipe": "pretrain_gpt"},
                    ["--train-epochs = 2 is given in a pretraining run", "--train-jsonl = "]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_finetuned_is_refused_with_one_message(home: Path, case: str) -> None:
    code, change, fragments = REFUSED[case]
    ending = refused_in_this_process(settings(home, **change))
    assert ending.code == code, ending.said
    assert_clear(ending.said, fragments)
