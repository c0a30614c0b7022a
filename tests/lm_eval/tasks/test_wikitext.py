"""Both protocols of WikiText against their definitions."""

import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.results import EvalOptions
from megatron_ltd.lm_eval.tasks import wikitext
from megatron_ltd.lm_eval.tasks.task_files import read_text
from tests.lm_eval.fakes import UniformScorer, WordTokenizer
from tests.lm_eval.gpt2_scorer import Gpt2Scorer, gpt2_tokenizer, tiny_gpt2

TWO_ARTICLES = " \n = One = \n \n It is 0 @.@ 7 m , or so . \n \n = = Part = = \n \n x \n = Two = \n \n y z \n"


def test_detokenizing_undoes_what_wikitext_did() -> None:
    tokenized = ' " No , " he said ( then ) : 2 @,@ 000 well @-@ known cats weigh 1 @.@ 5 kg ; Ann \'s too . \n'
    assert wikitext.detokenize(tokenized) == ' "No," he said (then): 2,000 well-known cats weigh 1.5 kg; Ann\'s too.\n'
    assert wikitext.detokenize(" the dogs ' tails [ sic ] ! ") == " the dogs' tails [sic]! "
    assert wikitext.detokenize(" = = = Deep = = = \n 20 ° C \n") == " === Deep ===\n20°C\n"


def test_articles_begin_at_titles_and_not_at_section_headings() -> None:
    first, second = wikitext.split_articles(TWO_ARTICLES)
    assert first.startswith(" = One = ") and "= = Part = =" in first and first.endswith(" x ")
    assert second.startswith(" = Two = ")


def test_by_article_perplexities_are_normalised_by_their_own_counts(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text(TWO_ARTICLES)
    scorer = UniformScorer(max_length=4, vocab=8)
    result = wikitext.evaluate(path, scorer, WordTokenizer(), EvalOptions())
    # The first article's 19 words with an empty one at each end; the second's 5 likewise.
    words, size_bytes = 21 + 7, len(TWO_ARTICLES.encode()) - len(" \n\n")
    tokens = sum(len(row.tokens) - row.first_scored for row in scorer.rows)
    assert result.counts == {"tokens": tokens, "words": words, "bytes": size_bytes}
    nll = tokens * math.log(8)
    assert result.metrics["token_perplexity"].value == pytest.approx(8)
    assert result.metrics["word_perplexity"].value == pytest.approx(math.exp(nll / words))
    assert result.metrics["byte_perplexity"].value == pytest.approx(math.exp(nll / size_bytes))
    assert result.metrics["bits_per_byte"].value == pytest.approx(nll / math.log(2) / size_bytes)


def test_each_article_begins_with_the_end_of_document_token(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text(TWO_ARTICLES)
    scorer = UniformScorer()
    wikitext.evaluate(path, scorer, WordTokenizer(), EvalOptions())
    assert [(row.tokens[0], row.first_scored) for row in scorer.rows] == [(0, 1), (0, 1)]


@torch.no_grad()
def megatron_perplexities(
    model: GPT2LMHeadModel, tokens: list[int], stride: int, original: str
) -> tuple[float, float]:
    """WIKITEXT103 by its definition: for each target the window it is scored in, with one forward pass a target."""
    length, nll = model.config.n_positions, 0.0
    for target in range(1, len(tokens)):
        window = max(0, math.ceil((target - length) / stride))
        logits = model(torch.tensor([tokens[window * stride:target]])).logits[0, -1].double()
        nll -= float(torch.log_softmax(logits, -1)[tokens[target]])
    val_loss = nll / (len(tokens) - 1)
    ratio = (len(tokens) - 1) / (len(original.strip().split(" ")) - 1)
    return math.exp(val_loss), math.exp(val_loss * ratio)


def test_the_stream_protocol_equals_megatrons_definition(tmp_path: Path, shared_data: Path) -> None:
    text = TWO_ARTICLES * 2
    path = tmp_path / "wiki.test.raw"
    path.write_text(text)
    model, tokenizer = tiny_gpt2(positions=16), gpt2_tokenizer(shared_data)
    result = wikitext.evaluate(path, Gpt2Scorer(model), tokenizer, EvalOptions(stride=5))
    tokens = tokenizer.encode(wikitext.detokenize(text))
    assert len(tokens) > 3 * 16
    plain, adjusted = megatron_perplexities(model, tokens, 5, text)
    assert math.log(result.metrics["token_perplexity"].value) == pytest.approx(math.log(plain), rel=1e-5)
    assert math.log(result.metrics["word_perplexity"].value) == pytest.approx(math.log(adjusted), rel=1e-5)
    assert result.counts["tokens"] == len(tokens) - 1


def test_words_of_the_stream_are_counted_as_megatron_publishes_them(shared_data: Path) -> None:
    text, _ = read_text(shared_data / "tasks" / "wikitext2" / "wiki.test.tokens.gz")
    # Megatron-LM's README gives 245566 original tokens for WikiText103's test set, one of which is not predicted.
    assert wikitext.megatron_words(text) == 245566 - 1


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n \n")
    with pytest.raises(DataError, match=r"wiki\.test\.raw has no text"):
        wikitext.evaluate(path, UniformScorer(), WordTokenizer(), EvalOptions())
