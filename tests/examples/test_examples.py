"""The examples' settings and helpers; the scripts themselves are run as a whole, by people and before a release."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from examples.progress import shown_fields, without_crash_report
from examples.quickstart_summary import read_metrics, training_rows
from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import total_steps
from megatron_ltd.settings.checks.all import check
from megatron_ltd.settings.cli import parse_run_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.toml"))
ON_THE_COMMAND_LINE = ["--data-path", "corpus", "--save", "checkpoints", "--load", "checkpoints"]
TOKENIZERS = {"gpt": ["--vocab-file", "vocab.json", "--merge-file", "merges.txt"],
              "bert": ["--vocab-file", "vocab.txt"]}

VOCABULARIES = {"gpt": 50257, "bert": 30522}
PARAMETERS = {"gpt_125m": 125e6, "gpt_350m": 355e6, "gpt_1.3b": 1.3e9, "gpt_6.7b": 6.7e9, "gpt_13b": 12.9e9,
              "bert_base_token_dropping": 110e6, "bert_large": 336e6}


def read(path: Path) -> RunConfig:
    family: Literal["gpt", "bert"] = "bert" if path.stem.startswith("bert") else "gpt"
    config, notes = parse_run_config(["--config", str(path), "--vocab-size", str(VOCABULARIES[family]),
                                      *ON_THE_COMMAND_LINE, *TOKENIZERS[family]], family)
    assert notes == [], "a shipped configuration has no setting without effect"
    return config


def stated(path: Path, pattern: str) -> list[int]:
    """The numbers of the one line of the file's header that matches."""
    found = re.search(pattern, path.read_text())
    assert found is not None, f"{path.name} does not state {pattern}"
    return [int(group.replace(",", "")) for group in found.groups()]


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "PYTHONPATH"}}
    return subprocess.run(["bash", str(ROOT / script), *arguments],
                          env={**inherited, "PYTHON": sys.executable, **environment},
                          capture_output=True, text=True, timeout=300)


def test_all_sizes_have_a_configuration() -> None:
    assert {path.stem for path in CONFIGS} == set(PARAMETERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_runs_on_the_hardware_it_states(path: Path) -> None:
    config = read(path)
    (gpus,) = stated(path, r"# Hardware: (\d+) GPUs")
    tp, pp, dp = stated(path, r"# Layout: tensor (\d+) x pipeline (\d+) x data (\d+)")
    assert tp * pp * dp == gpus
    assert (config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size) == (tp, pp)
    check(config, gpus)
    assert total_steps(config, dp) == stated(path, r"# Length: ([\d,]+) steps")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_the_model_in_its_name(path: Path) -> None:
    model = read(path).model
    h, f = model.hidden_size, model.ffn
    layer = 3 * h * h + 3 * h + h * h + h + 2 * h * f + f + h + 4 * h
    vocabulary = VOCABULARIES[model.family]
    parameters = model.num_layers * layer + (vocabulary + model.max_positions) * h + 2 * h
    if model.family == "bert":
        parameters += 2 * h + (h * h + 3 * h + vocabulary) + (h * h + h) + (2 * h + 2)
    assert parameters == pytest.approx(PARAMETERS[path.stem], rel=0.02)


def test_the_paper_s_run_has_the_paper_s_schedule() -> None:
    config = read(ROOT / "examples" / "configs" / "gpt_1.3b.toml")
    drop, training = config.token_drop, config.training
    assert (drop.policy, drop.random_ltd_start_length, drop.random_ltd_steps) == ("random", 128, 200_000)
    assert (drop.random_ltd_length_step, config.model.seq_length) == (16, 2048)
    assert (training.global_batch_size, training.train_tokens) == (512, 300_000_000_000)


@pytest.mark.parametrize(("environment", "said"), [
    ({"NNODES": "2"}, "MASTER_ADDR is not set"),
    ({"NODE_RANK": "1"}, "NODE_RANK = 1 must be between 0 and NNODES - 1 = 0"),
    ({"GPUS_PER_NODE": "none"}, "GPUS_PER_NODE = none must be a positive number"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT = 70000 must be a port number"),
    ({"CONFIG": "no_such.toml"}, "CONFIG = no_such.toml cannot be read"),
    ({"PYTHON": "no-such-python"}, "PYTHON = no-such-python cannot import"),
])
def test_the_launch_script_says_what_is_wrong(environment: dict[str, str], said: str) -> None:
    result = run_script("examples/pretrain_gpt.sh", "--mock-data", **environment)
    assert result.returncode == 20
    assert said in result.stderr


def test_the_launch_script_asks_what_to_train() -> None:
    result = run_script("examples/pretrain_gpt.sh")
    assert (result.returncode, "nothing to train" in result.stderr) == (20, True)


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.sh")) + [ROOT / "tests" / "run.sh"],
                         ids=lambda path: path.name)
def test_a_script_is_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_progress_bar_shows_loss_and_kept_length() -> None:
    line = " iteration       10/     300 | lm loss: 6.123456E+00 | grad norm: 1.234 | kept length: 64 | tokens/s: 12 |"
    assert shown_fields(line) == {"loss": "6.123", "norm": "1.234", "kept": "64"}
    assert shown_fields(" iteration       10/     300 | lm loss: nan |") == {"loss": "nan"}


def test_a_stop_that_explains_itself_does_not_look_like_a_crash() -> None:
    place = "torch/distributed/elastic/multiprocessing/api.py:1]"
    explained = [f"E1121 {place} failed (exitcode: 11) local_rank: 0", "Traceback (most recent call last):"]
    crashed = [f"E1121 {place} failed (exitcode: -9) local_rank: 0", "Traceback (most recent call last):"]
    said = ["iteration 5/ 10 |", f"W1121 {place} Sending process 7 closing signal SIGTERM"]
    assert list(without_crash_report(said + explained)) == said[:1]
    assert list(without_crash_report(said + crashed)) == said[:1] + crashed


def test_the_summary_takes_the_last_word_of_a_repeated_step(tmp_path: Path) -> None:
    train = {"consumed_tokens": 100, "consumed_layer_tokens": 75.0, "tokens_per_second": 5.0, "kept_length": 64}
    records = [{"step": 5, "lm_loss": 9.0, **train}, {"step": 10, "lm_loss": 7.0, **train},
               {"step": 10, "lm_loss": 6.0, **train}, {"step": 10, "validation_loss": 2.0, "validation_ppl": 7.389}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = dict(training_rows(*read_metrics(path)))
    assert rows["training loss, first and last step"] == "9.000 -> 6.000"
    assert rows["validation perplexity after step 10"] == "7.39"
