"""Finetuning ViT: learning from images in files, on every layout, from a checkpoint of another resolution and other
classes, and what is refused.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification

from examples.split_mnist import write_idx
from megatron_ltd.model.vit import POSITIONS, resized_positions
from tests.train.refusals import CHECKPOINT, CONFIG, DATA, assert_clear, refused_in_this_process
from tests.train.runs import Run, pretrain, run, saved_tensors
from tests.train.test_equivalence import RECOMPUTE, TP2, ZERO_2, ZERO_3, assert_same_curve, assert_same_tensors
from tools import convert_checkpoint

CLASSES = 4


def patterns(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square in one of the four corners, which is the class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count).astype(np.uint8)
    images = random.integers(0, 120, (count, size, size)).astype(np.uint8)
    half = size // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        image[half * (label // 2):half * (label // 2) + half, half * (label % 2):half * (label % 2) + half] += 120
    return images, labels


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, size, count, seed in (("train", 12, 90, 1), ("valid", 12, 30, 2), ("large", 20, 40, 3)):
        images, labels = patterns(count, size, seed)
        write_idx(folder / f"{name}.images", images)
        write_idx(folder / f"{name}.labels", labels)
        if name == "large":
            continue
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            place = folder / name / f"corner-{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:03d}.png")
    return folder


def idx(home: Path, name: str) -> tuple[str, str]:
    return str(home / f"{name}.images"), str(home / f"{name}.labels")


def settings(home: Path, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": "finetune_vit", "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "img_h": 12,
        "img_w": 12, "patch_dim": 4, "num_channels": 1, "num_classes": CLASSES, "train_data_path": idx(home, "train"),
        "valid_data_path": idx(home, "valid"), "micro_batch_size": 2, "global_batch_size": 8, "train_epochs": 2,
        "seed": 7, "lr": 2e-3, "adam_eps": 1e-6, "lr_decay_style": "constant", "log_interval": 1, **changes}


DROPPING = {"random_ltd": True, "random_ltd_start_length": 4, "random_ltd_length_step": 2}


@pytest.fixture(scope="module")
def truth(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("truth")
    return run(folder, settings(home, **DROPPING, save=str(folder / "c"))), folder / "c"


def test_a_model_learns_to_tell_images_apart_with_growing_kept_lengths_and_all_counters_right(
    truth: tuple[Run, Path],
) -> None:
    found, _ = truth
    lengths = [int(line["kept_length"]) for line in found.steps]
    steps = len(lengths)
    growing = round(0.3 * steps)
    assert steps == 23 and lengths == sorted(lengths) and lengths[0] == 4
    # Even numbers from 4 on while it grows, then all 10 tokens.
    assert set(lengths[:growing]) == {4, 6, 8} and set(lengths[growing:]) == {10}
    layer_tokens = sum(8 * (2 * 10 + 2 * length) for length in lengths) // 4
    assert found.steps[-1]["consumed_tokens"] == steps * 8 * 10
    assert found.steps[-1]["consumed_layer_tokens"] == layer_tokens
    valid = [line for line in found.lines if "validation_top1" in line]
    assert [line["step"] for line in valid] == [0, 12, 23] and "validation_ppl" not in valid[0]
    assert valid[-1]["validation_top1"] >= 0.5 and valid[-1]["validation_top5"] == 1.0  # chance is a quarter
    assert valid[-1]["validation_loss"] < valid[0]["validation_loss"]
    assert (valid[-1]["validation_top1"] * 30) == pytest.approx(round(valid[-1]["validation_top1"] * 30))


@pytest.mark.parametrize(("world_size", "layout"), [
    (2, TP2), (4, {**TP2, **ZERO_2}), (4, ZERO_3), (1, {**RECOMPUTE, "micro_batch_size": 8})],
    ids=["tp2", "tp2-dp2-zero2", "dp4-zero3", "recompute-micro-batch-8"])
def test_every_layout_gives_the_curve_and_the_weights_of_one_process(
    home: Path, truth: tuple[Run, Path], tmp_path: Path, world_size: int, layout: dict[str, Any],
) -> None:
    found = run(tmp_path, settings(home, **DROPPING, save=str(tmp_path / "c"), **layout), world_size)
    assert_same_curve(found.lines, truth[0].lines)
    ours, theirs = ([line["validation_top1"] for line in lines if "validation_top1" in line]
                    for lines in (found.lines, truth[0].lines))
    assert ours == theirs and found.kept == truth[0].kept
    assert_same_tensors(saved_tensors(tmp_path / "c", 23), saved_tensors(truth[1], 23))


def test_skipped_layers_are_the_same_on_every_layout(home: Path, tmp_path: Path) -> None:
    skipping = {**DROPPING, "layer_drop_rate": 0.4, "train_epochs": None, "train_iters": 6}
    found = []
    for name, world_size, layout in (("one", 1, {}), ("four", 4, {**TP2, **ZERO_3})):
        (tmp_path / name).mkdir()
        found.append(run(tmp_path / name, settings(home, **skipping, save=str(tmp_path / name / "c"), **layout),
                         world_size))
    assert_same_curve(found[1].lines, found[0].lines)
    drawn = [line["skipped_layers"] for line in found[0].steps]
    assert drawn == found[1].column("skipped_layers") and len({tuple(layers) for layers in drawn}) > 2
    assert_same_tensors(saved_tensors(tmp_path / "four" / "c", 6), saved_tensors(tmp_path / "one" / "c", 6))


def test_folders_of_images_give_the_samples_of_the_idx_files(home: Path, tmp_path: Path) -> None:
    """In another order, so that only what does not depend on it is equal: the loss before the first update."""
    flags = {"train_epochs": None, "train_iters": 1, "global_batch_size": 90, "log_interval": 1, "lr": 1e-9}
    of_files = run(tmp_path, settings(home, **flags))
    folder = tmp_path / "folders"
    folder.mkdir()
    of_folders = run(folder, settings(home, **flags, train_data_path=str(home / "train"),
                                      valid_data_path=str(home / "valid")))
    for name in ("lm_loss", "validation_loss", "validation_top1"):
        assert of_folders.column(name) == pytest.approx(of_files.column(name), rel=1e-5), name


def test_weights_are_taken_for_a_larger_resolution_and_other_classes(
    home: Path, truth: tuple[Run, Path], tmp_path: Path,
) -> None:
    unsaid = dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "patch_dim", "num_channels"))
    found = run(tmp_path, settings(
        home, load=str(truth[1] / "best"), finetune=True, use_checkpoint_args=True, **unsaid, img_h=20, img_w=20,
        num_classes=6, train_epochs=None, train_iters=1, lr=1e-12, save=str(tmp_path / "c"),
        train_data_path=idx(home, "large"), valid_data_path=None), 2)
    assert found.steps[-1]["consumed_tokens"] == 8 * 26
    before = saved_tensors(truth[1] / "best", 23)
    after = saved_tensors(tmp_path / "c", 1)
    for name in (name for name in before if name.startswith("model.") and "classifier" not in name):
        wanted = before[name]
        if name == f"model.{POSITIONS}":
            wanted = resized_positions(wanted, (3, 3), (5, 5))
        torch.testing.assert_close(after[name], wanted, rtol=0.0, atol=1e-7)
    assert after["model.classifier.weight"].shape == (6, 32)


def test_a_trained_model_is_exported_and_scored_by_transformers(
    home: Path, truth: tuple[Run, Path], tmp_path: Path,
) -> None:
    assert convert_checkpoint.main(["--load", str(truth[1]), "--to-hf", str(tmp_path / "hf")]) == 0
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written.keys() <= {"model_type", "architectures", "torch_dtype", *vars(theirs.config)}
    images, labels = patterns(30, 12, 2)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(images.astype(np.float32) / 127.5 - 1.0)[:, None]).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels.astype(np.int64)))
    last = [line for line in truth[0].lines if "validation_loss" in line][-1]
    assert last["validation_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert last["validation_top1"] == pytest.approx(float((logits.argmax(1).numpy() == labels).mean()))


def test_an_interrupted_run_with_augmented_images_gives_the_same_curve(home: Path, tmp_path: Path) -> None:
    flags = settings(home, image_augmentation="crop-flip", train_epochs=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    found = run(whole, flags)
    plain = run(parts, {**flags, "image_augmentation": None})
    assert found.column("lm_loss") != pytest.approx(plain.column("lm_loss"), rel=1e-3)
    half = {**flags, "save": str(parts / "c"), "load": str(parts / "c")}
    run(parts, {**half, "exit_interval": 5}, code=11)
    assert_same_curve(run(parts, half, 2).lines, found.lines)


def test_it_is_told_how_much_of_a_set_is_scored(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Images of folders stand in order of their classes, so that a part of them is not like the whole."""
    flags = settings(home, train_epochs=None, train_iters=1, test_data_path=idx(home, "train"))
    of_valid = "validation scores the first 16 of 30 samples; raise --eval-iters, or give --full-validation, for all"
    of_test = "the test scores the first 16 of 90 samples; raise --eval-iters for all"
    for limits, told in (({"eval_iters": 2}, [of_valid, of_test]), ({"eval_iters": 2, "full_validation": True},
                                                                    [of_test]), ({"eval_iters": 12}, [])):
        assert pretrain(0, 1, "", {**flags, **limits}).code == 0
        assert [line for line in capfd.readouterr().out.splitlines() if " scores the first " in line] == told


REFUSED: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "patches": (CONFIG, {"patch_dim": 5}, ["--img-h = 12: not divisible by --patch-dim = 5", "choose for example 10"]),
    "no-pixels": (CONFIG, {"patch_dim": 0, "img_h": -3}, ["--patch-dim = 0: must be at least 1", "--img-h = -3"]),
    "sequence": (CONFIG, {"seq_length": 9}, ["--seq-length = 9", "3 x 3 patches and the class token are 10 tokens"]),
    "tokenizer": (CONFIG, {"tokenizer_type": "NullTokenizer"}, ["--tokenizer-type = NullTokenizer is given for ViT"]),
    "no-images": (CONFIG, {"train_data_path": None}, ["no images are given"]),
    "pipeline": (CONFIG, {"pipeline_model_parallel_size": 2},
                 ["--pipeline-model-parallel-size = 2 is given for ViT"]),
    "importance": (CONFIG, {"token_drop_policy": "importance", "random_ltd_layers": "1-2"}, ["patches have no"]),
    "swapped": (DATA, {"train_data_path": ("train.labels", "train.images")}, ["train.labels: no idx file of images"]),
    "no-such-folder": (DATA, {"train_data_path": "nowhere"}, ["--train-data-path = ", "nowhere: no such folder"]),
    "size": (DATA, {"img_h": 16, "img_w": 16}, ["grey images of 12 x 12 pixels", "use --img-h 12 --img-w 12"]),
    "classes": (DATA, {"num_classes": 3}, ["it has 4 classes", "use --num-classes 4"]),
    "cut-off": (DATA, {"train_data_path": ("cut.images", "train.labels")}, ["cut.images", "damaged, copy it again"]),
    "cut-gzip": (DATA, {"train_data_path": ("cut.gz", "train.labels")}, ["cut.gz: it cannot be read"]),
    "other-model": (CHECKPOINT, {"load": "base", "finetune": True, "hidden_size": 64},
                    ["holds another model", "--hidden-size: 32 in the checkpoint, 64 in this run"]),
    "not-finetuned": (CHECKPOINT, {"load": "base", "num_classes": 5}, ["--num-classes: 4 in the checkpoint, 5"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_finetuned_is_refused_with_one_message(
    home: Path, truth: tuple[Run, Path], case: str,
) -> None:
    code, change, fragments = REFUSED[case]
    data = (home / "train.images").read_bytes()
    (home / "cut.images").write_bytes(data[:-5])
    (home / "cut.gz").write_bytes(gzip.compress(data)[:-20])
    paths = change.get("train_data_path")
    if paths is not None:
        change = {**change, "train_data_path": str(home / paths) if isinstance(paths, str) else
                  tuple(str(home / path) for path in paths)}
    if change.get("load") == "base":
        change = {**change, "load": str(truth[1])}
    ending = refused_in_this_process(settings(home, **change))
    assert ending.code == code, ending.said
    assert_clear(ending.said, fragments)


def test_settings_of_images_are_refused_by_other_models() -> None:
    gpt = refused_in_this_process({"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 8,
                                   "mock_data": True, "vocab_size": 50, "lr": 1e-3, "train_iters": 1, "patch_dim": 4,
                                   "image_augmentation": "crop"})
    assert gpt.code == CONFIG
    assert_clear(gpt.said, ["--patch-dim = 4 is given in a run without ViT", "--image-augmentation = crop"])
