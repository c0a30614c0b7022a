"""The scorer's answer to a row is that of `transformers`, on every layout and with every batch size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.requests import ScoredRow, ScoreRow
from megatron_ltd.lm_eval.scorer import build_scorer
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.state import TrainState
from tests.gloo import launch_ranks
from tests.lm_eval.scoring_ranks import score
from tests.model.transformers_weights import of_gpt2, of_llama
from tests.train.runs import launched

POSITIONS, VOCABULARY = 24, 61
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": POSITIONS,
                         "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 8}

GPT2 = ModelConfig(**SIZES, openai_gelu=True)
LLAMA = ModelConfig(**SIZES, ffn_hidden_size=48, position_embedding_type="rope", normalization="RMSNorm", swiglu=True,
                    disable_bias_linear=True, untie_embeddings_and_output_weights=True, group_query_attention=True,
                    num_query_groups=1)


def transformers_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=32, n_head=4, n_positions=POSITIONS, vocab_size=VOCABULARY,
                                      **SPECIAL))


def transformers_llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=1, intermediate_size=48,
        max_position_embeddings=POSITIONS, vocab_size=VOCABULARY, rms_norm_eps=1e-5, tie_word_embeddings=False,
        **SPECIAL))


MODELS: dict[str, tuple[ModelConfig, Callable[[], PreTrainedModel], Callable[..., dict[str, torch.Tensor]]]] = {
    "gpt2": (GPT2, transformers_gpt2, of_gpt2),
    "llama": (LLAMA, transformers_llama, of_llama),
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint, rows, and what a `transformers` model of the same weights says of them."""

    checkpoints: str
    rows: list[ScoreRow]
    answers: list[ScoredRow]


@torch.no_grad()
def rows_for(model: PreTrainedModel) -> list[ScoreRow]:
    """Eleven rows of 2 to all positions and one, scored from their first, their last or a token between on. Every other
    scored token is the model's own choice, so that there is something greedy to find."""
    random = np.random.default_rng(5)
    rows = []
    for index, length in enumerate([2, 3, POSITIONS + 1, 9, 9, 17, POSITIONS, 5, POSITIONS + 1, 12, 7]):
        row = ScoreRow(random.integers(0, VOCABULARY, length).tolist(), 1 + index % (length - 1))
        for place in range(row.first_scored, length, 2):
            row.tokens[place] = int(model(torch.tensor([row.tokens[:place]])).logits[0, -1].argmax())
        rows.append(row)
    return rows


@torch.no_grad()
def direct(model: PreTrainedModel, row: ScoreRow) -> ScoredRow:
    """One row by itself, as a person would write it down."""
    logits = model(torch.tensor([row.tokens[:-1]])).logits[0, row.first_scored - 1:].double()
    target = torch.tensor(row.tokens[row.first_scored:])
    logprobs = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    return ScoredRow(logprobs.float().numpy(), (logits.argmax(-1) == target).numpy())


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    config, build, mapping = MODELS[request.param]
    theirs = build().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_" in name
            parameter.copy_(1.0 + 0.2 * noise if is_norm and name.endswith("weight") else 0.25 * noise)
    weights = mapping({name: p.detach() for name, p in theirs.named_parameters()}, config)
    folder = tmp_path_factory.mktemp(request.param)
    # The layout, the batch and the dropping of the run that saved it have nothing to say here.
    run = RunConfig(model=config, optimizer=OptimizerConfig(lr=1e-3), data=DataConfig(mock_data=True),
                    token_drop=TokenDropConfig(random_ltd=True, random_ltd_start_length=8,
                                               random_ltd_strata=4),
                    parallel=ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True),
                    training=TrainingConfig(micro_batch_size=3, global_batch_size=48, train_iters=5, compile=True))
    CheckpointWriter(folder, None).save(5, {f"model.{name}": tensor.contiguous() for name, tensor in weights.items()},
                                        config=run.to_dict(), counters=TrainState().counters())
    rows = rows_for(theirs)
    return Reference(str(folder), rows, [direct(theirs, row) for row in rows])


LAYOUTS = [(1, 1, 1, 1), (1, 1, 1, 8), (1, 1, 1, 16), (2, 2, 1, 1), (2, 2, 1, 8), (2, 1, 2, 1), (2, 1, 2, 8),
           (2, 1, 1, 1), (2, 1, 1, 8), (4, 1, 1, 4), (8, 2, 2, 3)]
"""Ranks, tensor parallel, pipeline parallel, rows of a batch."""


@pytest.mark.parametrize(("world_size", "tp", "pp", "batch_rows"), LAYOUTS,
                         ids=[f"tp{tp}-pp{pp}-dp{n // (tp * pp)}-batch{rows}" for n, tp, pp, rows in LAYOUTS])
def test_answers_are_those_of_transformers_on_every_layout_and_with_every_batch_size(
    reference: Reference, world_size: int, tp: int, pp: int, batch_rows: int,
) -> None:
    rows = reference.rows
    answers_of_ranks = launch_ranks(score, world_size, reference.checkpoints, [rows, rows[-3:]], tp, pp, batch_rows)
    greedy = np.concatenate([answer.greedy for answer in reference.answers])
    assert 0.3 < greedy.mean() < 0.8
    for together, alone in answers_of_ranks:
        assert_same(together, reference.answers)
        assert_same(alone, reference.answers[-3:])


def test_answers_come_in_the_order_of_the_rows(reference: Reference) -> None:
    order = [7, 2, 0, 9, 4, 1]
    [[found]] = launch_ranks(score, 1, reference.checkpoints, [[reference.rows[i] for i in order]], 1, 1, 2)
    assert_same(found, [reference.answers[i] for i in order])


def assert_same(found: list[ScoredRow], wanted: list[ScoredRow]) -> None:
    for answer, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
        assert answer.greedy.tolist() == expected.greedy.tolist()


def test_a_model_that_does_not_fit_the_layout_is_refused(reference: Reference) -> None:
    with launched(Launch(0, 0, 8, "env://")), pytest.raises(ConfigError) as refused:
        build_scorer(reference.checkpoints, step=None, tensor_parallel=1, pipeline_parallel=8, micro_batch_size=1)
    assert "--num-layers = 4: fewer than the 8 stages" in str(refused.value)
