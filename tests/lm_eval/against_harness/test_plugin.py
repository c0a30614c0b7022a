"""What lm-evaluation-harness's own model tests ask of a model, asked of ours beside its Hugging Face model; and its
command line with ours."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import AutoTokenizer, GPT2TokenizerFast

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.tokenizer import build_tokenizer
from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.bos import choose_bos
from megatron_ltd.lm_eval.harness.partial import allow_missing_splits
from tests.checkpoint.hugging_face import read_in, saved
from tests.lm_eval.against_harness.test_lm_eval_agreement import requests
from tests.lm_eval.gpt2_scorer import Gpt2Scorer, tiny_gpt2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

ROOT = Path(__file__).resolve().parents[3]
BOS = "<|endoftext|>"
LONG = " ".join(f"word {i}" for i in range(60))
PAIRS = {
    "a plain pair": ("The cat sat on", " the mat"),
    "an empty context": ("", "Whole sentence."),
    "an empty context before a continuation that begins with the token": ("", BOS + "Whole sentence."),
    "a context that begins with the token already": (BOS + "The cat sat on", " the mat"),
    "spaces at the end of a context": ("The cat sat on  ", "the mat"),
    "a space in place of a context": (" ", "Whole sentence."),
    "a line end in place of a context": ("\n", "Whole sentence."),
    "a space and a line end in place of a context": (" \n", "Whole sentence."),
    "a token that spans the end of the context": ("The cat s", "at on"),
    "a context longer than the model": (LONG, " end"),
    "a context and a continuation longer than the model": (LONG, " end of " + LONG[:100]),
}
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] | trim }}\n"
            "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}")


@pytest.fixture(scope="module", params=[True, False], ids=["adds bos", "adds none"])
def both(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness's model and ours, with a tokenizer that adds a beginning-of-text token of its own, or none."""
    from tokenizers.processors import TemplateProcessing

    folder, source = tmp_path_factory.mktemp("tokenizer"), shared_data / "tokenizers" / "gpt2"
    made = GPT2TokenizerFast(str(source / "vocab.json"), str(source / "merges.txt"))
    if request.param:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, made.bos_token_id)])
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    model = tiny_gpt2()
    theirs = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1, device="cpu")
    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer.json")), None)
    bos, _ = choose_bos(tokenizer, None, False, trained_here=False)
    assert (bos is not None) == request.param
    ours = importlib.import_module("megatron_ltd.lm_eval.harness.model").HarnessModel(
        Gpt2Scorer(model), tokenizer, bos=bos)
    return theirs, ours


@pytest.mark.parametrize("case", PAIRS)
def test_a_pair_has_the_log_probability_of_the_harness_own_model(both: Any, case: str) -> None:
    theirs, ours = both
    asked = requests("loglikelihood", [PAIRS[case]])
    if case.endswith("place of a context") and ours.encoder.bos is None:
        with pytest.raises(AssertionError):  # the harness's model has no token to begin with; ours takes the end token
            theirs.loglikelihood(asked)
        asked[0].arguments = ("", "".join(PAIRS[case]))
    [(expected, expected_greedy)] = theirs.loglikelihood(asked)
    [(logprob, greedy)] = ours.loglikelihood(requests("loglikelihood", [PAIRS[case]]))
    assert logprob == pytest.approx(expected, rel=1e-5) and greedy == expected_greedy


@pytest.mark.parametrize("text", ["A short text.", LONG, BOS + "A short text."])
def test_a_text_has_the_log_probability_of_the_harness_own_model(both: Any, text: str) -> None:
    theirs, ours = both
    asked = requests("loglikelihood_rolling", [(text,)])
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), rel=1e-5)


def test_a_conversation_becomes_the_text_that_transformers_makes_of_it(both: Any) -> None:
    theirs, ours = both
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why? "}]
    assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE
    assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk)
    begun = [*talk, {"role": "assistant", "content": "Because"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, add_generation_prompt=False)


def test_a_model_without_a_chat_template_says_where_it_was_looked_for(both: Any, tmp_path: Path) -> None:
    _, ours = both
    alone = importlib.import_module("megatron_ltd.lm_eval.harness.model").HarnessModel(ours.scorer, ours.tokens)
    with (mock.patch.object(alone.tokens, "files", (str(tmp_path / "tokenizer.json"),)),
          pytest.raises(DataError, match=r"looked for .*chat_template\.jinja")):
        alone.chat_template(True)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: {kind}
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
"""
CHOICES = 'doc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n'
ANSWER = ('doc_to_target: sol1\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 6}\n'
          'metric_list: [{metric: exact_match}]\n')


def test_the_harness_command_scores_a_sharded_checkpoint_as_its_own_model_does(
    shared_data: Path, tmp_path: Path
) -> None:
    source = saved(tiny_gpt2(positions=256), tmp_path / "source")
    for name in ("vocab.json", "merges.txt"):
        (source / name).write_bytes((shared_data / "tokenizers" / "gpt2" / name).read_bytes())
    assert read_in(source, tmp_path / "ours") == 0
    docs = [{"goal": f"Say {i}.", "sol1": f"It is {i}.", "sol2": f"No, {i + 1}!", "label": i % 2} for i in range(9)]
    file, tasks = tmp_path / "docs.jsonl", tmp_path / "tasks"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    tasks.mkdir()
    for name, kind, rest in (("which", "multiple_choice", CHOICES), ("what", "generate_until", ANSWER)):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, file=file, kind=kind) + rest)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "megatron_ltd.lm_eval", "--model", "megatron-ltd", "--model_args",
               f"load={tmp_path / 'ours'},tensor_model_parallel_size=2", "--tasks", "which,what", "--include_path",
               str(tasks), "--limit", "7", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr

    theirs = importlib.import_module("lm_eval.evaluator").simple_evaluate(
        model="hf", model_args={"pretrained": str(source), "dtype": "float32", "device": "cpu"}, limit=7,
        tasks=["which", "what"],
        task_manager=importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(tasks)))
    for name in ("which", "what"):
        [written] = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in written.read_text().splitlines()]
        assert len(samples) == 7
        for ours, expected in zip(samples, theirs["samples"][name], strict=True):
            for [answer], [reference] in zip(ours["resps"], expected["resps"], strict=True):
                if name == "what":
                    assert answer == reference
                else:
                    assert float(answer[0]) == pytest.approx(reference[0], rel=1e-5)
    [results] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    for key, value in theirs["results"]["which"].items():
        assert found["which"][key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_the_command_needs_only_the_split_that_is_scored(tmp_path: Path) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text('{"goal": "Say.", "label": 0}\n' * 2)
    config = {"task": "here", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(file)}},
              "training_split": "train", "validation_split": "validation", "output_type": "multiple_choice",
              "doc_to_text": "goal", "doc_to_target": "label", "doc_to_choice": ["yes", "no"]}
    kind = importlib.import_module("lm_eval.api.task").ConfigurableTask
    with mock.patch.multiple(kind, download=kind.download, fewshot_context=kind.fewshot_context):
        allow_missing_splits()
        task = kind(config=dict(config))
        assert len(task.eval_docs) == 2
        assert task.fewshot_context(task.eval_docs[0], num_fewshot=0) == "Say."
        with pytest.raises(DataError, match="here: 1 solved examples are asked for, .*its data set has validation"):
            task.fewshot_context(task.eval_docs[0], num_fewshot=1)
        with pytest.raises(DataError, match="here: the split 'test' is scored and is not there; its data set has vali"):
            kind(config=config | {"test_split": "test"})
        absent = {"data_files": {"validation": str(tmp_path / "none.jsonl")}}
        with pytest.raises(DataError, match=r"here: its data set json cannot be loaded: .*none\.jsonl"):
            kind(config=config | {"dataset_kwargs": absent})
