"""lm-evaluation-harness's own model tests, as its repository has them, asked of this project's model.

    python -m tests.extra.harness_own_tests --harness CLONE --data DIR --work /tmp/own_tests --output own_tests.md

CLONE is a clone of the harness's repository. Its tests load models and data sets from the hub. Exchanged for these are
the model (a small GPT-2 with random weights), the tokenizers, the data sets, and the recorded numbers, in whose place
stand those of the harness's own Hugging Face model on the same weights. Needs lm-eval, pytest and transformers.
"""

import argparse
import contextlib
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2TokenizerFast

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.tokenizer import build_tokenizer
from megatron_ltd.lm_eval.bos import choose_bos
from megatron_ltd.lm_eval.requests import ScoredRow, ScoreRow
from megatron_ltd.lm_eval.table import table
from tests.extra.harness_table import convert, gpt2_shaped, wikitext
from tests.lm_eval import harness
from tests.lm_eval.gpt2_scorer import Gpt2Scorer, tiny_gpt2

FILES = ("models/test_bos_handling.py", "models/test_huggingface.py", "models/test_max_length.py", "test_evaluator.py",
         "test_cache.py")
NOT_ASKED = {
    "TestHasBosPrefix": "a function of the harness", "TestAddSpecialKwargs": "a function of the harness",
    "vllm": "another model of the harness", "seq2seq": "no such model here",
    "toc_encode": "names Pythia's tokens", "toc_decode": "names Pythia's tokens",
    "batch_encode": "names Pythia's tokens", "model_generate": "names Pythia's tokens",
    "enable_thinking": "a setting of the harness's model",
    "MaxLength": "reads config.json; here the length stands in the checkpoint",
    "printed_results": "numbers recorded with Pythia's weights",
}
"""Part of a test's name -> why it cannot be asked of this model."""
TOKENIZERS = {"EleutherAI/pythia-14m": False, "allenai/OLMo-3-7B-Instruct": True}
"""Whether the tokenizer adds a beginning-of-text token."""
BOS = "<|endoftext|>"


def write_tokenizer(data: Path, folder: Path, adds_bos: bool) -> Path:
    from tokenizers.processors import TemplateProcessing

    source = data / "tokenizers" / "gpt2"
    made = GPT2TokenizerFast(str(source / "vocab.json"), str(source / "merges.txt"))
    if adds_bos:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, made.bos_token_id)])
    made.save_pretrained(folder)
    return folder


def seen_model(folder: Path) -> Any:
    """A model of ours that shows the harness's tests what it would score, by the names they look for."""
    kind = importlib.import_module("megatron_ltd.lm_eval.harness.model").HarnessModel

    class Seen(kind):  # type: ignore[misc, valid-type]
        prefix_token_id: int

        def tok_encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
            encoder = replace(self.encoder, bos=None) if add_special_tokens is False else self.encoder
            return list(encoder.prompt(text))

        def tok_batch_encode(self, texts: list[str]) -> tuple[torch.Tensor, None]:
            return torch.tensor([self.tok_encode(text) for text in texts]), None

        def _loglikelihood_tokens(self, rows: list[Any], disable_tqdm: bool = False) -> list[Any]:
            raise NotImplementedError  # the tests put their own in its place

        def _score(self, rows: list[ScoreRow]) -> list[ScoredRow]:
            self._loglikelihood_tokens(
                [(None, row.tokens[:row.first_scored], row.tokens[row.first_scored:]) for row in rows])
            return [ScoredRow(np.zeros(1, np.float32), np.zeros(1, bool)) for _ in rows]

    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer.json")), None)
    bos, _ = choose_bos(tokenizer, None, False, trained_here=False)
    return Seen(Gpt2Scorer(tiny_gpt2()), tokenizer, bos=bos)


def data_sets(data: Path) -> Callable[..., Any]:
    """What stands in for `datasets.load_dataset`: the first examples of public files, or invented ones."""
    kind = importlib.import_module("datasets").Dataset
    sums = [{"question": f"What is {i} plus {i + 1}?", "answer": f"It is {2 * i + 1}.\n#### {2 * i + 1}"}
            for i in range(20)]
    letters = [{"question": f"Which is {i}?", "choices": list("wxyz"), "answer": i % 4} for i in range(20)]
    docs = {"allenai/ai2_arc": harness.DOCS["arc_easy"](data / "tasks")[:12], "openai/gsm8k": sums,
            "cais/mmlu": letters, "EleutherAI/wikitext_document_level": wikitext(data / "tasks")[:10]}
    return lambda path, *_, **__: {split: kind.from_list(docs[path])
                                   for split in ("train", "validation", "test", "dev")}


class Exchange:
    """Puts our model where the harness's tests build theirs, and keeps what became of each test."""

    def __init__(self, data: Path, work: Path):
        self.work = work
        self.folders = {name: write_tokenizer(data, work / f"tokenizer_{adds}", adds)
                        for name, adds in TOKENIZERS.items()}
        self.hf = importlib.import_module("lm_eval.models.huggingface").HFLM
        self.outcomes: dict[str, list[str]] = {}

    def model(self, **_: Any) -> Any:
        plugin = importlib.import_module("megatron_ltd.lm_eval.harness.plugin")
        return plugin.MegatronLtd(str(self.work / "ours"))

    def seen(self, tokenizer: Any, add_bos_token: bool | None, backend: str = "causal") -> Any:
        return seen_model(Path(tokenizer.name_or_path))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Exchange models and recorded numbers; leave out what cannot be asked."""
        kept = []
        for item in items:
            reason = next((reason for part, reason in NOT_ASKED.items() if part in item.nodeid), None)
            if reason is not None:
                self.outcomes.setdefault(_name(item.nodeid), []).append(f"not asked: {reason}")
                continue
            kept.append(item)
            module = item.module  # type: ignore[attr-defined]
            if hasattr(module, "create_hf_mock"):
                module.create_hf_mock = self.seen
            if hasattr(module, "test_evaluator"):
                item.callspec.params.update(  # type: ignore[attr-defined]
                    model="megatron-ltd", model_args=f"load={self.work / 'ours'}")
        classes = {item.cls for item in kept if hasattr(item.cls, "MULTIPLE_CH_RES")}  # type: ignore[attr-defined]
        for one in classes:
            theirs = self.hf(pretrained=str(self.work / "exported"), dtype="float32", device="cpu", batch_size=1)
            one.MULTIPLE_CH_RES = [logprob for logprob, _ in theirs.loglikelihood(one.MULTIPLE_CH)]
            one.generate_until_RES = theirs.generate_until(one.generate_until)
            one.ROLLING_RES = theirs.loglikelihood_rolling(one.ROLLING)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.outcomes.setdefault(_name(report.nodeid), []).append(report.outcome)


def _name(nodeid: str) -> str:
    """file: test, without parameters"""
    file, *parts = nodeid.partition("[")[0].split("::")
    return f"{Path(file).stem}: {parts[-1]}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("harness", "data", "work", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args(argv)
    args.harness, args.data, args.work, args.output = (
        path.resolve() for path in (args.harness, args.data, args.work, args.output))
    copies = args.work / "tests"  # apart from the clone, whose package `tests` has the name of ours
    copies.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        text = subprocess.run(["git", "-C", str(args.harness), "show", f"HEAD:tests/{file}"], check=True,
                              capture_output=True).stdout
        (copies / Path(file).name).write_bytes(text)
    if not (args.work / "ours").is_dir():
        gpt2_shaped(args.data, args.work / "source")
        convert("--from-hf", str(args.work / "source"), "--save", str(args.work / "ours"))
        convert("--load", str(args.work / "ours"), "--to-hf", str(args.work / "exported"))
    importlib.import_module("megatron_ltd.lm_eval.harness.plugin")
    exchange = Exchange(args.data, args.work)
    read = AutoTokenizer.from_pretrained
    with (mock.patch("lm_eval.models.huggingface.HFLM", side_effect=exchange.model),
          mock.patch.object(AutoTokenizer, "from_pretrained", lambda name, *a, **k: read(
              exchange.folders.get(name, name), *a, **k)),
          mock.patch("datasets.load_dataset", data_sets(args.data)),
          contextlib.chdir(copies)):  # one of them writes a log where it is
        code = pytest.main([str(copies), "-q", "-p", "no:cacheprovider", "--rootdir", str(copies), "-c", "/dev/null"],
                           plugins=[exchange])
    rows = [("the harness's test", "outcome"), *((name, ", ".join(
        f"{found.count(one)} {one}" if one in ("passed", "failed") else one for one in dict.fromkeys(found)))
        for name, found in sorted(exchange.outcomes.items()))]
    args.output.write_text(table(rows, "<<") + "\n")
    print(args.output.read_text())
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
