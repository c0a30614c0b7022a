"""A model with real weights: imported, it gives the numbers that were recorded for it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ltd.data.text.sentence_piece import SentencePieceTokenizer
from megatron_ltd.lm_eval.requests import ScoreRow
from megatron_ltd.lm_eval.scorer import ModelScorer, build_scorer
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.lm_eval import stories
from tests.train.runs import launched
from tools import convert_checkpoint, evaluate_zeroshot


@pytest.fixture(scope="module")
def checkpoints(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported model with its tokenizer, which the source keeps apart."""
    folder = tmp_path_factory.mktemp("stories")
    for path in (stories.folder(shared_data) / "hf").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer.model").write_bytes(stories.sentencepiece_model(shared_data))
    assert convert_checkpoint.main(["--from-hf", str(folder), "--save", str(folder / "ours")]) == 0
    return folder / "ours"


@pytest.fixture
def scorer(checkpoints: Path) -> Iterator[ModelScorer]:
    with launched(Launch()):
        yield build_scorer(str(checkpoints), step=None, tensor_parallel=1, pipeline_parallel=1, micro_batch_size=4)
    launch.stop()


def test_the_tokenizer_gives_the_recorded_ids(checkpoints: Path, shared_data: Path) -> None:
    recorded = stories.reference(shared_data)
    tokenizer = SentencePieceTokenizer(str(checkpoints / "tokenizer" / "tokenizer.model"))
    assert [1, *tokenizer.encode(recorded["text"])][:len(recorded["input_ids"])] == recorded["input_ids"]


def test_mean_loss_and_logits_are_the_recorded_ones(scorer: ModelScorer, shared_data: Path) -> None:
    recorded = stories.reference(shared_data)
    hidden: list[torch.Tensor] = []
    [stage] = scorer.model.stages
    assert stage.final_norm is not None and stage.embedding is not None
    stage.final_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    # One more token at the end, so that the last recorded one is read and not only predicted.
    [answer] = scorer.score([ScoreRow([*recorded["input_ids"], 0], 1)])
    nll = -answer.logprobs[:-1].astype("float64").mean()
    assert nll == pytest.approx(recorded["nll_mean"], rel=1e-5)
    word = stage.output_weight()
    logits = hidden[0][-1, 0] @ (word.full_tensor() if hasattr(word, "full_tensor") else word).T
    torch.testing.assert_close(logits[:512].detach(), torch.tensor(recorded["last_logits"]), rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_the_recorded_ones(scorer: ModelScorer, shared_data: Path) -> None:
    tokens = stories.reference(shared_data)["greedy_ids"]
    [answer] = scorer.score([ScoreRow(tokens, 1)])
    assert answer.greedy.all()


def test_perplexity_of_its_own_domain_is_that_of_transformers(
    checkpoints: Path, shared_data: Path, tmp_path: Path,
) -> None:
    text = stories.folder(shared_data) / "tinystories_sample.txt"
    with launched(Launch()):
        assert evaluate_zeroshot.main(["--load", str(checkpoints), "--tasks", f"perplexity={text}",
                                       "--output", str(tmp_path / "results.json")]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["tasks"]["perplexity"]

    tokenizer = SentencePieceTokenizer(str(checkpoints / "tokenizer" / "tokenizer.model"))
    tokens = torch.tensor([tokenizer.eod, *tokenizer.encode(text.read_text())])
    theirs = AutoModelForCausalLM.from_pretrained(stories.folder(shared_data) / "hf").eval()
    nll, positions = 0.0, 512
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, positions):
            predicted = len(tokens[start + 1:start + 1 + positions])
            window = tokens[max(0, start + predicted - positions):start + predicted + 1]  # the last one is moved back
            logits = theirs(window[None, :-1]).logits[0].double()
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            nll += float(losses[-predicted:].sum())
    assert found["counts"]["tokens"] == len(tokens) - 1
    assert math.log(found["metrics"]["token_perplexity"]["value"]) == pytest.approx(nll / (len(tokens) - 1), rel=1e-5)
    assert found["metrics"]["token_perplexity"]["value"] < 7
