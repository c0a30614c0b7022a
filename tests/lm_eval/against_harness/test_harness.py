"""As a model of lm-evaluation-harness, a checkpoint answers as the harness's own Hugging Face model does."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.train.process.environment import Launch
from tests.checkpoint.hugging_face import read_in, saved
from tests.gloo import launch_ranks
from tests.lm_eval import harness
from tests.lm_eval.against_harness.test_lm_eval_agreement import harness_model
from tests.lm_eval.against_harness.test_lm_eval_agreement import requests as instances
from tests.lm_eval.gpt2_scorer import tiny_gpt2
from tests.lm_eval.harness_ranks import ask
from tests.train.runs import launched
from tools import evaluate_zeroshot

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

LONG = " ".join(f"word {i}" for i in range(90))
GREEDY = {"until": ["\n", " the"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
REQUESTS: list[tuple[str, list[tuple[Any, ...]]]] = [
    ("loglikelihood", [("The cat sat on", " the mat"), ("", " Whole sentence."),
                       ("A context with a space ", "after it"),
                       (LONG, " end"), ("The cat sat on", " a chair by the window"), ("x", " y")]),
    ("loglikelihood_rolling", [("A short text.",), (LONG,)]),
    ("generate_until", [("The cat sat on", GREEDY), ("Once", GREEDY), (LONG, GREEDY),
                        ("One more", GREEDY | {"max_gen_toks": 5, "until": "."})]),
]


@pytest.mark.parametrize(("ranks", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 1)])
def test_answers_are_those_of_the_harness_own_model_on_every_layout(
    shared_data: Path, tmp_path: Path, ranks: int, tp: int, pp: int,
) -> None:
    theirs = tiny_gpt2(positions=96)
    assert read_in(saved(theirs, tmp_path / "source"), tmp_path / "ours") == 0
    reference = harness_model(theirs, shared_data)
    wanted = [getattr(reference, kind)(instances(kind, arguments)) for kind, arguments in REQUESTS]
    told = launch_ranks(ask, ranks, str(tmp_path / "ours"), shared_data, tp, pp, REQUESTS, timeout=120.0)
    for choices, texts, generated in told:
        for (logprob, greedy), (expected, expected_greedy) in zip(choices, wanted[0], strict=True):
            assert logprob == pytest.approx(expected, rel=1e-5) and greedy == expected_greedy
        assert texts == pytest.approx(wanted[1], rel=1e-5)
        assert generated == wanted[2]


def test_sampled_texts_are_the_same_on_every_layout(shared_data: Path, tmp_path: Path) -> None:
    assert read_in(saved(tiny_gpt2(positions=96), tmp_path / "source"), tmp_path / "ours") == 0
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_k": 5}
    requests = [("generate_until", [(text, drawn) for text in ("One", "Two", "Three", "Four", "Five")])]
    [[alone]] = launch_ranks(ask, 1, str(tmp_path / "ours"), shared_data, 1, 1, requests)
    assert len(set(alone)) == 5
    for ranks, tp in ((2, 2), (2, 1)):
        for [texts] in launch_ranks(ask, ranks, str(tmp_path / "ours"), shared_data, tp, 1, requests):
            assert texts == alone


def test_the_tool_runs_a_task_of_the_harness_on_local_files(shared_data: Path, tmp_path: Path) -> None:
    source = saved(tiny_gpt2(positions=256), tmp_path / "source")
    for name in ("vocab.json", "merges.txt"):
        (source / name).write_bytes((shared_data / "tokenizers" / "gpt2" / name).read_bytes())
    assert read_in(source, tmp_path / "ours") == 0
    folder = tmp_path / "data" / "piqa"
    folder.mkdir(parents=True)
    docs = harness.piqa(shared_data / "tasks")[:30]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    native = ["--load", str(tmp_path / "ours"), "--limit", "9", "--tasks", f"piqa={folder / 'validation.jsonl'}"]
    through = ["--load", str(tmp_path / "ours"), "--limit", "9", "--tasks", "piqa", "--harness", "--task-data",
               str(folder.parent)]
    found = []
    for flags in (native, through):
        output = tmp_path / "results.json"
        with launched(Launch()):
            assert evaluate_zeroshot.main([*flags, "--log-samples", "--output", str(output)]) == 0
        found.append(json.loads(output.read_text())["tasks"]["piqa"])
    for name in ("acc", "acc_norm"):
        assert found[1]["metrics"][name] == pytest.approx(found[0]["metrics"][name])
        assert found[1]["samples"][name] == found[0]["samples"][name]
    assert found[1]["n"] == 9 and found[1]["file"] == str(folder) and "lm-evaluation-harness 0." in found[1]["protocol"]
