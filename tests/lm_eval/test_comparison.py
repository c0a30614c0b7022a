"""Differences of two results: the bootstrap against distributions that can be written down, and both kinds of files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ltd.lm_eval.comparison import compare, resampled
from megatron_ltd.lm_eval.results import Samples, mean_and_stderr
from tools import compare_results

OPTIONS: dict[str, Any] = {"confidence": 0.95, "resamples": 4000, "seed": 1}


def test_two_examples_have_the_distribution_of_two_coins() -> None:
    pairs = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 1.0]])
    found, counts = np.unique(resampled("acc", *pairs, 4000, 7), return_counts=True)
    assert found.tolist() == [0.0, 0.5, 1.0]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_of_many_examples_the_interval_is_the_normal_one_of_the_paired_differences() -> None:
    random = np.random.default_rng(3)
    first = random.random(2000)
    second = np.clip(first + random.normal(0.02, 0.1, 2000), 0, 1)
    found = compare("acc", (first.mean(), second.mean()), (first.tolist(), second.tolist()), **OPTIONS)
    paired = mean_and_stderr((second - first).tolist())
    assert found.value == pytest.approx(paired.value) and found.n == 2000 and found.is_clear
    assert paired.stderr is not None
    assert found.interval == pytest.approx((paired.value - 1.96 * paired.stderr, paired.value + 1.96 * paired.stderr),
                                           abs=0.15 * paired.stderr)


@pytest.mark.parametrize(("metric", "value", "samples"), [
    ("perplexity", math.exp(1.5), [-1.0, -2.0]),
    ("word_perplexity", math.exp(3.0 / 8), [[-1.0, 3.0], [-2.0, 5.0]]),
    ("bits_per_byte", 3.0 / 8 / math.log(2), [[-1.0, 3.0], [-2.0, 5.0]]),
    ("exact_match (strict-match)", 0.5, [1.0, 0.0]),
])
def test_a_model_does_not_differ_from_itself(metric: str, value: float, samples: Samples) -> None:
    found = compare(metric, (value, value), (samples, samples), **OPTIONS)
    assert found.interval == (0.0, 0.0) and not found.is_clear and found.n == 2


@pytest.mark.parametrize(("samples", "reason"), [
    (([1.0, 0.0], None), "no values of single examples"),
    (([1.0, 0.0], [1.0, 0.0, 1.0]), "2 examples and 3"),
    (([1.0, 0.0], [1.0, 1.0]), "not a function of sums over examples"),
    (([1.0, 0.0, None], [None, None, 0.5]), "no example that both models were asked"),
])
def test_what_cannot_be_paired_says_why(samples: tuple[Samples, Samples | None], reason: str) -> None:
    found = compare("acc", (0.5, 0.5), samples, **OPTIONS)
    assert found.interval is None and found.why_not == reason


def ours(path: Path, hits: list[float], sha256: str = "a", shots: int = 0, **options: Any) -> Path:
    task = {"metrics": {"acc": {"value": sum(hits) / len(hits), "stderr": 0.1}}, "samples": {"acc": hits},
            "sha256": sha256, "num_fewshot": shots}
    path.write_text(json.dumps({"options": options, "tasks": {"copa": task}}))
    return path


def of_harness(folder: Path, hits: list[float], config: dict[str, Any] | None = None, **record: Any) -> Path:
    folder.mkdir()
    lines = [{"doc_id": i, "doc_hash": f"{i}", "filter": "none", "metrics": ["acc"], "acc": hit}
             for i, hit in enumerate(hits)]
    date = "2026-01-02T03-04-05.678"
    (folder / f"samples_copa_{date}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"results_{date}.json").write_text(json.dumps(
        {"results": {"copa": {"alias": "copa", "acc,none": sum(hits) / len(hits), "acc_stderr,none": 0.1}},
         "config": config or {}, **record}))
    return folder


def test_files_of_both_kinds_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = [0.0] * 30 + [1.0] * 10, [1.0] * 38 + [0.0, 1.0]
    files = {"a.json": ours(tmp_path / "a.json", before), "b.json": ours(tmp_path / "b.json", after),
             "other.json": ours(tmp_path / "other.json", after, sha256="b"), "run": of_harness(tmp_path / "run", after)}
    for second in ("b.json", "run"):
        assert compare_results.main([str(files["a.json"]), str(files[second])]) == 0
        said = capsys.readouterr().out
        assert "+0.7250" in said and "40 | * |" in said and "more than chance: copa" in said
    assert compare_results.main([str(files["a.json"]), str(files["other.json"])]) == 0
    assert "- (other examples)" in capsys.readouterr().out


def test_options_that_two_results_were_not_made_alike_with_are_told_before_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    hits, options = [0.0, 1.0] * 20, {"limit": 40, "bos_token_id": None, "overlong": "truncate"}
    config = {"limit": 40.0, "model_args": "pretrained=a,dtype=float32", "gen_kwargs": None}
    record = {"n-shot": {"copa": 0}, "versions": {"copa": 1.0}, "chat_template_sha": None}
    first = ours(tmp_path / "a.json", hits, **options)
    theirs = of_harness(tmp_path / "b", hits, config, **record)
    cases = [
        (first, ours(tmp_path / "c.json", hits, **options), ""),
        (first, theirs, ""),
        (first, ours(tmp_path / "d.json", hits, "b", 5, **options | {"limit": None, "bos_token_id": 0}),
         "limit 40, not given; solved examples 0, 5; beginning-of-text token not given, 0; other examples"),
        (first, ours(tmp_path / "e.json", hits, **options | {"overlong": "skip"}), "overlong truncate, skip"),
        (first, of_harness(tmp_path / "f", hits, config | {"limit": 50.0, "bos_token_id": 1}, **record),
         "limit 40, 50; beginning-of-text token not given, 1"),
        (theirs, of_harness(tmp_path / "g", hits, config | {"model_args": {"add_bos_token": True}}, **record | {
            "chat_template_sha": "c0ffee", "versions": {"copa": 2.0}, "n-shot": {"copa": 3}}),
         "solved examples 0, 3; task version 1, 2; add_bos_token not given, True; chat template not given, c0ffee"),
    ]
    for one, other, told in cases:
        assert compare_results.main([str(one), str(other)]) == 0
        before, numbers, _ = capsys.readouterr().out.partition("| task")
        assert numbers and before.partition("- copa: ")[2].strip() == told


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read"), ("{", "is not JSON"), ("[]", "is no results file"),
    ('{"tasks": {"copa": {"metrics": 3}}}', "is damaged"), ("[" * 100_000, "is not JSON"),
    ('{"tasks": {"copa": {"metrics": {}, "sha256": "", "samples": [1]}}}', "is damaged"),
    ('{"tasks": {}}', "no task in common"),
])
def test_a_file_that_is_none_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str,
) -> None:
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    assert compare_results.main([str(ours(tmp_path / "a.json", [1.0])), str(tmp_path / "b.json")]) in (20, 21)
    assert message in capsys.readouterr().err
