"""Multiple-choice tasks ask what lm-evaluation-harness asks, and score its answers alike.

The recorded digests are of the requests of lm-eval 0.4.13; where it is installed it is run as well, on the same model.
"""

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ltd.lm_eval.results import EvalOptions
from megatron_ltd.lm_eval.rows import RowEncoder
from megatron_ltd.lm_eval.tasks.choices import requests
from megatron_ltd.lm_eval.tasks.names import CHOICE_TASKS
from tests.lm_eval import harness
from tests.lm_eval.against_harness.test_lm_eval_agreement import harness_model
from tests.lm_eval.gpt2_scorer import Gpt2Scorer, gpt2_tokenizer, tiny_gpt2

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
TASKS = [*harness.SHARED_FILES, *harness.INVENTED]
SCORED, ASKED = 12, 200
RECORDED = {
    "hellaswag": "2a11febf6c2d0baa",
    "piqa": "0af75150b7e87533",
    "sciq": "bcd125ef3f982c2e",
    "arc_easy": "e996dff8302e8384",
    "arc_challenge": "3355850dee112e95",
    "winogrande": "d7a41ac501f1dce3",
    "openbookqa": "e807fa584f486945",
    "boolq": "1a528d8778e77c57",
    "rte": "44d4e4de84a84e9e",
    "copa": "854caff24626c025",
    "blimp": "42752c202a80677a",
    "wsc273": "2286e5eeb4278ee1",
    "race": "1b16350e07ff2bfa",
    "multirc": "b1e81ba62d25b7a2",
    "anli_r1": "7f395efb7d698bb7",
    "webqs": "5a9ca1e7dd8b7049",
}
"""Task -> the first digits of the digest of the harness's requests for its first examples."""


def task_file(task: str, shared_data: Path, folder: Path) -> Path:
    """Our file of a task: as it was published, or in the harness's layout."""
    if task == "blimp":
        path = folder / f"{harness.BLIMP_PARADIGM}.jsonl"
        path.write_text("".join(json.dumps(doc) + "\n" for doc in harness.blimp(shared_data / "tasks")))
        return path
    if task in harness.SHARED_FILES:
        return shared_data / "tasks" / harness.SHARED_FILES[task]
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in harness.INVENTED[task]))
    return path


def harness_docs(task: str, shared_data: Path) -> list[harness.Doc]:
    return harness.INVENTED[task] if task in harness.INVENTED else harness.DOCS[task](shared_data / "tasks")


def digest(pairs: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()[:16]


def our_requests(path: Path, task: str, options: EvalOptions) -> list[tuple[str, str]]:
    examples, prompts, _ = CHOICE_TASKS[task].questions(path, options)
    return [pair for example, prompt in zip(examples, prompts, strict=True) for pair in requests(example, prompt)]


def harness_requests(task: Any, count: int, fewshot: int = 0) -> list[tuple[str, str]]:
    task.set_config(key="num_fewshot", value=fewshot)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=count, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("task", TASKS)
def test_requests_are_those_recorded_from_the_harness(task: str, shared_data: Path, tmp_path: Path) -> None:
    path = task_file(task, shared_data, tmp_path)
    assert digest(our_requests(path, task, EvalOptions(limit=ASKED))) == RECORDED[task]


@needs_lm_eval
@pytest.mark.parametrize("task", TASKS)
def test_requests_are_the_harness_ones(task: str, shared_data: Path, tmp_path: Path) -> None:
    docs = harness_docs(task, shared_data)[:ASKED]
    theirs = harness_requests(harness.harness_task(task, docs), ASKED)
    assert our_requests(task_file(task, shared_data, tmp_path), task, EvalOptions(limit=ASKED)) == theirs
    assert digest(theirs) == RECORDED[task]


@needs_lm_eval
@pytest.mark.parametrize("task", ["rte", "copa", "winogrande", "hellaswag", "anli_r1", "arc_easy"])
def test_solved_examples_are_drawn_as_the_harness_draws_them(task: str, shared_data: Path, tmp_path: Path) -> None:
    docs = harness_docs(task, shared_data)
    docs = docs if len(docs) >= 60 else [dict(docs[i % len(docs)], number=i) for i in range(60)]
    asked, training = docs[:20], docs[20:60]
    ours = CHOICE_TASKS[task]
    lines = [json.dumps(doc) for doc in docs]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / ours.training[-1]).write_text("\n".join(lines[20:60]))
    theirs = harness_requests(harness.harness_task(task, asked, training), 20, fewshot=3)
    assert our_requests(tmp_path / "asked.jsonl", task, EvalOptions(num_fewshot=3)) == theirs


@needs_lm_eval
@pytest.mark.parametrize("task", TASKS)
def test_metrics_and_choices_are_the_harness_ones(task: str, shared_data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_gpt2(positions=256)
    theirs = importlib.import_module("lm_eval.evaluator").simple_evaluate(
        model=harness_model(model, shared_data), limit=SCORED, bootstrap_iters=0, log_samples=True,
        tasks=[harness.harness_task(task, harness_docs(task, shared_data)[:SCORED])])
    scorer = Gpt2Scorer(model)
    ours = CHOICE_TASKS[task].evaluate(task_file(task, shared_data, tmp_path), scorer, gpt2_tokenizer(shared_data),
                                       EvalOptions(limit=SCORED))
    numbers = theirs["results"][harness.shared_name(task)]
    names = CHOICE_TASKS[task].metrics
    assert {name.split(",")[0] for name in numbers if name.endswith(",none")} >= set(names)
    for name in names:
        assert ours.metrics[name].value == pytest.approx(numbers[f"{name},none"], abs=1e-6), name
    samples = theirs["samples"][harness.shared_name(task)]
    examples, prompts, _ = CHOICE_TASKS[task].questions(task_file(task, shared_data, tmp_path),
                                                        EvalOptions(limit=SCORED))
    encoder_rows = score_again(task, examples, prompts, shared_data, model)
    for sample, answers in zip(samples, encoder_rows, strict=True):
        wanted = [(float(logprob), bool(greedy)) for logprob, greedy in (pair[0] for pair in sample["resps"])]
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in wanted]
        torch.testing.assert_close(torch.tensor([value for value, _ in answers]),
                                   torch.tensor([value for value, _ in wanted]), rtol=1e-5, atol=1e-4)
        assert best(answers) == best(wanted)


def best(answers: list[tuple[float, bool]]) -> int:
    return max(range(len(answers)), key=lambda i: (answers[i][0], -i))


def score_again(task: str, examples: list[Any], prompts: list[str], shared_data: Path,
                model: Any) -> list[list[tuple[float, bool]]]:
    """Our log-probability and greediness of every choice of every example."""
    scorer = Gpt2Scorer(model)
    encoder = RowEncoder(gpt2_tokenizer(shared_data), scorer.max_length)
    found = []
    for example, prompt in zip(examples, prompts, strict=True):
        rows = [encoder.pair(context, continuation, example.place)[0]
                for context, continuation in requests(example, prompt)]
        found.append([(answer.logprob, bool(answer.greedy.all())) for answer in scorer.score(rows)])
    return found
