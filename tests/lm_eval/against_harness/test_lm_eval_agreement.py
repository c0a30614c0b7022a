"""The same model and the same files give the numbers that lm-evaluation-harness gives.

The recorded numbers come from lm-eval 0.4.13 (its HFLM on `tiny_gpt2`, its wikitext functions); where lm-eval is
installed the harness itself is run as well, on a model that has learned a little, so that accuracy is not zero.
"""

import hashlib
import importlib
import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from megatron_ltd.lm_eval.results import EvalOptions
from megatron_ltd.lm_eval.tasks import lambada, wikitext
from megatron_ltd.lm_eval.tasks.task_files import read_json_lines, read_text
from tests.lm_eval.gpt2_scorer import Gpt2Scorer, gpt2_tokenizer, tiny_gpt2

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
PASSAGES = 6
RECORDED_LAMBADA = [-13.529816, -12.330597, -12.996128, -14.066774, -11.380436, -25.929926]
RECORDED_WIKITEXT = {"logprob": -61108.578, "words": 4342, "bytes": 23127, "bits_per_byte": 3.8120397}
RECORDED_ARTICLES = {
    "valid": (60, 214006, 1146785, "d5bd98ccac4d0ffcd8ca06d7bd1a94f0871b631d7e3d454578760fca5b575b95"),
    "test": (62, 241335, 1290527, "b0ae50e166add20959a5406d9b3c99fe1f23819ec0a10149047149434fb85d81"),
}


def lambada_file(shared_data: Path) -> Path:
    return shared_data / "tasks" / "lambada" / "lambada_test.jsonl.gz"


def wikitext_file(shared_data: Path, split: str) -> Path:
    return shared_data / "tasks" / "wikitext2" / f"wiki.{split}.raw.gz"


def harness_model(model: GPT2LMHeadModel, shared_data: Path) -> Any:
    huggingface = importlib.import_module("lm_eval.models.huggingface")
    transformers = importlib.import_module("transformers")
    folder = shared_data / "tokenizers" / "gpt2"
    tokenizer = transformers.GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")


def requests(kind: str, arguments: Sequence[tuple[str, ...]]) -> list[Any]:
    instance = importlib.import_module("lm_eval.api.instance").Instance
    return [instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


def learn_endings(model: GPT2LMHeadModel, texts: list[list[int]], steps: int) -> None:
    """Learn the last tokens of these texts by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        tokens = torch.tensor([texts[step % len(texts)][-65:]])
        logits = model(tokens[:, :-1]).logits[0, -3:]
        torch.nn.functional.cross_entropy(logits, tokens[0, -3:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lambada_gives_the_log_probabilities_recorded_from_the_harness(shared_data: Path) -> None:
    result = lambada.evaluate(
        lambada_file(shared_data), Gpt2Scorer(tiny_gpt2()), gpt2_tokenizer(shared_data), EvalOptions(limit=PASSAGES)
    )
    assert math.log(result.metrics["perplexity"].value) == pytest.approx(-sum(RECORDED_LAMBADA) / PASSAGES, rel=1e-5)
    assert result.metrics["accuracy"].value == 0


def test_wikitext_gives_the_numbers_recorded_from_the_harness(shared_data: Path) -> None:
    path = wikitext_file(shared_data, "valid")
    result = wikitext.evaluate(path, Gpt2Scorer(tiny_gpt2()), gpt2_tokenizer(shared_data), EvalOptions(limit=2))
    expected = -RECORDED_WIKITEXT["logprob"] / RECORDED_WIKITEXT["words"]
    assert math.log(result.metrics["word_perplexity"].value) == pytest.approx(expected, rel=1e-6)
    assert result.metrics["bits_per_byte"].value == pytest.approx(RECORDED_WIKITEXT["bits_per_byte"], rel=1e-6)
    assert (result.counts["words"], result.counts["bytes"]) == (4342, 23127)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_all_articles_are_split_counted_and_detokenized_as_recorded_from_the_harness(
    shared_data: Path, split: str
) -> None:
    articles = wikitext.split_articles(read_text(wikitext_file(shared_data, split))[0])
    digest = hashlib.sha256("\0".join(map(wikitext.detokenize, articles)).encode()).hexdigest()
    words = sum(map(wikitext.harness_words, articles))
    assert (len(articles), words, sum(len(a.encode()) for a in articles), digest) == RECORDED_ARTICLES[split]


@needs_lm_eval
def test_lambada_equals_the_harness_run_on_the_same_model(shared_data: Path) -> None:
    tokenizer, model = gpt2_tokenizer(shared_data), tiny_gpt2()
    texts = [record.text("text") for record in read_json_lines(lambada_file(shared_data), PASSAGES)]
    learn_endings(model, [tokenizer.encode(text) for text in texts[:3]], steps=60)
    pairs = [(" ".join(text.split(" ")[:-1]), " " + text.split(" ")[-1]) for text in texts]
    answers = harness_model(model, shared_data).loglikelihood(requests("loglikelihood", pairs))
    metrics = importlib.import_module("lm_eval.api.metrics")
    hits = [float(greedy) for _, greedy in answers]
    assert 0 < sum(hits) < PASSAGES

    ours = lambada.evaluate(lambada_file(shared_data), Gpt2Scorer(model), tokenizer, EvalOptions(limit=PASSAGES))

    assert ours.metrics["accuracy"].value == pytest.approx(metrics.mean(hits))
    assert ours.metrics["accuracy"].stderr == pytest.approx(metrics.mean_stderr(hits))
    expected = metrics.perplexity([logprob for logprob, _ in answers])
    assert math.log(ours.metrics["perplexity"].value) == pytest.approx(math.log(expected), rel=1e-5)
    assert ours.truncated == 5


@needs_lm_eval
def test_wikitext_equals_the_harness_run_on_the_same_model(shared_data: Path) -> None:
    theirs = importlib.import_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    path, articles = wikitext_file(shared_data, "valid"), 2
    pages = wikitext.split_articles(read_text(path)[0])[:articles]
    texts = [(theirs.wikitext_detokenizer({"page": page}),) for page in pages]
    model = tiny_gpt2()
    logprob = sum(harness_model(model, shared_data).loglikelihood_rolling(requests("loglikelihood_rolling", texts)))

    tokenizer = gpt2_tokenizer(shared_data)
    ours = wikitext.evaluate(path, Gpt2Scorer(model), tokenizer, EvalOptions(limit=articles)).metrics

    words = sum(len(re.split(r"\s+", page)) for page in pages)
    size_bytes = sum(len(page.encode()) for page in pages)
    assert ours["word_perplexity"].value == pytest.approx(math.exp(-logprob / words), rel=1e-5)
    assert ours["byte_perplexity"].value == pytest.approx(math.exp(-logprob / size_bytes), rel=1e-6)
    assert ours["bits_per_byte"].value == pytest.approx(-logprob / size_bytes / math.log(2), rel=1e-6)


@needs_lm_eval
@pytest.mark.parametrize("split", ["valid", "test"])
def test_detokenized_articles_equal_the_harness_ones(shared_data: Path, split: str) -> None:
    theirs = importlib.import_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    text, _ = read_text(wikitext_file(shared_data, split))
    for page in [*wikitext.split_articles(text), text]:
        assert wikitext.detokenize(page) == theirs.wikitext_detokenizer({"page": page})
