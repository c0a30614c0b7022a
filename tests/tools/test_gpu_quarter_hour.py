"""The quarter of an hour on a GPU, rehearsed on a CPU with small models."""

import json
import math
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import bench as bench_module
from benchmarks.gpu import first, plain_gpt, quarter_hour
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.quarter_hour import PLAN, begun, main, run_step
from megatron_ltd.train.process import launch

ROOT = Path(__file__).resolve().parents[2]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("call", ["first", "second"])
def test_every_step_of_a_call_runs(tmp_path: Path, call: str) -> None:
    assert main([call, "--out", str(tmp_path), "--tiny", "--eager"]) == 0
    found = rows(tmp_path)
    ends = {row["step"]: row["problem"] for row in found if row["row"] == "ends"}
    assert ends == dict.fromkeys(PLAN[call]), "no step had a problem"
    for step in ends:
        assert sum(row["step"] == step for row in found) > 2, f"{step} measured something"
    kept = [row for row in found if row["row"] == "350m, kept 1/4" and "realised" in row]
    assert len(kept) == (call == "first")
    for row in kept:
        assert row["realised"] == pytest.approx(row["time_saved"] / row["flops_saved"])
        assert 0 < row["flops_saved"] < 1 and row["of_oracle"] > 0
    assert not call == "second" or {path.name for path in tmp_path.iterdir()} >= {
        "trace_dense.json.gz", "trace_kept_1_of_4.json.gz", "kernels_dense.txt"}


def bench(out: Path) -> Bench:
    runtime: Any = SimpleNamespace(device=torch.device("cpu"))
    return Bench(runtime, out, tiny=True)


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_next(tmp_path: Path) -> None:
    def fails(at: Bench) -> None:
        at.write("before")
        raise ValueError("no such kernel")

    assert run_step(bench(tmp_path), "fails", fails, 60)
    assert run_step(bench(tmp_path), "long", lambda at: time.sleep(60), 0.1)
    assert run_step(bench(tmp_path), "good", lambda at: at.write("found"), 60)
    problems = {row["step"]: row["problem"] for row in rows(tmp_path) if row["row"] == "ends"}
    assert "no such kernel" in problems["fails"] and problems["long"] == "ended after 0.1 s"
    assert problems["good"] is None
    assert [row["row"] for row in rows(tmp_path) if row["row"] in ("before", "found")] == ["before", "found"]


def test_an_error_that_stays_ends_the_process_and_the_next_goes_on_after_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Bench) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(quarter_hour.PLAN, "first", {
        name: (lambda at, name=name: at.write(f"ran {name}"), 60) for name in ("one", "two", "three")})
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "wait", broken)
        patch.setattr(launch, "stop", lambda: broken(bench(tmp_path)))  # as everything that uses the GPU
        assert main(["first", "--out", str(tmp_path), "--tiny"]) == quarter_hour.CANNOT_GO_ON
    launch.stop()
    assert main(["first", "--out", str(tmp_path), "--tiny"]) == 0
    assert [row["row"] for row in rows(tmp_path) if row["row"].startswith("ran")] == ["ran one", "ran two", "ran three"]
    monkeypatch.setitem(quarter_hour.PLAN, "first", {"late": (broken, 60)})
    assert main(["first", "--out", str(tmp_path), "--tiny", "--seconds", "0"]) == 0
    assert rows(tmp_path)[-1] == {"step": "late", "row": "left out", "reason": "no time left"}


def test_a_step_that_ended_its_process_is_one_that_failed(tmp_path: Path) -> None:
    at = bench(tmp_path)
    for at.step in ("good", "crashed"):
        at.write("begins")
        if at.step == "good":
            at.write("ends", problem=None)
    for _ in range(2):
        assert begun(at) == {"good", "crashed"}
    ends = [(row["step"], row["problem"]) for row in rows(tmp_path) if row["row"] == "ends"]
    assert ends == [("good", None), ("crashed", "the process ended in it: it hung, crashed or was killed")]


def test_losses_that_are_not_those_of_the_cpu_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # GPT and Llama: the CPU's, then those of the device in fp32 and bf16.
    losses = iter([[7.0, 6.0], [7.0, 6.001], [7.0, 6.3], [7.0, 6.0], [7.0, math.nan], [7.0, 6.0]])
    monkeypatch.setattr(first, "_losses", lambda *_: next(losses))
    monkeypatch.setattr(first, "_on_cpu", lambda *_: None)
    run_step(bench(tmp_path), "parity", first.parity, 60)
    off = rows(tmp_path)[-1]["problem"].strip().splitlines()[-1]
    assert "gpt in bf16" in off and "llama in fp32" in off and "gpt in fp32" not in off and "llama in bf16" not in off


def test_a_loss_that_is_not_finite_is_a_problem_once_its_row_is_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = bench(tmp_path)
    config = at.config(at.shape("350m"))
    monkeypatch.setattr(bench_module, "OurModel", lambda *_, **__: SimpleNamespace(
        config=config, step=lambda kept: math.nan if kept < config.model.seq_length else 5.0))
    run_step(at, "350m", lambda at: at.train("350m", config, ("dense", "kept 1/4")), 60)
    found = rows(tmp_path)
    assert "350m, kept 1/4" in [row["row"] for row in found] and "losses {'dense': 5.0" in found[-1]["problem"]


def test_without_a_gpu_only_the_rehearsal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["first", "--out", str(tmp_path)]) == 2
    assert "only --tiny" in capsys.readouterr().err
    done = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu_quarter_hour.sh"), "third", str(tmp_path)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_the_plain_gpt_is_the_gpt2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = plain_gpt.GPT(plain_gpt.GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32))
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, activation_function="gelu", resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0))
    for part in ours.parameters():
        torch.nn.init.normal_(part, std=0.1)
    body = theirs.transformer
    pairs = [(body.wte, ours.words), (body.wpe, ours.positions), (body.ln_f, ours.norm)]
    for block, layer in zip(body.h, ours.layers, strict=True):
        pairs += [(block.ln_1, layer.attention_norm), (block.ln_2, layer.mlp_norm), (block.attn.c_attn, layer.qkv),
                  (block.attn.c_proj, layer.proj), (block.mlp.c_fc, layer.fc1), (block.mlp.c_proj, layer.fc2)]
    with torch.no_grad():
        for to, source in pairs:
            transposed = type(to).__name__ == "Conv1D"
            to.weight.copy_(source.weight.t() if transposed else source.weight)
            if getattr(to, "bias", None) is not None:
                to.bias.copy_(source.bias)
    text = torch.randint(50, (3, 17))
    logits, loss = ours(text[:, :-1], text[:, 1:])
    expected = theirs(text[:, :-1]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected.flatten(0, 1), text[:, 1:].flatten()))
