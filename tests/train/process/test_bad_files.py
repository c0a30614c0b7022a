"""Data and checkpoints that cannot be used are refused by all ranks before the first step, in one message that names
the file, what was expected and what was found; nothing is written and nothing is lost.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from megatron_ltd.train import pretrain as recipe
from tests.gloo import launch_ranks
from tests.train.refusals import (
    CHECKPOINT,
    DATA,
    PEER_LOST,
    assert_clear,
    contents,
    refused_in_this_process,
    settings_in,
)
from tests.train.runs import Corpus, Ending, Settings, pretrain


def copy_of(corpus: Corpus, folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus.prefix + suffix, folder / f"copy{suffix}")
    return str(folder / "copy")


def test_a_corpus_of_another_vocabulary_is_refused(corpus: Corpus, folder: Path) -> None:
    before = contents(folder)
    foreign = str(folder.parent / "foreign")
    with IndexedCorpusWriter(foreign, 5000) as writer:
        for start in range(0, 4000, 100):
            writer.add_document([token % 5000 for token in range(start, start + 1000)])
    ending = refused_in_this_process(settings_in(corpus, folder, data_path=(foreign,)))
    assert ending.code == DATA
    assert_clear(ending.said, ["DataError: ", f"Corpus {foreign}", "4899", "[0, 320)", "Use the tokenizer with which"])
    assert contents(folder) == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_truncated_corpus_is_refused_with_the_place_and_what_was_expected(
    corpus: Corpus, folder: Path, tmp_path: Path, world_size: int,
) -> None:
    prefix = copy_of(corpus, tmp_path)
    size = os.path.getsize(prefix + ".bin")
    os.truncate(prefix + ".bin", size - 2)
    before = contents(folder)
    endings = launch_ranks(pretrain, world_size, settings_in(corpus, folder, data_path=(prefix,)))
    assert [ending.code for ending in endings] == [DATA] * world_size
    assert_clear(endings[0].said, [f"{prefix}.bin, byte {size - 2}", f"a file of {size} bytes",
                                   f"found {size - 2} bytes", "copy it again"])
    assert [ending.said for ending in endings[1:]] == [""] * (world_size - 1)
    assert contents(folder) == before


BAD_DATA: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no-corpus": ({"data_path": ("nowhere/corpus",)}, ["nowhere/corpus", "no file nowhere/corpus.idx"]),
    "no-tokenizer": ({"tokenizer_model": "nowhere/tokenizer.json"}, ["nowhere/tokenizer.json"]),
    "empty-training-set": ({"split": "0.001,99,1"}, ["The train set is empty", "--split = 0.001,99,1",
                                                     "Give it a larger share"]),
    "empty-validation-set": ({"split": "99.99,0.01,0"}, ["The valid set is empty", "--split = 99.99,0.01,0",
                                                         "--eval-iters 0 runs without validation"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_read_is_refused_before_the_first_step(
    corpus: Corpus, folder: Path, case: str,
) -> None:
    change, fragments = BAD_DATA[case]
    before = contents(folder)
    ending = refused_in_this_process(settings_in(corpus, folder, **change))
    assert ending.code == DATA
    assert_clear(ending.said, ["DataError: ", *fragments])
    assert contents(folder) == before


def pretrain_in_folder(rank: int, world_size: int, init_method: str, settings: Settings, folders: list[str]) -> Ending:
    """`pretrain` from a working directory of each rank's own."""
    os.chdir(folders[rank])
    return pretrain(rank, world_size, init_method, settings)


def test_ranks_that_read_different_corpora_under_one_name_all_stop(
    corpus: Corpus, folder: Path, tmp_path: Path,
) -> None:
    places = []
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        copy_of(corpus, tmp_path / str(number))
        places.append(str(tmp_path / str(number)))
    with IndexedCorpusWriter(str(tmp_path / "1" / "copy"), 320) as writer:
        for start in range(40):
            writer.add_document([(start + token) % 300 for token in range(500)])
    endings = launch_ranks(pretrain_in_folder, 2, settings_in(corpus, folder, data_path=("copy",)), places)
    assert [ending.code for ending in endings] == [DATA, DATA]
    assert_clear(endings[0].said, ["The processes read different corpora", "copy the same files"])


def test_a_corpus_that_one_rank_does_not_have_stops_all_with_its_message(
    corpus: Corpus, folder: Path, tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    copy_of(corpus, tmp_path)
    endings = launch_ranks(pretrain_in_folder, 2, settings_in(corpus, folder, data_path=("copy",)),
                           [str(tmp_path), str(tmp_path / "empty")])
    assert [ending.code for ending in endings] == [DATA, DATA]
    assert_clear(endings[0].said, ["no file copy.idx"])


def pretrain_while_it_shrinks(rank: int, world_size: int, init_method: str, settings: Settings,
                              folders: list[str]) -> Ending:
    """`pretrain` on a corpus of each rank's own; the last rank's loses its tokens once they have been checked."""
    os.chdir(folders[rank])
    plain = recipe.build_model

    def build_model(*args: Any, **named: Any) -> Any:
        if rank == world_size - 1:
            os.truncate("copy.bin", 0)
        return plain(*args, **named)

    with mock.patch.object(recipe, "build_model", build_model):
        return pretrain(rank, world_size, init_method, settings)


def test_a_corpus_that_shrinks_under_one_rank_stops_all_of_them(corpus: Corpus, folder: Path, tmp_path: Path) -> None:
    places = []
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        copy_of(corpus, tmp_path / str(number))
        places.append(str(tmp_path / str(number)))
    before = contents(folder)
    endings = launch_ranks(pretrain_while_it_shrinks, 2, settings_in(corpus, folder, data_path=("copy",)), places)
    assert [ending.code for ending in endings] == [PEER_LOST, DATA]
    assert_clear(endings[1].said, ["rank 1: DataError: copy.bin, byte ", "found 0; the file has shrunk"])
    assert_clear(endings[0].said, ["rank 0: stopped, since another process failed"])
    now = {f"checkpoints/{name}": digest for name, digest in contents(folder / "checkpoints").items()}
    kept = {name: digest for name, digest in before.items() if name.startswith("checkpoints/")}
    attempts = "checkpoints/attempts.jsonl"  # has one more line
    assert now.pop(attempts) != kept.pop(attempts) and now == kept
    assert len((folder / attempts).read_text().splitlines()) == 2


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["empty", "missing", "tracker-only", "not-this-step"])
def test_a_checkpoint_that_is_not_there_is_never_replaced_by_a_fresh_start(
    corpus: Corpus, folder: Path, tmp_path: Path, kind: str, world_size: int,
) -> None:
    place = tmp_path / "load"
    fragments = {"empty": ["no checkpoint to load", str(place)], "missing": ["--load", str(place), "not a folder"],
                 "tracker-only": [str(place), "latest_checkpointed_iteration.txt"],
                 "not-this-step": ["--ckpt-step = 3 is not in", "Newest steps there: 2"]}[kind]
    change: dict[str, Any] = {"load": str(place)}
    if kind != "missing":
        place.mkdir()
    if kind == "tracker-only":
        (place / "latest_checkpointed_iteration.txt").write_text("100\n")
        change["save"] = str(place)
    if kind == "not-this-step":
        change = {"ckpt_step": 3}
    before = contents(tmp_path)
    endings = launch_ranks(pretrain, world_size, settings_in(corpus, folder, **change))
    assert [ending.code for ending in endings] == [CHECKPOINT] * world_size
    assert_clear(endings[0].said, ["CheckpointError: ", *fragments])
    assert all(not ending.kept for ending in endings)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("change", "fragments"), [
    ({"hidden_size": 64}, ["holds another model", "--hidden-size: 32 in the checkpoint, 64 in this run"]),
    ({"num_layers": 8, "swiglu": True}, ["--num-layers: 6 in the checkpoint, 8 in this run",
                                         "--swiglu: False in the checkpoint, True in this run"]),
    ({"untie_embeddings_and_output_weights": True}, ["--untie-embeddings-and-output-weights: False"]),
    ({"seq_length": 64}, ["embedding.position.weight has shape (32, 32) in the checkpoint, (64, 32) in the model"]),
], ids=str)
def test_a_checkpoint_of_another_model_is_refused(
    corpus: Corpus, folder: Path, change: dict[str, Any], fragments: list[str],
) -> None:
    before = contents(folder)
    ending = refused_in_this_process(settings_in(corpus, folder, **change))
    assert ending.code == CHECKPOINT
    assert_clear(ending.said, fragments)
    assert contents(folder) == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_checkpoint_is_refused_with_file_expected_and_found(
    corpus: Corpus, folder: Path, world_size: int,
) -> None:
    [path] = (folder / "checkpoints").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    expected = hashlib.sha256(data).hexdigest()
    data[-100] ^= 1
    path.write_bytes(data)
    before = contents(folder)
    endings = launch_ranks(pretrain, world_size, settings_in(corpus, folder))
    assert [ending.code for ending in endings] == [CHECKPOINT] * world_size
    found = hashlib.sha256(data).hexdigest()
    assert_clear(endings[0].said, [f"{path} has SHA-256 {found}, expected {expected}", "--ckpt-step loads an older"])
    assert contents(folder) == before
