"""What is timed is what it is called: dense, dropped and oracle steps, the peer, and the table's arithmetic."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.nanogpt import NanoGPT, load_source
from benchmarks.ours import OurModel
from benchmarks.parts import PARTS, StepClock
from benchmarks.shapes import SHAPES, run_config
from megatron_ltd.errors import ConfigError
from megatron_ltd.parallel.gradients import local_gradient
from megatron_ltd.token_drop.policies.random_ltd import RandomLTD
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.launch import Runtime
from tools import benchmark

ROOT = Path(__file__).resolve().parents[2]
SHAPE = SHAPES["tiny"]
CONFIG = run_config(SHAPE, precision="fp32", device="cpu")

PEER = '''
import torch
from torch import nn
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, tokens, labels):
        logits = self.wte(tokens) @ self.wte.weight.t()
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
'''


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield launch.start(CONFIG, Launch())
    launch.stop()


def weights(ours: OurModel) -> dict[str, torch.Tensor]:
    return {p.name: p.parameter.to_local().detach().clone() for p in ours.model.parameters}


def gradients(ours: OurModel) -> dict[str, torch.Tensor]:
    return {p.name: local_gradient(p.parameter) for p in ours.model.parameters}


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(PEER)
    return tmp_path


def arguments(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**vars(benchmark.parse_args(["--shape", "tiny"])) | given)


def test_an_oracle_that_keeps_all_tokens_takes_the_dense_step(runtime: Runtime) -> None:
    dense, oracle = OurModel(CONFIG, runtime), OurModel(CONFIG, runtime)
    assert oracle.oracle_step(SHAPE.sequence_tokens) == dense.step(SHAPE.sequence_tokens)
    found = weights(oracle)
    for name, expected in weights(dense).items():
        torch.testing.assert_close(found[name], expected, msg=name)


def test_the_oracle_is_a_dropped_step_that_keeps_the_first_tokens(
        runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_tokens(self: RandomLTD, numbers: Sequence[int], sample_ids: torch.Tensor, read_tokens: int,
                     kept_tokens: int) -> torch.Tensor:
        return torch.arange(kept_tokens).expand(len(numbers), len(sample_ids), kept_tokens)

    monkeypatch.setattr(RandomLTD, "rows", first_tokens)
    dropped, oracle = OurModel(CONFIG, runtime), OurModel(CONFIG, runtime)
    assert oracle.oracle_step(16) == pytest.approx(dropped.step(16), rel=1e-6)
    found = gradients(oracle)
    for name, expected in gradients(dropped).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_after_an_oracle_step_the_model_drops_tokens_again(runtime: Runtime) -> None:
    one, other = OurModel(CONFIG, runtime), OurModel(CONFIG, runtime)
    one.oracle_step(16)
    other.oracle_step(16)
    assert one.step(16) == other.step(16)
    assert "forward" not in vars(one.model.stages[0].stack)


def test_every_part_of_a_step_is_timed_and_the_step_is_not_changed(runtime: Runtime) -> None:
    timed, plain = OurModel(CONFIG, runtime), OurModel(CONFIG, runtime)
    parts = timed.timed_parts(16, steps=1)
    plain.step(16)
    assert tuple(parts) == PARTS
    assert all(seconds > 0.0 for seconds in parts.values())
    found = weights(timed)
    assert all(torch.equal(found[name], expected) for name, expected in weights(plain).items())


def test_parts_are_the_stretches_between_marks() -> None:
    clock = StepClock(torch.device("cpu"))
    ticks = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0])
    clock._now = lambda: next(ticks)
    for name in ("start", "embedded", "stacked", "stacked backward", "embedded backward", "gradients", "clipped",
                 "end"):
        clock.mark(name)
    assert clock.parts() == {"embedding": 1.0 + 16.0, "layers": 2.0 + 8.0, "head and loss": 4.0, "clipping": 32.0,
                             "optimizer": 64.0}


def test_the_peer_trains_as_plain_pytorch_does(peer: Path) -> None:
    shape = replace(SHAPE, vocabulary=32, hidden=8)
    model = NanoGPT(load_source(peer), shape, precision="fp32", device=torch.device("cpu"), compiled=False)
    table = model._parameters[0].detach().clone().requires_grad_()
    logits = F.embedding(model._tokens, table) @ table.t()
    F.cross_entropy(logits.flatten(0, 1), model._labels.flatten()).backward()
    assert table.grad is not None
    gradient = table.grad / max(1.0, float(table.grad.norm()))
    expected = table.detach() * (1.0 - 1e-4 * 0.01) - 1e-4 * gradient / (gradient.abs() + 1e-8)
    model.step()
    torch.testing.assert_close(model._parameters[0].detach(), expected)


def test_the_peer_gets_the_shape_that_ours_has(peer: Path) -> None:
    model = NanoGPT(load_source(peer), SHAPES["8x256"], precision="bf16", device=torch.device("cpu"), compiled=False)
    config = run_config(SHAPES["8x256"], precision="bf16", device="cpu").model
    theirs = model._model.config
    assert (theirs.block_size, theirs.vocab_size, theirs.n_layer, theirs.n_head, theirs.n_embd) == (
        config.seq_length, config.padded_vocab_size, config.num_layers, config.num_attention_heads, config.hidden_size)
    assert theirs.bias is True and theirs.dropout == 0.0 and config.tied and not config.disable_bias_linear
    assert model._tokens.shape == (8, 512)


@pytest.mark.parametrize("text", [None, "x = 1\n"])
def test_a_folder_that_is_no_checkout_of_the_peer_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "model.py").write_text(text)
    with pytest.raises(ConfigError, match="--nanogpt = .*; give .* checkout of nanoGPT"):
        load_source(tmp_path)


def test_ratios_and_savings_of_the_table() -> None:
    # Ratios are medians of ratios within rounds: the third round ran at half the speed.
    seconds = {"nanoGPT": [0.2, 0.2, 0.4], "dense": [0.1, 0.1, 0.2], "kept 1/4": [0.06, 0.06, 0.12],
               "oracle 1/4": [0.05, 0.05, 0.1]}
    _, _, *rows = benchmark.table(arguments(), seconds, {"dense": 321.4}).splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert cells["dense"][:5] == ["100", "100", "200", "0.500", ""]
    assert cells["dense"][-1] == "321"
    # 3 (2 (24 s h^2 + 2 h s (s + 1)) + 2 (24 k h^2 + 2 h k (k + 1)) + 2 s h v) with s 64, k 16, h 128, v 256
    full = 3 * (4 * (24 * 64 * 128**2 + 2 * 128 * 64 * 65) + 2 * 64 * 128 * 256)
    kept = full - 3 * 2 * (24 * 48 * 128**2 + 2 * 128 * (64 * 65 - 16 * 17))
    saving = 1 - kept / full
    assert cells["kept 1/4"][3:8] == ["0.300", "1.200", f"{saving:.1%}", "40.0%", f"{0.4 / saving:.0%}"]
    assert cells["kept 1/4"][8] == f"{2 * kept / 0.06 / 1e12:.3g}"


def test_rows_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="--rows = dense,kept 1/3: no row 'kept 1/3'; choose from dense, kept 1/2"):
        benchmark.row_names(arguments(rows="dense,kept 1/3"))
    with pytest.raises(ConfigError, match="nanoGPT needs --nanogpt"):
        benchmark.row_names(arguments(rows="nanoGPT"))


def test_rows_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    rows = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = benchmark.time_rows(rows, 2, "cpu", "wall")
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_the_cpu_clock_wants_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_args(["--clock", "cpu"])
    assert "--clock cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "told"), [
    (["--rounds", "0"], "--rounds = 0 must be at least 1"),
    (["--samples", "0"], "--samples = 0 must be at least 1"),
    (["--sequence", "3"], "--sequence = 3 must be at least 4"),
    (["--threads", "0"], "--threads = 0 must be at least 1"),
    (["--output", "missing/results.json"], "missing/results.json must be a file in an existing folder"),
])
def test_what_cannot_be_timed_or_written_is_told_at_once(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str],
) -> None:
    assert benchmark.main(["--shape", "tiny", "--rows", "dense", "--threads", "1", "--rounds", "1", *words]) == 20
    assert told in capsys.readouterr().err


def test_the_tool_measures_rows_layouts_and_memory(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "benchmark.py"), "--shape", "tiny", "--rounds", "1", "--threads", "1",
         "--rows", "dense", "--layouts", "--memory", "--output", str(output)],
        capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert list(results["seconds"]) == ["dense", "tp2 pp1 dense", "tp2 pp1 kept 1/4", "tp1 pp2 dense",
                                        "tp1 pp2 kept 1/4"]
    assert all(len(values) == 1 and values[0] > 0 for values in results["seconds"].values())
    # A process that has torch in memory needs more than 50 MB, and what the tests' process needs is not counted.
    assert set(results["peak_megabytes"]) == {"dense"} and 50 < results["peak_megabytes"]["dense"] < 1000
    assert set(results["parts"]) == {"dense", "kept 1/4"}
    for name in results["seconds"]:
        assert f"| {name} |" in done.stdout
    assert "heads of 64" in done.stdout and "torch" in results["machine"]


def test_a_missing_checkout_ends_the_tool_with_one_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "benchmark.py"), "--shape", "tiny", "--nanogpt", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 20
    assert "no model.py there" in done.stderr and "Traceback" not in done.stderr
