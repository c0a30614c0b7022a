"""What a user can get wrong: one message that names the setting or file, its value and the remedy, the exit code of its
kind, no traceback, nothing written and nothing lost.

Settings are refused before a process group exists; data and checkpoints before the first step, by all ranks at once.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_ltd import pretrain_gpt
from megatron_ltd.data.indexed_writer import IndexedCorpusWriter
from megatron_ltd.model.stack import Stack
from megatron_ltd.train.launch import Launch
from tests.gloo import launch_ranks
from tests.train.runs import TINY, Corpus, Ending, Settings, launched, pretrain, run, words, write_corpus

CONFIG, DATA, CHECKPOINT, PEER_LOST = 20, 21, 22, 40

RUN = {**TINY, "train_iters": 4, "random_ltd_steps": 3, "eval_interval": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def earlier_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("earlier")
    run(folder, {**RUN, **corpus.settings, "save": str(folder / "checkpoints"), "exit_interval": 2}, code=11)
    (folder / "checkpoints" / "exit.json").unlink()
    return folder


@pytest.fixture
def folder(earlier_run: Path, tmp_path: Path) -> Path:
    """A copy of it that the bad command could do harm to."""
    shutil.copytree(earlier_run, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the record of how the last command ended."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "exit.json"}


def settings_in(corpus: Corpus, folder: Path, **settings: Any) -> dict[str, Any]:
    """The earlier run, continued."""
    return {**RUN, **corpus.settings, "save": str(folder / "checkpoints"), "load": str(folder / "checkpoints"),
            "metrics_file": str(folder / "metrics.jsonl"), **settings}


def assert_clear(said: str, fragments: list[str]) -> None:
    missing = [fragment for fragment in fragments if fragment not in said]
    assert not missing, f"{missing} not in:\n{said}"
    assert "Traceback" not in said and "internal error" not in said, said


@contextlib.contextmanager
def no_process_group() -> Iterator[None]:
    """Fails if anybody tries to make one."""
    with mock.patch.object(dist, "init_process_group", side_effect=AssertionError("a process group was made")):
        yield


BAD_SETTINGS: list[tuple[str, int, dict[str, Any], list[str]]] = [
    ("heads-tp", 8, {"tensor_model_parallel_size": 8, "ffn_hidden_size": 128},
     ["--num-attention-heads = 4", "not divisible by --tensor-model-parallel-size = 8", "choose 8"]),
    ("query-groups-tp", 4, {"tensor_model_parallel_size": 4, "group_query_attention": True, "num_query_groups": 2},
     ["--num-query-groups = 2", "--tensor-model-parallel-size = 4", "choose 4"]),
    ("layers-stages", 8, {"pipeline_model_parallel_size": 8, "micro_batch_size": 1},
     ["--num-layers = 6", "fewer than the 8 stages", "use more layers or a smaller pipeline"]),
    ("layers-stages-zbv", 4, {"pipeline_model_parallel_size": 4, "pipeline_schedule": "zbv", "num_layers": 7},
     ["--num-layers = 7", "fewer than the 8 stages", "--pipeline-schedule = zbv"]),
    ("batch-dp", 2, {"global_batch_size": 10},
     ["--global-batch-size = 10", "--micro-batch-size = 2 x data-parallel size = 2", "choose 8 or 12"]),
    ("batch-pipeline", 2, {"pipeline_model_parallel_size": 2, "global_batch_size": 2},
     ["--global-batch-size = 2", "1 microbatches", "use for example 4"]),
    ("processes", 3, {"tensor_model_parallel_size": 2}, ["3 processes", "--tensor-model-parallel-size = 2"]),
    ("positions", 1, {"max_position_embeddings": 16},
     ["--seq-length = 32", "--max-position-embeddings = 16", "raise that, or leave it out"]),
    ("start-length", 1, {"random_ltd_start_length": 64},
     ["--random-ltd-start-length = 64", "--seq-length = 32", "choose at most 32"]),
    ("start-strata", 1, {"random_ltd_start_length": 10, "random_ltd_strata": 4},
     ["--random-ltd-start-length = 10", "--random-ltd-strata = 4", "choose 12"]),
    ("strata-sp", 2, {"random_ltd_strata": 1, "tensor_model_parallel_size": 2, "sequence_parallel": True},
     ["--random-ltd-strata = 1", "--sequence-parallel", "use --random-ltd-strata 2"]),
    ("unknown-flag", 1, {"num_layer": 6}, ["--num-layer: no such flag", "nearest: --num-layers"]),
    ("not-a-number", 1, {"lr": "fast"}, ["--lr = fast", "not a number"]),
    ("two-at-once", 1, {"max_position_embeddings": 16, "random_ltd_start_length": 64, "global_batch_size": 9},
     ["3 problems", "--seq-length = 32", "--random-ltd-start-length = 64", "--global-batch-size = 9"]),
    ("vocabulary-too-small", 1, {"vocab_size": 300},
     ["--vocab-size = 300", "320 ids of the tokenizer", "Leave the flag out, or raise it"]),
    ("no-tokenizer", 1, {"tokenizer_type": None, "tokenizer_model": None},
     ["--tokenizer-type is required", "NullTokenizer"]),
    ("no-such-schedule", 1, {"pipeline_schedule": "dualpipe"}, ["--pipeline-schedule = dualpipe", "zbv"]),
]


@pytest.mark.parametrize(("world_size", "change", "fragments"), [case[1:] for case in BAD_SETTINGS],
                         ids=[case[0] for case in BAD_SETTINGS])
def test_settings_that_cannot_run_are_refused_before_a_process_group_exists(
    corpus: Corpus, folder: Path, capfd: pytest.CaptureFixture[str], world_size: int, change: dict[str, Any],
    fragments: list[str],
) -> None:
    before = contents(folder)
    with launched(Launch(0, 0, world_size, "env://")), no_process_group():
        code = pretrain_gpt.main(words(settings_in(corpus, folder, **change)))
    assert code == CONFIG
    printed = capfd.readouterr()
    assert printed.err.startswith("ConfigError: ")
    assert_clear(printed.err, fragments)
    assert contents(folder) == before


def test_only_the_first_rank_says_what_all_ranks_know(
    corpus: Corpus, folder: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    with launched(Launch(1, 1, 2, "env://")), no_process_group():
        assert pretrain_gpt.main(words(settings_in(corpus, folder, max_position_embeddings=16))) == CONFIG
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("environment", [
    {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
], ids=["incomplete", "no-number"])
def test_a_launcher_that_tells_half_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], environment: dict[str, str],
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with no_process_group():
        assert pretrain_gpt.main(words(RUN)) == CONFIG
    assert_clear(capfd.readouterr().err, [f"RANK={environment['RANK']}", "start with torchrun"])


def refused_in_this_process(settings: Settings) -> Ending:
    """A run on one process that may not take a step."""
    with mock.patch.object(Stack, "forward", side_effect=AssertionError("a step was taken")):
        return pretrain(0, 1, "", settings)


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


def copy_of(corpus: Corpus, folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus.prefix + suffix, folder / f"copy{suffix}")
    return str(folder / "copy")


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
    plain = pretrain_gpt.build_model

    def build_model(*args: Any) -> Any:
        if rank == world_size - 1:
            os.truncate("copy.bin", 0)
        return plain(*args)

    with mock.patch.object(pretrain_gpt, "build_model", build_model):
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
    assert contents(folder / "checkpoints") == {name.removeprefix("checkpoints/"): digest
                                                for name, digest in before.items() if name.startswith("checkpoints/")}


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


DIFFERENT: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"lr": 1e-3}, {"lr": 2e-3}, ["--lr: 0.001 on rank 0; 0.002 on rank 1"]),
    ({}, {"seed": 8, "random_ltd_start_length": 16},
     ["--seed: 7 on rank 0; 8 on rank 1", "--random-ltd-start-length: 8 on rank 0; 16 on rank 1"]),
    ({}, {"tensor_model_parallel_size": 2}, ["--tensor-model-parallel-size: 1 on rank 0; 2 on rank 1"]),
    ({}, {"save": None, "load": None}, ["--save: "]),
]


@pytest.mark.parametrize(("of_rank_0", "of_rank_1", "fragments"), DIFFERENT, ids=["lr", "drop", "layout", "save"])
def test_ranks_with_different_flags_all_stop_and_name_them(
    corpus: Corpus, folder: Path, of_rank_0: dict[str, Any], of_rank_1: dict[str, Any], fragments: list[str],
) -> None:
    before = contents(folder)
    endings = launch_ranks(pretrain, 2, *(settings_in(corpus, folder, **own) for own in (of_rank_0, of_rank_1)))
    assert [ending.code for ending in endings] == [CONFIG, CONFIG]
    assert_clear(endings[0].said, ["started with different settings", "start all of them with the same", *fragments])
    assert all(not ending.kept for ending in endings)
    assert contents(folder) == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_folder_that_cannot_be_made_is_refused_before_the_first_step(
    corpus: Corpus, tmp_path: Path, world_size: int,
) -> None:
    (tmp_path / "file").write_text("in the way")
    save = tmp_path / "file" / "checkpoints"
    endings = launch_ranks(pretrain, world_size, {**RUN, **corpus.settings, "save": str(save)})
    assert [ending.code for ending in endings] == [CHECKPOINT] * world_size
    assert_clear(endings[0].said, [f"--save = {save} cannot be written to", "Not a directory"])
    assert all(not ending.kept for ending in endings)
    assert contents(tmp_path) == {"file": hashlib.sha256(b"in the way").hexdigest()}


def pretrain_as_nobody(rank: int, world_size: int, init_method: str, settings: Settings) -> Ending:
    """`pretrain` that has no right to everything when it first touches the folder of checkpoints."""
    plain = pretrain_gpt.probe_writable

    def probe_writable(*args: Any) -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            plain(*args)
        finally:
            os.seteuid(os.getuid())

    with mock.patch.object(pretrain_gpt, "probe_writable", probe_writable):
        return pretrain(rank, world_size, init_method, settings)


def test_a_save_folder_that_is_read_only_is_refused_before_the_first_step(corpus: Corpus) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        save = Path(name) / "checkpoints"
        save.mkdir()
        save.chmod(0o555)
        endings = launch_ranks(pretrain_as_nobody, 2, {**RUN, **corpus.settings, "save": str(save)})
        assert [ending.code for ending in endings] == [CHECKPOINT, CHECKPOINT]
        assert_clear(endings[0].said, [f"--save = {save} cannot be written to", "rank 0: Permission denied",
                                       "rank 1: Permission denied"])
        assert contents(save) == {}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_metrics_file_that_cannot_be_opened_is_refused_before_the_first_step(
    corpus: Corpus, folder: Path, tmp_path: Path, world_size: int,
) -> None:
    (tmp_path / "file").write_text("in the way")
    before = contents(tmp_path)
    path = str(tmp_path / "file" / "metrics.jsonl")
    endings = launch_ranks(pretrain, world_size, settings_in(corpus, folder, metrics_file=path))
    # One rank writes the file; the others see no more than that it has left.
    assert [ending.code for ending in endings] == [CONFIG, PEER_LOST][:world_size]
    assert_clear(endings[0].said, [f"--metrics-file = {path}"])
    assert all(not ending.kept for ending in endings)
    assert contents(tmp_path) == before
