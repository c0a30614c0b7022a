"""Generated answers count as lm-evaluation-harness counts them, and do not depend on the layout."""

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.eval.requests import Finished
from megatron_ltd.eval.results import EvalOptions
from megatron_ltd.eval.scorer import ModelScorer, build_scorer
from megatron_ltd.eval.tasks.names import CHOICE_TASKS
from megatron_ltd.eval.tasks.open_questions import spoken
from megatron_ltd.eval.tasks.questions import without_punctuation
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.checkpoint.hugging_face import read_in, saved
from tests.eval import harness
from tests.eval.answering_ranks import answer
from tests.eval.fakes import UniformScorer, WordTokenizer
from tests.eval.gpt2_scorer import gpt2_tokenizer, tiny_gpt2
from tests.eval.lm_eval.test_lm_eval_agreement import harness_model
from tests.gloo import launch_ranks
from tests.train.runs import launched

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
TASK = CHOICE_TASKS["triviaqa"]


class Parrot(UniformScorer):
    """Says the same words to everything, one at a time, as long as it is not stopped."""

    def __init__(self, tokenizer: WordTokenizer, says: str):
        super().__init__()
        self.tokens = tokenizer.encode(says)

    def generate(self, texts: list[list[int]], new_tokens: int, eod: int, finished: Finished) -> list[list[int]]:
        self.texts, said = texts, []
        for token in self.tokens[:new_tokens]:
            said.append(token)
            if finished(said):
                break
        return [said] * len(texts)


def questions(path: Path, aliases: list[list[str]]) -> Path:
    path.write_text("".join(json.dumps({"question": f"who is {i}", "answer": {"aliases": names}}) + "\n"
                            for i, names in enumerate(aliases)))
    return path


def test_an_answer_is_right_if_it_equals_one_but_for_case_and_punctuation(tmp_path: Path) -> None:
    path = questions(tmp_path / "t.jsonl", [["Bob", "sunset boulevard!"], ["Sunset"], ["Sunset-Boulevard."]])
    tokenizer = WordTokenizer()
    scorer = Parrot(tokenizer, " Sunset Boulevard, of course. never said")
    result = TASK.evaluate(path, scorer, tokenizer, EvalOptions())
    assert result.metrics["exact_match"].value == pytest.approx(1 / 3)  # the hyphen joins two words
    assert result.counts["generated_tokens"] == 3 * 2
    assert tokenizer.decode(scorer.texts[0]) == "Question: who is 0?\nAnswer:"


def test_an_answer_ends_with_its_line_sentence_or_clause() -> None:
    assert spoken(" a b. c") == spoken("a b, c.") == spoken(" a b\nc") == spoken("a b ") == "a b"
    assert without_punctuation("St. John's") == "st johns"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    assert read_in(saved(tiny_gpt2(positions=96), tmp_path / "source"), tmp_path / "ours") == 0
    return tmp_path / "ours"


@pytest.fixture
def scorer(checkpoints: Path) -> Iterator[ModelScorer]:
    with launched(Launch()):
        yield build_scorer(str(checkpoints), step=None, tensor_parallel=1, pipeline_parallel=1, micro_batch_size=3)
    launch.stop()


@needs_lm_eval
def test_answers_are_the_harness_ones(scorer: ModelScorer, shared_data: Path, tmp_path: Path) -> None:
    docs = harness.jsonl(shared_data / "tasks/triviaqa/wikipedia-nocontext-dev.jsonl.gz")[:6]
    model, tokenizer = tiny_gpt2(positions=96), gpt2_tokenizer(shared_data)
    prompts = [tokenizer.encode(f"Question: {doc['question']}?\nAnswer:") for doc in docs]
    said = scorer.generate(prompts, 48, tokenizer.eod, lambda tokens: False)
    docs = [doc | {"answer": {"aliases": ["x", spoken(tokenizer.decode(tokens)).upper()] if i % 2 else ["x"]}}
            for i, (doc, tokens) in enumerate(zip(docs, said, strict=True))]
    task = harness.harness_task("triviaqa", docs)
    task.config.generation_kwargs["max_gen_toks"] = 48
    theirs: Any = importlib.import_module("lm_eval.evaluator").simple_evaluate(
        model=harness_model(model, shared_data), tasks=[task], bootstrap_iters=0)
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    ours = TASK.evaluate(path, scorer, tokenizer, EvalOptions())
    wanted = theirs["results"]["triviaqa"]["exact_match,remove_whitespace"]
    assert wanted == 0.5
    assert ours.metrics["exact_match"].value == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("ranks", "tp", "pp"), [(2, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_answers_do_not_depend_on_the_layout(checkpoints: Path, ranks: int, tp: int, pp: int) -> None:
    texts = [[i + 3, 7, i * 5 + 1][:1 + i % 3] for i in range(8)]
    [alone] = launch_ranks(answer, 1, str(checkpoints), texts, 1, 1, 8)
    assert len({tuple(tokens) for tokens in alone}) > 3
    assert launch_ranks(answer, ranks, str(checkpoints), texts, tp, pp, 3) == [alone] * ranks
