"""A trained model has the scores here that it has in lm-evaluation-harness, on every layout, with every batch size."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaTokenizerFast

from megatron_ltd.lm_eval.results import EvalOptions
from tests.checkpoint.hugging_face import read_in
from tests.gloo import launch_ranks
from tests.lm_eval import harness, stories
from tests.lm_eval.task_ranks import evaluate
from tests.lm_eval.tasks.test_choice_agreement import harness_docs, task_file

pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models with protobuf")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
CHOICES = ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa", "copa", "rte", "sciq",
           "blimp")
LIMIT, BOS = 24, 1


@dataclass(frozen=True)
class Case:
    """The imported model, the files of the tasks, and what the harness says."""

    checkpoints: str
    tokenizer: str
    files: dict[str, Path]
    theirs: dict[str, dict[str, float]]


def harness_model(shared_data: Path, folder: Path) -> Any:
    """The harness's own model, whose tokenizer begins every text with a token."""
    model = AutoModelForCausalLM.from_pretrained(stories.folder(shared_data) / "hf")
    (folder / "tokenizer.model").write_bytes(stories.sentencepiece_model(shared_data))
    tokenizer = LlamaTokenizerFast.from_pretrained(folder, add_bos_token=True)
    tokenizer.save_pretrained(folder / "fast")
    huggingface = importlib.import_module("lm_eval.models.huggingface")
    return huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=512)


@pytest.fixture(scope="module")
def case(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("stories")
    model = harness_model(shared_data, folder)
    assert model.tok_encode("one")[0] == BOS
    assert read_in(stories.folder(shared_data) / "hf", folder / "ours") == 0
    passages = shared_data / "tasks" / "lambada" / "lambada_test.jsonl.gz"
    files = {"lambada": passages} | {name: task_file(name, shared_data, folder) for name in CHOICES}
    tasks = [harness.harness_task(name, harness_docs(name, shared_data)[:LIMIT]) for name in CHOICES]
    tasks.append(harness.harness_task("lambada_openai", harness.jsonl(passages)[:LIMIT]))
    found = importlib.import_module("lm_eval.evaluator").simple_evaluate(model=model, tasks=tasks, limit=LIMIT)
    theirs = {name: found["results"][harness.shared_name(name)] for name in CHOICES}
    theirs["lambada"] = found["results"]["lambada_openai"]
    return Case(str(folder / "ours"), str(folder / "fast" / "tokenizer.json"), files, theirs)


@pytest.mark.parametrize(("ranks", "tp", "pp", "rows"), [(1, 1, 1, 1), (1, 1, 1, 16), (2, 2, 1, 16), (2, 1, 2, 16),
                                                         (2, 1, 1, 16)])
def test_scores_are_the_harness_ones(case: Case, ranks: int, tp: int, pp: int, rows: int) -> None:
    told = launch_ranks(evaluate, ranks, case.checkpoints, case.tokenizer, case.files,
                        EvalOptions(limit=LIMIT, bos=BOS), tp, pp, rows, timeout=200.0)
    for results in told:
        for name, result in results.items():
            for metric, found in result.metrics.items():
                wanted = case.theirs[name][f"{'acc' if metric == 'accuracy' else metric},none"]
                error = case.theirs[name][f"{'acc' if metric == 'accuracy' else metric}_stderr,none"]
                assert found.value == pytest.approx(wanted, rel=1e-4 if metric == "perplexity" else 1e-6), name
                if metric != "perplexity":
                    assert found.stderr == pytest.approx(error, abs=1e-6), name
    values = [metric.value for result in told[0].values() for metric in result.metrics.values()]
    assert len(set(values)) > 8, "scores that are all alike would agree whatever is compared"
