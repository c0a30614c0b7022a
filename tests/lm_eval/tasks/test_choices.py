"""Scores of multiple-choice tasks, worked out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.lm_eval.requests import ScoredRow, ScoreRow
from megatron_ltd.lm_eval.results import EvalOptions, Metric
from megatron_ltd.lm_eval.rows import RowEncoder
from megatron_ltd.lm_eval.tasks.choices import ChoiceTask, Example, choose, judge, mean_of_means, question, requests
from megatron_ltd.lm_eval.tasks.names import CHOICE_TASKS
from megatron_ltd.lm_eval.tasks.records import Record
from tests.lm_eval.fakes import UniformScorer, WordTokenizer


def answer(logprob: float, greedy: bool = False) -> ScoredRow:
    return ScoredRow(np.array([logprob / 2, logprob / 2], dtype=np.float32), np.array([True, greedy]))


def why(choices: tuple[str, ...], gold: set[int], **more: Any) -> Example:
    return Example(tuple(("why", choice) for choice in choices), frozenset(gold), "f:1", **more)


def test_the_most_probable_choice_and_the_most_probable_per_character_may_differ() -> None:
    example = why(("yes", "certainly not"), {0})
    values = judge(example, [answer(-4.0), answer(-6.0)])
    assert (values["acc"], values["acc_norm"]) == (1.0, 0.0)  # -4 > -6, but -4/3 < -6/13
    values = judge(why(("yes", "certainly not"), {1}), [answer(-4.0), answer(-6.0)])
    assert (values["acc"], values["acc_norm"]) == (0.0, 1.0)


def test_the_first_of_equals_is_taken() -> None:
    assert judge(why(("a", "b"), {0}), [answer(-2.0), answer(-2.0)])["acc"] == 1.0
    assert judge(why(("a", "b"), {1}), [answer(-2.0), answer(-2.0)])["acc"] == 0.0


def test_what_the_model_would_say_counts_if_it_is_any_right_choice() -> None:
    example = why(("a", "b", "c"), {0, 2})
    assert judge(example, [answer(-9.0), answer(-1.0, True), answer(-8.0)])["exact_match"] == 0.0
    assert judge(example, [answer(-9.0), answer(-1.0), answer(-8.0, True)])["exact_match"] == 1.0


def test_partial_evaluation_scores_one_continuation_after_each_context() -> None:
    record = Record({}, "f:1")
    pairs = [("The cup because the cup", "is large."), ("The cup because the bag", "is large.")]
    example = question(record, pairs, [1])
    assert requests(example, "P ") == [("P The cup because the cup", " is large."),
                                       ("P The cup because the bag", " is large.")]
    assert example.solved() == "The cup because the bag is large."


def test_a_mean_of_groups_weighs_them_alike() -> None:
    whole = mean_of_means([Metric(0.5, 0.3), Metric(1.0, 0.4)])
    assert (whole.value, whole.stderr) == (0.75, 0.25)
    assert mean_of_means([Metric(0.5, 0.3), Metric(1.0)]).stderr is None


def test_an_empty_context_is_the_token_that_begins_texts() -> None:
    tokenizer = WordTokenizer()
    a, b = tokenizer.encode("a b")
    assert RowEncoder(tokenizer, 9).pair("", "a b", "f:1")[0] == ScoreRow([0, a, b], 1)
    assert RowEncoder(tokenizer, 9, bos=7).pair("", "a b", "f:1")[0] == ScoreRow([7, a, b], 1)
    assert RowEncoder(tokenizer, 9, bos=a).pair("", "a b", "f:1")[0] == ScoreRow([a, b], 1)
    assert RowEncoder(tokenizer, 9, bos=7).pair("a", " b", "f:1")[0] == ScoreRow([7, a, b], 2)


def test_a_long_context_is_cut_on_the_left_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"goal": "one two three four", "sol1": "five", "sol2": "six", "label": 1}) + "\n"
                    + json.dumps({"goal": "one", "sol1": "five", "sol2": "six", "label": 1}) + "\n")
    scorer, tokenizer = UniformScorer(max_length=4), WordTokenizer()
    result = CHOICE_TASKS["piqa"].evaluate(path, scorer, tokenizer, EvalOptions())
    assert (result.n, result.truncated) == (2, 1)
    assert max(len(row.tokens) for row in scorer.rows) == 5
    assert tokenizer.decode(scorer.rows[0].tokens).endswith(" five")
    assert result.metrics["acc"].value == 0.0  # equals: the first, which is wrong twice


def test_metrics_have_the_standard_error_of_the_mean(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"goal": "one", "sol1": "five", "sol2": "six", "label": label}) + "\n"
                            for label in (0, 1, 0, 0)))
    metric = CHOICE_TASKS["piqa"].evaluate(path, UniformScorer(), WordTokenizer(), EvalOptions()).metrics["acc"]
    assert metric.value == 0.75 and metric.stderr == pytest.approx((3 / 16 / 3) ** 0.5)


def examples_file(tmp_path: Path, count: int, name: str = "asked.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"goal": f"{name} {i}", "sol1": "yes", "sol2": "no", "label": i % 2}) + "\n"
                            for i in range(count)))
    return path


def test_solved_examples_come_from_the_training_file_or_else_from_other_questions(tmp_path: Path) -> None:
    path, task = examples_file(tmp_path, 4), CHOICE_TASKS["piqa"]
    examples, prompts, shown = task.questions(path, EvalOptions(num_fewshot=3))
    for example, prompt in zip(examples, prompts, strict=True):
        assert prompt.count("\n\n") == 3 and example.pairs[0][0] not in prompt
        assert prompt.count("Answer: yes") + prompt.count("Answer: no") == 3
    assert "3-shot, drawn from asked.jsonl (SHA-256" in shown
    examples_file(tmp_path, 5, "train.jsonl")
    _, prompts, shown = task.questions(path, EvalOptions(num_fewshot=2))
    assert all("Question: train.jsonl" in prompt and "asked" not in prompt for prompt in prompts)
    assert "2-shot, drawn from train.jsonl" in shown
    with pytest.raises(ConfigError, match="--num-fewshot = 5: .*train.jsonl has 5 examples"):
        task.questions(path, EvalOptions(num_fewshot=5))


@pytest.mark.parametrize(("task", "line", "words"), [
    ("piqa", "{", ":2 is not JSON"),
    ("piqa", "[]", ":2: an example must be an object"),
    ("piqa", '{"goal": "a", "sol1": "b", "label": 0}', ":2: there is no 'sol2'"),
    ("piqa", '{"goal": "a", "sol1": "b", "sol2": "", "label": 0}', ":2: a choice is empty"),
    ("piqa", '{"goal": 3, "sol1": "b", "sol2": "c", "label": 0}', ":2: goal = 3 must be a text"),
    ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', ":2: label = 2 must be one of"),
    ("piqa", '{"goal": "\\ud800", "sol1": "b", "sol2": "c", "label": 0}', ":2: goal holds half a surrogate"),
    ("winogrande", '{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}', ":2: the sentence needs"),
    ("arc_easy", '{"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "A"}', "1 choices"),
    ("arc_easy", '{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "C"}',
     "answerKey = 'C' must be one of 'A', 'B'"),
    ("copa", '{"premise": "a.", "question": "why", "choice1": "b", "choice2": "c", "label": 0}', "question = 'why'"),
    ("hellaswag", '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": "d", "label": 0}', "list of texts"),
    ("race", '{"article": "a", "problems": "__import__(0)"}', "problems cannot be read"),
    ("wsc273", '{"text": "a b", "pronoun": "b", "pronoun_loc": 9, "options": ["c", "d"], "label": 0}', "pronoun_loc"),
    ("wsc273", '{"text": "a b c", "pronoun": "b", "pronoun_loc": 2, "options": ["c", " "], "label": 0}',
     "an option is empty"),
    ("wsc273", '{"context_options": ["a", "b"], "continuation": "", "gold": 0}', "a choice is empty"),
    ("hellaswag", '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["\\ud800"], "label": 0}',
     "endings holds half a surrogate"),
])
def test_a_malformed_example_is_named_by_file_and_line(tmp_path: Path, task: str, line: str, words: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(DataError) as refused:
        CHOICE_TASKS[task].evaluate(path, UniformScorer(), WordTokenizer(), EvalOptions())
    assert words in str(refused.value) and str(path) in str(refused.value)


def test_a_continuation_of_no_token_is_refused() -> None:
    with pytest.raises(DataError, match="f:1: '' is 0 tokens after a context of 1"):
        RowEncoder(WordTokenizer(), 2).pair("a", "", "f:1")


def test_of_a_continuation_longer_than_the_model_the_last_tokens_are_scored() -> None:
    tokenizer = WordTokenizer()
    row, cut, apart = RowEncoder(tokenizer, 2).pair("a", " b c d", "f:1")
    b, c, d = tokenizer.encode("a b c d")[1:]
    assert row == ScoreRow([b, c, d], 1) and cut and not apart


def test_a_context_of_white_space_is_an_empty_one() -> None:
    tokenizer = WordTokenizer()
    assert RowEncoder(tokenizer, 9).pair("\n", "b", "f:1").row.tokens == [0, *tokenizer.encode("\nb")]


class Pairs(WordTokenizer):
    """Joins "ab" into one token; otherwise a token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text.replace("ab", "Z")]


def test_where_a_token_spans_the_end_of_the_context_the_two_are_encoded_apart() -> None:
    encoder = RowEncoder(Pairs(), 9)
    assert encoder.pair("xa", "b", "f:1") == (ScoreRow([ord("x"), ord("a"), ord("b")], 2), False, True)
    # Where something is left, the context keeps its own tokens, as in the harness.
    assert encoder.pair("xa", "bc", "f:1") == (ScoreRow([ord("x"), ord("a"), ord("c")], 2), False, False)


OVERLONG = '{"context_options": ["a", "c"], "continuation": " b b b b b b", "gold": 0}\n'
SHORT = '{"context_options": ["a", "c"], "continuation": " b", "gold": 1}\n'


@pytest.mark.parametrize(("overlong", "n", "truncated", "notes"), [
    ("truncate", 3, 1, ()), ("skip", 2, 0, ("1 examples longer than the model's positions, left out",))])
def test_an_example_longer_than_the_model_is_scored_or_left_out_and_counted(
    tmp_path: Path, overlong: str, n: int, truncated: int, notes: tuple[str, ...],
) -> None:
    path = tmp_path / "wsc.jsonl"
    path.write_text(SHORT + OVERLONG + SHORT)
    result = CHOICE_TASKS["wsc273"].evaluate(path, UniformScorer(max_length=4), WordTokenizer(),
                                             EvalOptions(overlong=overlong))
    assert (result.n, result.truncated, result.notes) == (n, truncated, notes)


def test_an_example_longer_than_the_model_can_be_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "wsc.jsonl"
    path.write_text(SHORT + OVERLONG)
    with pytest.raises(DataError, match=r"wsc\.jsonl:2 takes 8 tokens, and the model has 4"):
        CHOICE_TASKS["wsc273"].evaluate(path, UniformScorer(max_length=4), WordTokenizer(),
                                        EvalOptions(overlong="error"))


def test_labels_of_piqa_must_match_its_examples(tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    path.write_text('{"goal": "a", "sol1": "b", "sol2": "c"}\n' * 3)
    task = CHOICE_TASKS["piqa"]
    with pytest.raises(DataError, match="there is no .*valid-labels.lst"):
        task.questions(path, EvalOptions())
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(DataError, match="has 2 labels for the 3 examples"):
        task.questions(path, EvalOptions())
    (tmp_path / "valid-labels.lst").write_text("0\n1\n1\n")
    assert [min(example.gold) for example in task.questions(path, EvalOptions())[0]] == [0, 1, 1]
    assert len(task.questions(path, EvalOptions(limit=2))[0]) == 2


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    for name, data, words in [("a.parquet", b"PAR1", "has the suffix '.parquet'"),
                              ("a.zip", b"PK", "not a readable zip archive"),
                              ("a.json", b"[{", "is not JSON"), ("a.jsonl", b"\n", "has no examples"),
                              ("a.tsv", b"x\ty\n1\n", "has 1 columns")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=words):
            CHOICE_TASKS["blimp"].questions(tmp_path / name, EvalOptions())


def test_groups_of_an_archive_are_reported_and_averaged(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "tasks" / "blimp" / "blimp.zip"
    result = CHOICE_TASKS["blimp"].evaluate(path, UniformScorer(), WordTokenizer(), EvalOptions(limit=2))
    assert result.n == 2 * 67 and len(result.metrics) == 68
    parts = [metric.value for name, metric in result.metrics.items() if name != "acc"]
    assert result.metrics["acc"].value == pytest.approx(sum(parts) / 67)


def test_a_choice_task_is_plain_data() -> None:
    task = ChoiceTask(("x.jsonl",), lambda record: choose(record, record.text("q"), ["a", "b"], 0))
    assert task.metrics == ("acc", "acc_norm") and task.fewshot
