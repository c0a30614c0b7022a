"""What the tool predicts of a run, against counting and drawing."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from examples.experiments.saving_map.points import best_points, read_runs
from examples.experiments.saving_map.report import RUNS, advice_rows
from megatron_ltd.checkpoint.convert.huggingface.importing import import_model
from megatron_ltd.model.arithmetic.flops import plan_flops
from megatron_ltd.model.arithmetic.shapes import parameter_shapes
from megatron_ltd.plan.derived import policies
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.token_drop.sampling import kept_positions
from megatron_ltd.train.state import TrainState
from tests.plans import plan_of
from tests.runnable_settings import RUNNABLE, with_settings
from tools import inspect_token_drop
from tools.commands import run_flags
from tools.drop_course.advice import MAP, Measured, advice, read_map
from tools.drop_course.course import Course
from tools.drop_course.picture import asked_for, shares

ROOT = Path(__file__).resolve().parents[2]

# 2 samples a step, 6 layers of which 4 keep 8 of 32 tokens for 3 steps, 16 for one, and all for 2.
CONFIG = with_settings(num_layers=6, hidden_size=24, seq_length=32, random_ltd_start_length=None, random_ltd_steps=None,
                       random_ltd_length_list="0:8,3:16,4:32", global_batch_size=2, train_iters=6, lr_warmup_iters=0)


def test_totals_by_hand() -> None:
    found = Course.of(CONFIG, 1)
    total = found.before[-1]
    assert (found.steps, total.tokens) == (6, 2 * 6 * 32)
    assert total.layer_token_sum == 2 * (6 * 2 * 32 + 4 * (3 * 8 + 16 + 2 * 32))
    full = plan_flops(CONFIG.model, plan_of(32, 6))
    dropped = sum(steps * plan_flops(CONFIG.model, plan_of(32, 6, kept, range(1, 5)))
                  for steps, kept in ((3, 8), (1, 16), (2, 32)))
    assert (total.flops, total.full_flops) == (2 * dropped, 12 * full)
    assert found.visits() == pytest.approx((3 * 0.25 + 0.5 + 2) / 6)
    assert found.mean(found.passing) == pytest.approx((3 * 0.75**4 + 0.5**4) / 6)


def test_rows_go_from_the_first_step_to_the_last() -> None:
    rows = list(Course.of(CONFIG, 1).rows())
    assert [row.step for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row.plan.kept_tokens for row in rows] == [8, 8, 8, 16, 32, 32]
    assert [row.before.tokens for row in rows] == [64 * step for step in range(6)]
    assert [row.before.layer_tokens(6) for row in rows] == [0, 32, 64, 96, 138, 202]  # 32, 32, 32, 42 2/3, 64 a step
    assert [round(row.saving, 3) for row in rows][-2:] == [0.0, 0.0] and rows[0].saving > rows[3].saving > 0.0


def test_the_share_that_skips_all_layers_is_what_drawing_gives() -> None:
    layers, samples = torch.arange(1, 5), torch.arange(400)
    kept = kept_positions(7, samples, layers, sequence_tokens=32, kept_tokens=8, strata=1)
    seen = torch.zeros(400, 32, dtype=torch.bool)
    for layer in kept:
        seen.scatter_(1, layer, True)
    found = Course.of(with_settings(CONFIG, random_ltd_length_list="0:8"), 1)
    # 12,800 tokens: a standard deviation of 0.4%.
    assert float((~seen).double().mean()) == pytest.approx(found.mean(found.passing), abs=0.015)


def test_the_published_start_128_of_2048_tokens_in_22_of_24_layers() -> None:
    found = Course.of(with_settings(seq_length=2048, random_ltd_start_length=128, random_ltd_steps=None), 1)
    assert found.visits() * 22 == pytest.approx(1.375)
    assert found.mean(found.passing) == pytest.approx(0.242, abs=5e-4)


def test_the_importance_policy_shows_all_layers_the_same_tokens() -> None:
    found = Course.of(with_settings(CONFIG, random_ltd=False, token_drop_policy="importance",
                                    random_ltd_length_list="0:8", random_ltd_layers="2-4"), 1)
    assert found.mean(found.passing) == pytest.approx(0.75)


def test_the_course_of_mixture_of_depths_is_that_of_its_capacity() -> None:
    """Layers 1, 3 and 5 process 8 of 32 tokens; which ones no arithmetic knows."""
    config = with_settings(CONFIG, random_ltd=False, random_ltd_length_list=None, mixture_of_depths_capacity=0.25)
    found = Course.of(config, 1)
    assert found.before[-1].layer_token_sum == 2 * 6 * (3 * 32 + 3 * 8) and found.visits() == 0.25
    assert shares(found, [0, 3, 6])[0].T.tolist() == [[1.0, 0.25] * 3] * 2
    said = inspect_token_drop.report(found)
    assert "routers choose the tokens" in said and "of the tokens skip all" not in said
    assert asked_for(found) == "--mixture-of-depths-capacity = 0.25"


def test_without_dropping_nothing_is_saved_and_that_is_said() -> None:
    found = Course.of(replace(CONFIG, token_drop=type(CONFIG.token_drop)()), 1)
    total = found.before[-1]
    assert total.flops == total.full_flops and total.layer_token_sum == 6 * total.tokens
    assert "no layer drops tokens" in inspect_token_drop.report(found)


DRAWN: dict[str, dict[str, Any]] = {
    "layer drop": {"layer_drop_rate": 0.4},
    "layer dropout": {"layer_dropout_rate": 0.8, "layer_dropout_steps": 30},
    "progressive layer dropping": {"pld_theta": 0.2, "pld_gamma": 0.1},
    "raptr": {"raptr_stages": "0:2,20:4,30:6"},
    "drop backward": {"drop_backward_rate": 0.5},
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_totals_of_drawn_layers_are_those_of_the_draws(name: str) -> None:
    config = with_settings(CONFIG, random_ltd_length_list="0:8,10:32", train_iters=40, **DRAWN[name])
    plans = [policies(config).plan(step) for step in range(40)]
    found = Course.of(config, 1)
    assert found.before[-1].flops == 2 * sum(plan_flops(config.model, plan) for plan in plans)
    assert found.after(17).layer_token_sum == 2 * sum(plan.layer_token_sum for plan in plans[:17])
    forward, backward = shares(found, list(range(41)))
    for step, plan in enumerate(plans):
        assert forward[:, step].tolist() == [layer.processed_tokens / 32 for layer in plan.layers]
        assert backward[:, step].tolist() == [layer.processed_tokens / 32 if layer.backward else 0.0
                                              for layer in plan.layers]
    assert ("forward pass only" in inspect_token_drop.report(found)) == (name == "drop backward")
    assert ("a step skips" in inspect_token_drop.report(found)) == (name != "drop backward")


def test_of_a_long_run_evenly_spaced_steps_stand_for_all() -> None:
    """A standard deviation of the share: (0.24 / 6 / 4096)^(1/2) = 0.3%."""
    config = with_settings(CONFIG, random_ltd=False, random_ltd_length_list=None, train_iters=10**6,
                           layer_drop_rate=0.4)
    found = Course.of(config, 1)
    assert len(found.works) <= 4096 and found.before[-1].tokens == 2 * 32 * 10**6
    assert found.before[-1].layer_token_sum / found.before[-1].tokens / 6 == pytest.approx(0.6, abs=0.015)
    assert f"estimated from {len(found.works)} steps" in inspect_token_drop.report(found)


def test_the_stages_of_a_pipeline_are_shown() -> None:
    config = with_settings(CONFIG, pipeline_model_parallel_size=2, pipeline_split="auto")
    assert "\npipeline: layers " in inspect_token_drop.report(Course.of(config, 1))
    assert "pipeline" not in inspect_token_drop.report(Course.of(CONFIG, 1))


def test_the_corpus_is_not_needed_and_a_usual_vocabulary_is_known() -> None:
    config, _ = parse_run_config(["--tokenizer-type", "GPT2BPETokenizer", "--load", "nowhere"])
    config = run_flags.without_files(config)
    assert config.model.vocab_size == 50257 and config.data.mock_data and config.checkpoint.load is None
    assert run_flags.without_files(RUNNABLE).model.vocab_size == 1000


FLAGS = ["--num-layers", "6", "--hidden-size", "24", "--num-attention-heads", "4", "--seq-length", "64", "--vocab-size",
         "99", "--random-ltd", "--random-ltd-start-length", "16", "--random-ltd-steps", "30", "--train-iters", "40",
         "--lr", "1e-3", "--micro-batch-size", "2"]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "tools" / "inspect_token_drop.py"), *words], capture_output=True,
                          text=True, timeout=300, check=False)


def test_the_tool_prints_a_table_and_draws(tmp_path: Path) -> None:
    done = command(*FLAGS, "--world-size", "4", "--plot", str(tmp_path / "drop.png"))
    assert done.returncode == 0, done.stderr
    assert "| 0 | 16 | 0 | 0 |" in done.stdout and "| 39 | 64 | " in done.stdout
    assert "40 steps, 20480 raw tokens" in done.stdout
    assert "tokens skip all 4 dropped layers (31.6% -> 0.0% over the run)" in done.stdout
    assert (tmp_path / "drop.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_may_be_that_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=8, n_head=2, n_positions=32, vocab_size=40))
    model.save_pretrained(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "ours", TrainState().counters())
    words = "--use-checkpoint-args --random-ltd --random-ltd-start-length 8 --train-iters 40 --micro-batch-size 2"
    assert inspect_token_drop.main(["--load", str(tmp_path / "ours"), *words.split()]) == 0
    said = capsys.readouterr().out
    assert "40 steps, 2560 raw tokens" in said and "2 of 4 layers drop tokens" in said


def test_drawn_layers_are_drawn_and_no_learning_rate_is_needed(tmp_path: Path) -> None:
    flags = [word for word in FLAGS if word not in ("--lr", "1e-3", "--train-iters", "40")]
    done = command(*flags, "--train-iters", "900", "--raptr-stages", "0:3,300:6", "--drop-backward-rate", "0.2",
                   "--plot", str(tmp_path / "drop.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--random-ltd, --raptr-stages = 0:3,300:6, --drop-backward-rate = 0.2\n")
    assert "a step skips 1.00 of 6 layers on average" in done.stdout and "learning rate" not in done.stdout
    assert (tmp_path / "drop.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("words", "fragment"), [
    ([*FLAGS, "--random-ltd-strata", "3"], "--random-ltd-strata = 3"),
    ([*FLAGS, "--plot", "drop.txt"], "--output = drop.txt"),
    ([word for word in FLAGS if word not in ("--vocab-size", "99")], "give --vocab-size"),
    ([*FLAGS, "--tensor-model-parallel-size", "2", "--world-size", "3"], "3 processes"),
    ([word for word in FLAGS if word not in ("--train-iters", "40")] + ["--train-epochs", "2"], "give --train-iters"),
])
def test_what_the_tool_cannot_do_is_refused(words: list[str], fragment: str) -> None:
    done = command(*words)
    assert done.returncode == 20 and fragment in done.stderr and "Traceback" not in done.stderr


def test_advice_names_what_was_measured_on_both_sides_of_the_run() -> None:
    def row(policies: tuple[str, ...], optimizer: str, tokens: float, share: float, seeds: int = 1,
            parts: tuple[str, ...] = ()) -> Measured:
        interval = None if seeds == 1 else (share - 0.01, share + 0.02)
        return Measured(" with ".join((f"arm of {optimizer}", *parts)), policies, optimizer, parts, (10**5, 4), tokens,
                        {"adam": (share, interval, seeds, share > 0.5)})

    measured = [row(("random",), "adam", 10, 0.2, 3), row(("random",), "adam", 2.5, 0.3), row((), "muon", 2.5, 0.4),
                row((), "adam", 2.5, 0.0)]
    parameters = sum(math.prod(shape) for shape in parameter_shapes(CONFIG.model).values())
    lines = list(advice(CONFIG, 4 * parameters, measured))
    assert lines[0].startswith("4 tokens per parameter")
    assert "+30% at 2.5 (one seed), +20% at 10 (95% interval +19% to +22%, 3 seeds)" in lines[1]
    assert "longer" not in lines[1] and "longer" in lines[2] and "+40%" in lines[2]
    assert "shorter" in list(advice(CONFIG, parameters, measured))[1]
    own = (parameters, CONFIG.model.num_layers)
    own_size = [dataclasses.replace(row, size=own, against={"adam": (0.1, None, 1, False)})
                for row in measured if row.tokens_per_parameter < 10]
    assert "+10% at 2.5" in list(advice(CONFIG, 2 * parameters, [*measured, *own_size]))[1]
    deeper = [dataclasses.replace(row, size=(parameters + 1, 3 * own[1])) for row in own_size]
    deeper += [dataclasses.replace(row, size=(parameters + 2, own[1]), against={"adam": (0.2, None, 1, False)})
               for row in own_size]
    (said,) = (line for line in advice(CONFIG, 2 * parameters, [*measured, *deeper]) if line.startswith("arm of adam:"))
    assert "+20% at 2.5" in said and f"in {own[1]} layers" in said
    assert "+30% at 2.5 (one seed), +20% at 10" in list(advice(CONFIG, 4 * parameters, [*measured, *own_size]))[1]
    assert not any("carries over" in line for line in advice(CONFIG, 1e6, measured))
    far = list(advice(CONFIG, 1.1e7, measured))[-1]  # the longest run read 10 tokens for each of 100,000 parameters
    assert "at most 0.1 million parameters and 1 million tokens" in far and "not known" in far
    unknown = with_settings(CONFIG, random_ltd=False, random_ltd_length_list=None, layer_drop_rate=0.2,
                            optimizer="muon")
    assert "no saving at equal loss was measured" in list(advice(unknown, parameters, measured))[1]
    with_pairs = [*measured, row((), "muon", 2.5, 0.6, parts=("table of n-grams",)),
                  row((), "muon", 2.5, 0.7, parts=("convolutions",))]
    of_convolutions, of_pairs = list(advice(CONFIG, 4 * parameters, with_pairs))[3:5]
    assert "+60% at 2.5 (one seed, extrapolated)" in of_pairs and "+70% at 2.5" in of_convolutions
    table = with_settings(CONFIG, ngram_rows=64, random_ltd=False, random_ltd_length_list=None, optimizer="muon")
    of_table = list(advice(table, 4 * parameters, with_pairs))
    assert of_table[0].startswith("4 tokens per parameter") and "no saving" in of_table[1]  # against dense Muon


def test_the_map_is_the_one_that_the_committed_runs_give() -> None:
    written = advice_rows(best_points(read_runs(RUNS)))
    assert json.loads(MAP.read_text()) == json.loads(json.dumps(written))
    assert {("random",), ("tread",), ()} <= {row.policies for row in read_map()}
