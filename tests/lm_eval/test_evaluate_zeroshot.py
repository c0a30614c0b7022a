"""The command line around the tasks, with a stand-in for the distributed model."""

import dataclasses
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.checkpoint.durable import FileFacts
from megatron_ltd.checkpoint.manifest import Manifest
from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import DataError
from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.train.state import TrainState
from tests.gloo import run_ranks
from tests.lm_eval.fakes import UniformScorer
from tools import compare_results, evaluate_zeroshot

PASSAGES = b'{"text": "the old dog saw the young dog"}\n{"text": "one two three"}\n'


class StandIn(UniformScorer):
    """A uniform model with a checkpoint's manifest; tokens are words of a tiny tokenizer.json."""

    def __init__(self, tokenizer_config: DataConfig, max_length: int = 16):
        super().__init__(max_length=max_length, vocab=8)
        self.tokenizer_config = tokenizer_config
        model = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=2, seq_length=16, vocab_size=64)
        state = TrainState(Consumed(steps=7, samples=14, tokens=224, layer_token_sum=480))
        self.manifest = Manifest(
            step=7, config=RunConfig(model=model, data=tokenizer_config).to_dict(), counters=state.counters(),
            tensors={}, files={}, versions={},
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files, and a tokenizer.json with one token a word."""
    words = ["<|endoftext|>", "the", "old", "young", "dog", "saw", "one", "two", "three", "[UNK]"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True, "single_word": False,
                                            "lstrip": False, "rstrip": False, "normalized": False}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "[UNK]"},
    }))
    (tmp_path / "lambada").mkdir()
    (tmp_path / "lambada" / "lambada_test.jsonl.gz").write_bytes(gzip.compress(PASSAGES))
    (tmp_path / "wiki.test.raw").write_text(" \n = One = \n \n the old dog . \n")
    return tmp_path


@pytest.fixture
def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    recorded = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer.json"))
    scorer = StandIn(recorded)

    def build(load: str, *, step: int | None, tensor_parallel: int, pipeline_parallel: int,
              micro_batch_size: int) -> StandIn:
        assert (load, step, tensor_parallel, pipeline_parallel, micro_batch_size) == ("ckpt", None, 1, 1, 8)
        return scorer

    monkeypatch.setattr(evaluate_zeroshot, "build_scorer", build)
    return scorer


def evaluate(folder: Path, *flags: str) -> int:
    return evaluate_zeroshot.main(["--load", "ckpt", "--task-data", str(folder), *flags])


def results_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.usefixtures("stand_in")
def test_results_hold_every_metric_and_where_it_comes_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "results.json"
    assert evaluate(folder, "--tasks", "lambada,wikitext", "--output", str(output)) == 0
    found = results_of(output)
    assert found["model"] == {"load": "ckpt", "step": 7, "consumed_samples": 14, "consumed_tokens": 224,
                              "consumed_layer_tokens": 120}
    lambada = found["tasks"]["lambada"]
    assert lambada["metrics"]["accuracy"] == {"value": 0.0, "stderr": 0.0}
    assert lambada["metrics"]["perplexity"]["value"] == pytest.approx(8)
    assert (lambada["n"], lambada["unit"], lambada["truncated"]) == (2, "passages", 0)
    assert lambada["file"].endswith("lambada_test.jsonl.gz") and len(lambada["sha256"]) == 64
    assert found["tasks"]["wikitext"]["metrics"]["token_perplexity"]["value"] == pytest.approx(8)
    assert {"megatron_ltd", "torch", "python", "numpy"} <= set(found["versions"])
    assert found["options"] == {"limit": None, "overlapping_eval": None, "num_fewshot": 0, "bos_token_id": None,
                                "overlong": "truncate", "log_samples": False}
    table = capsys.readouterr().out
    assert "| lambada  | accuracy" in table and "| wikitext | bits_per_byte" in table
    assert "step 7: trained on 224 tokens, 120 layer tokens" in table
    assert not list(folder.glob("*.partial"))


@pytest.mark.usefixtures("stand_in")
def test_logged_samples_make_up_the_metrics_and_are_kept_by_a_repeated_command(folder: Path) -> None:
    output = folder / "results.json"
    flags = ("--tasks", "lambada,wikitext", "--output", str(output), "--log-samples")
    assert evaluate(folder, *flags) == 0
    text = output.read_text()
    assert '"accuracy": [ 0.0, 0.0 ]' in text, "a list of numbers takes one line"
    tasks = json.loads(text)["tasks"]
    assert tasks["lambada"]["samples"]["perplexity"] == pytest.approx([-math.log(8)] * 2)
    [[logprob, tokens]] = tasks["wikitext"]["samples"]["token_perplexity"]
    assert math.exp(-logprob / tokens) == pytest.approx(8)
    assert evaluate(folder, *flags) == 0 and output.read_text() == text
    assert compare_results.main([str(output), str(output)]) == 0


@pytest.mark.usefixtures("stand_in")
def test_limit_and_stride_reach_the_tasks(folder: Path) -> None:
    output = folder / "results.json"
    assert evaluate(folder, "--tasks", "lambada,wikitext", "--output", str(output), "--limit", "1",
                    "--overlapping-eval", "4") == 0
    found = results_of(output)
    assert found["tasks"]["lambada"]["n"] == 1
    assert "stride 4" in found["tasks"]["wikitext"]["protocol"]
    assert found["options"] == {"limit": 1, "overlapping_eval": 4, "num_fewshot": 0, "bos_token_id": None,
                                "overlong": "truncate", "log_samples": False}


def test_tokenizer_flags_take_the_place_of_recorded_files_that_have_moved(folder: Path, stand_in: StandIn) -> None:
    stand_in.tokenizer_config = dataclasses.replace(stand_in.tokenizer_config, tokenizer_model="/moved/tokenizer.json")
    assert evaluate(folder, "--tasks", "lambada") == 21
    assert evaluate(folder, "--tasks", "lambada", "--tokenizer-model", str(folder / "tokenizer.json")) == 0


@pytest.mark.usefixtures("stand_in")
def test_a_task_that_fails_leaves_the_others_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, output = folder / "b\udcffd.jsonl", folder / "results.json"  # a name that is not UTF-8
    bad.write_text('{"text": "fine words"}\n{"text": 3}\n')
    flags = ("--tasks", f"lambada={bad},perplexity=none.txt,wikitext", "--output", str(output), str(folder / "r.md"))
    assert evaluate(folder, *flags) == 21
    said = capsys.readouterr()
    assert "b\\udcffd.jsonl:2: text = 3 must be a text" in (folder / "r.md").read_text()
    assert f"DataError: {folder}/b\\udcffd.jsonl:2: text = 3 must be a text" in said.err
    assert "2 of 3 tasks failed: lambada, perplexity" in said.err
    assert re.search(r"\| lambada +\| failed", said.out)
    assert "perplexity failed: DataError: task perplexity=none.txt" in said.out
    found = results_of(output)
    assert list(found["tasks"]) == ["wikitext"] and list(found["failed"]) == ["lambada", "perplexity"]


def test_a_repeated_command_runs_what_is_not_finished(folder: Path, stand_in: StandIn) -> None:
    late, output = folder / "late.jsonl", folder / "results.json"
    flags = ("--tasks", f"wikitext,lambada={late}", "--output", str(output))
    assert evaluate(folder, *flags) == 21
    first, rows = results_of(output), len(stand_in.rows)
    late.write_bytes(PASSAGES)
    assert evaluate(folder, *flags) == 0
    second = results_of(output)
    assert second["tasks"]["wikitext"] == first["tasks"]["wikitext"] and not second["failed"]
    assert len(stand_in.rows) == rows + 2  # only the two passages of lambada

    (folder / "wiki.test.raw").write_text(" = One = \n the young dog . \n")
    assert evaluate(folder, *flags) == 0
    assert len(stand_in.rows) > rows + 2, "a file that has changed is scored again"
    rows = len(stand_in.rows)
    assert evaluate(folder, *flags, "--limit", "1") == 0
    assert len(stand_in.rows) == rows + 2, "with other options everything is scored again"

    weights = {"weights.safetensors": FileFacts(8, "0" * 64)}
    wider = {**stand_in.manifest.config, "model": {**stand_in.manifest.config["model"], "rotary_base": 500000}}
    for change in ({"files": weights}, {"config": wider}):
        rows, stand_in.manifest = len(stand_in.rows), dataclasses.replace(stand_in.manifest, **change)
        for others, asked in (("another model in the same folder", 2), ("the same again", 0)):
            assert evaluate(folder, *flags, "--limit", "1") == 0
            assert len(stand_in.rows) == rows + asked, others
            rows = len(stand_in.rows)

    for damage in ({"wikitext": {"metrics": {}}}, [], {"wikitext": 3}):
        record = results_of(output)
        output.write_text(json.dumps(record | {"tasks": damage}))
        assert evaluate(folder, *flags, "--limit", "1") == 0
        assert results_of(output)["tasks"] == record["tasks"]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--tasks", "hellaswagg"], 20, "no task 'hellaswagg'"),
        (["--tasks", "lambada", "--limit", "0"], 20, "--limit = 0 must be at least 1"),
        (["--tasks", "wikitext", "--overlapping-eval", "17"], 20, "--overlapping-eval = 17 does not fit"),
        (["--tasks", "lambada=none.jsonl"], 21, "there is no file 'none.jsonl'"),
        (["--tasks", "lambada", "--output", "none/results.json"], 21, "--output = none/results.json"),
        (["--tasks", "lambada", "--tokenizer-type", "SentencePieceTokenizer"], 21, "is no SentencePiece model"),
    ],
)
def test_what_a_user_can_repair_is_one_message_and_an_exit_code(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    assert evaluate(folder, *flags) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_metric_beyond_floating_point_is_null_in_the_file_and_inf_in_the_table(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.vocab = 10**400
    output = folder / "results.json"
    assert evaluate(folder, "--tasks", "lambada", "--output", str(output)) == 0
    assert results_of(output)["tasks"]["lambada"]["metrics"]["perplexity"]["value"] is None
    assert "inf" in capsys.readouterr().out


def what_rank_is_told(rank: int, world_size: int, problems: list[str | None], digests: list[str]) -> str:
    try:
        evaluate_zeroshot.agree_on_inputs(problems[rank], {"lambada": digests[rank]})
    except DataError as error:
        return str(error)
    return ""


def test_processes_that_read_different_files_all_stop() -> None:
    told = run_ranks(what_rank_is_told, 2, [None, None], ["one", "other"])
    assert told[0] == told[1] and 'lambada: "one" on rank 0; "other" on rank 1' in told[0]


def test_a_file_missing_on_one_process_stops_all_with_its_message() -> None:
    assert run_ranks(what_rank_is_told, 2, [None, "no file here"], ["one", "one"]) == ["no file here"] * 2


def test_processes_that_read_the_same_go_on() -> None:
    assert run_ranks(what_rank_is_told, 2, [None, None], ["one", "one"]) == ["", ""]
