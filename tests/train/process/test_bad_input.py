"""Settings that cannot run are refused before a process group exists, and places that cannot be written before the
first step: by one message that names the setting, its value and the remedy, with the exit code of its kind, without a
traceback; nothing is written and nothing is lost.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_ltd import pretrain_gpt
from megatron_ltd.train import pretrain as recipe
from megatron_ltd.train.process.environment import Launch
from tests.gloo import launch_ranks
from tests.train.refusals import CHECKPOINT, CONFIG, RUN, assert_clear, contents, settings_in
from tests.train.runs import Corpus, Ending, Settings, launched, pretrain, words


@contextlib.contextmanager
def no_process_group() -> Iterator[None]:
    """Fails if anybody tries to make one."""
    with mock.patch.object(dist, "init_process_group", side_effect=AssertionError("a process group was made")):
        yield


BAD_SETTINGS: list[tuple[str, int, dict[str, Any], list[str]]] = [
    ("heads-tp", 8, {"tensor_model_parallel_size": 8, "ffn_hidden_size": 128},
     ["--num-attention-heads = 4", "not divisible by --tensor-model-parallel-size = 8", "choose 8"]),
    ("query-groups-tp", 4, {"tensor_model_parallel_size": 4, "group_query_attention": True, "num_query_groups": 6,
                            "num_attention_heads": 12, "kv_channels": 8},
     ["--num-query-groups = 6", "--tensor-model-parallel-size = 4", "choose 2 or 4"]),
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
     ["--seq-length = 32", "--max-position-embeddings = 16", "or raise --max-position-embeddings"]),
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


def test_help_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    for rank, printed in ((0, True), (1, False)):
        with launched(Launch(rank, rank, 2, "env://")), no_process_group():
            if printed:
                with pytest.raises(SystemExit) as stop:
                    pretrain_gpt.main(["--help"])
                assert not stop.value.code
            else:
                assert pretrain_gpt.main(["--num-layers", "4", "-h"]) == 0
        assert ("--num-layers N" in capfd.readouterr().out) == printed


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
    plain = recipe.probe_writable

    def probe_writable(*args: Any) -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            plain(*args)
        finally:
            os.seteuid(os.getuid())

    with mock.patch.object(recipe, "probe_writable", probe_writable):
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
def test_a_metrics_file_that_cannot_be_opened_is_refused_before_a_step_is_taken(
    corpus: Corpus, folder: Path, tmp_path: Path, world_size: int,
) -> None:
    (tmp_path / "file").write_text("in the way")
    before = contents(tmp_path)
    path = str(tmp_path / "file" / "metrics.jsonl")
    endings = launch_ranks(pretrain, world_size, settings_in(corpus, folder, metrics_file=path))
    # One rank writes the file; the others learn of it before they wait for anything else.
    assert [ending.code for ending in endings] == [CONFIG] * world_size
    assert_clear(endings[0].said, [f"--metrics-file = {path}"])
    assert [ending.said for ending in endings[1:]] == [""] * (world_size - 1)
    assert not endings[0].kept
    assert contents(tmp_path) == before
