"""N-gram embeddings; the model against explicit loops is in test_token_drop.py, bags of tokens in test_policies.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.shapes import parameter_count
from megatron_ltd.model.init import initial_value
from megatron_ltd.model.ngrams import ngrams_of, sign_patterns
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.generated import assert_generated_as_evaluated
from tests.model.tiny import (
    GPT2_LIKE,
    LLAMA_LIKE,
    NGRAMS,
    build_gpt,
    load,
    run,
    tiny_batch,
    tiny_config,
    whole_parameters,
)

PAIRS = {"ngram_rows": 40}


def rows(config: ModelConfig, text: list[int], **known: torch.Tensor) -> torch.Tensor:
    found = ngrams_of(torch.tensor([text]), config, **known)
    assert found is not None
    return found.rows[0]


def test_a_new_table_changes_nothing(tp: TensorParallel) -> None:
    config = tiny_config(**LLAMA_LIKE, **NGRAMS)
    model, plain = build_gpt(config, tp), build_gpt(tiny_config(**LLAMA_LIKE), tp)
    table = initial_value("embedding.ngram.weight", torch.Size((80, 32)), config, 1)
    load(model, whole_parameters(plain) | {"embedding.ngram.weight": table})
    assert torch.equal(run(model, tiny_batch(config)), run(plain, tiny_batch(config)))
    assert parameter_count(config) - parameter_count(tiny_config(**LLAMA_LIKE)) == 80 * 32


def test_a_row_depends_on_the_tokens_that_end_there_in_their_order_and_on_no_others() -> None:
    config = tiny_config(ngram_rows=10**6, ngram_length=3)
    [first, second, third], other = rows(config, [7, 8, 9]).tolist(), rows(config, [5, 8, 9]).tolist()
    assert other[2][0] == third[0] and other[2][1] != third[1] and other[1] != second
    assert rows(config, [8, 7])[1, 0] != second[0] and rows(config, [7])[0].tolist() == first
    assert all(pair < 10**6 <= triple < 2 * 10**6 for pair, triple in (first, second, third))


def test_documents_and_missing_tokens_are_borders() -> None:
    config = tiny_config(ngram_rows=10**6, ngram_length=3)
    text, second = [3, 4, 5, 6, 7], [6, 7]
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    assert torch.equal(rows(config, text, documents=documents)[3:], rows(config, second))
    assert torch.equal(rows(config, text, documents=documents)[:3], rows(config, text)[:3])
    assert torch.equal(rows(config, second, before=torch.tensor([[4, 5]])), rows(config, text)[3:])
    assert torch.equal(rows(config, second, before=torch.tensor([[-1, -1]])), rows(config, second))


def test_pairs_spread_evenly_over_the_table() -> None:
    """Each of 61 x 61 pairs once, in any order of the hash: the counts of 128 rows are those of a fair draw."""
    config = tiny_config(ngram_rows=128)
    pairs = torch.cartesian_prod(torch.arange(61), torch.arange(61))
    found = ngrams_of(pairs, config)
    assert found is not None
    for counts in (found.rows[:, 1, 0].bincount(minlength=128), found.patterns[:, 1, 0].bincount(minlength=1024)):
        free, mean = len(counts) - 1, 61 * 61 / len(counts)
        chi_square = float((counts - mean).square().sum() / mean)
        assert chi_square < free + 4 * (2 * free) ** 0.5  # four standard deviations above its mean


def test_those_who_share_a_row_read_it_with_signs_of_their_own() -> None:
    config = tiny_config(ngram_rows=1)
    found = ngrams_of(torch.cartesian_prod(torch.arange(61), torch.arange(61)), config)
    assert found is not None
    signs = sign_patterns(32, torch.device("cpu"), torch.float32)[found.patterns[:, 1, 0]]
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    agreement = (signs[:1000] @ signs[1000:2000].T / 32).square().mean()  # 1 if all had one pattern
    assert float(agreement) == pytest.approx(1 / 32, rel=0.1)


@pytest.mark.parametrize("settings", [GPT2_LIKE | NGRAMS, LLAMA_LIKE | PAIRS, NGRAMS | {"ngram_length": 5}],
                         ids=["triples", "rotary pairs", "fives"])
def test_generation_reads_tokens_one_by_one_as_evaluation_reads_them_at_once(tp: TensorParallel,
                                                                             settings: dict[str, Any]) -> None:
    assert_generated_as_evaluated(tiny_config(**settings), tp, first=5, stop=12)


def test_a_model_without_a_table_looks_nothing_up() -> None:
    assert ngrams_of(torch.tensor([[1, 2]]), replace(tiny_config(), ngram_length=3)) is None
