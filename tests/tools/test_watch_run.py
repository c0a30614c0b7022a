"""The page of runs that are under way, from their files alone."""

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from tools import watch_run
from tools.watching import progress
from tools.watching.page import page
from tools.watching.progress import read_progress

STEPS = 40


def write_run(folder: Path, seconds: float = 0.5, slow: int | None = None) -> Path:
    """The metrics of a run whose loss falls from 8 to 4."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, STEPS + 1):
        lines.append({"step": step, "lm_loss": 8 - 4 * step / STEPS, "kept_length": 16 if step < 30 else 32,
                      "step_seconds": 10 * seconds if step == slow else seconds, "tokens_per_second": 512 / seconds,
                      "cumulative_saving": 0.25, "learning_rate": 1e-3, "grad_norm": 1.0, "skipped": step == 3})
        if step % 20 == 0:
            lines.append({"step": step, "validation_loss": 5.0 - step / STEPS})
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_facts_are_those_of_the_files(tmp_path: Path) -> None:
    metrics = write_run(tmp_path, slow=38)
    (tmp_path / "iter_0000020").mkdir()
    (tmp_path / "iter_0000040").mkdir()
    facts = dict(read_progress("ltd", metrics, tmp_path, 100).facts())
    assert facts == {"state": "running", "step": "40 of 100", "loss": "4.0000",
                     "validation loss": "4.0000 at step 40", "kept length": "32", "FLOPs saved so far": "25.0%",
                     "tokens a second": "1,024", "seconds a step": "0.5", "skipped updates": "1", "slow steps": "38",
                     "checkpoints": "2, the newest of step 40", "time left": "30 s"}


def test_stragglers_and_what_is_wrong_with_hosts_are_shown(tmp_path: Path) -> None:
    metrics = write_run(tmp_path)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines[-3:]:
        line |= {"stragglers": ["rank 3 on b"], "own_seconds_slowest": 0.4, "host_memory_free": 0.04,
                 "clock_skew_seconds": 2.5}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_progress("ltd", metrics, None, None)
    facts = dict(run.facts())
    assert facts["stragglers"] == "rank 3 on b in 2 of the recent lines"  # the third is of a validation
    assert facts["least memory free"] == "4.0% of a host's" and facts["clocks differ"] == "by 2.5 s"
    drawing = re.findall(r"<h2>seconds a step.*?</svg>", page([run], None), re.S)[0]
    assert drawing.count("<circle") == 2 and drawing.count("<polyline") == 1


def test_restarts_are_told_with_what_ended_the_attempts_before(tmp_path: Path) -> None:
    metrics = write_run(tmp_path)
    lost, asked = ({"code": code, "step": None, "reason": reason} for code, reason in ((40, "lost"), (10, "asked")))
    attempts = [(30, lost), (0, None), (0, lost), (10, None), (20, asked)]  # the first two are of earlier runs
    text = "".join(json.dumps({"time": 0.0, "step": step, "processes": 2, "previous": previous}) + "\n"
                   for step, previous in attempts)
    (tmp_path / "attempts.jsonl").write_text(text + '{"time": 0.0, "st')
    assert dict(read_progress("run", metrics, tmp_path, None).facts())["restarts"] == (
        "3, from step 0: code 40, lost; from step 10: ended without a word; from step 20: code 10, asked")
    assert "restarts" not in dict(read_progress("run", metrics, None, None).facts())


def test_a_run_that_says_nothing_is_told_from_one_that_has_ended(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = write_run(tmp_path)
    record = tmp_path / "exit.json"
    record.write_text(json.dumps({"code": 11, "step": 40, "reason": "stopped as planned"}))
    assert read_progress("run", metrics, tmp_path, None).state == "ended with code 11: stopped as planned"
    os.utime(record, (time.time() - 500, time.time() - 500))  # of an earlier attempt
    assert read_progress("run", metrics, tmp_path, None).state == "running"
    now = time.time()
    os.utime(metrics, (now - 400, now - 400))
    record.unlink()
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: now))
    assert read_progress("run", metrics, tmp_path, None).state == "no new step for 6 min 40 s"


def test_the_page_shows_runs_side_by_side_and_reads_itself_again(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seconds=0.25)
    output = tmp_path / "watch.html"
    code = watch_run.main(["--metrics", f"dense & slow={tmp_path / 'a'}", f"ltd={tmp_path / 'b' / 'metrics.jsonl'}",
                           "--output", str(output), "--once", "--train-iters", "100"])
    text = output.read_text()
    assert code == 0 and "dense &amp; slow" in text and 'http-equiv="refresh"' not in text
    drawings = [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.S)]
    assert len(drawings) == 6
    loss = drawings[0]
    assert len(loss.findall("polyline")) == 2 and len(loss.findall("circle")) == 4
    heights = [float(place.split(",")[1]) for place in loss.findall("polyline")[0].attrib["points"].split()]
    assert len(heights) == STEPS and heights == sorted(heights) and heights[0] < heights[-1]
    assert not re.search(r'(src|href)="', text) and "<script" not in text


def test_a_run_with_its_end_recorded_ends_the_watch(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "exit.json").write_text(json.dumps({"code": 0, "step": 40, "reason": "complete"}))
    assert watch_run.main(["--metrics", str(tmp_path), "--checkpoints", str(tmp_path), "--output",
                           str(tmp_path / "watch.html")]) == 0


@pytest.mark.parametrize(("words", "told"), [
    (["--metrics", "missing.jsonl"], "missing.jsonl cannot be read"),
    (["--metrics", "missing.jsonl", "--interval", "0"], "--interval = 0.0 must be positive"),
    (["--metrics", "missing.jsonl", "--train-iters", "0"], "--train-iters = 0 must be at least 1"),
    (["--metrics", "a.jsonl", "b.jsonl", "--checkpoints", "run"], "1 folders for 2 runs"),
])
def test_what_cannot_be_watched_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch_run.main([*words, "--once"]) in (20, 21)
    assert told in capsys.readouterr().err
