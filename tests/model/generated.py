"""Generation, which reads tokens one by one, against evaluation, which reads them all at once."""

import pytest
import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.decoding import DecodeState, DecodingGPT
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import build_gpt, lively_weights, load, run, tiny_batch

PADDING = [0, 0, 2]
"""Tokens on the left that are none of the text's, of three texts."""


def assert_generated_as_evaluated(config: ModelConfig, tp: TensorParallel, *, first: int, stop: int,
                                  every: int = 1) -> None:
    """Args:
        first: tokens of the texts that are read at once; the others follow one by one until there are `stop`.
        every: the logits after so many tokens are compared.
    """
    model, decoder = build_gpt(config, tp).eval(), _decoder(config, tp)
    tokens = tiny_batch(config)["tokens"]
    with torch.no_grad():
        state = DecodeState(range(config.num_layers), torch.tensor(PADDING), config.seq_length)
        for start, count in ((0, first), *((place, 1) for place in range(first, stop))):
            logits = decoder(tokens[:, start:start + count], state=state)
            state.length += count
            for b, begin in enumerate(PADDING):
                if start % every == 0 and state.length > begin:
                    _assert_evaluated_alike(model, tokens[b, begin:state.length], logits[b])


def _decoder(config: ModelConfig, tp: TensorParallel) -> DecodingGPT:
    """The model that generates, with the weights of `build_gpt`."""
    decoder = DecodingGPT(config, tp, StageSpan(0, config.num_layers, config.num_layers))
    materialize(decoder, config, prefix="", seed=1, device=torch.device("cpu"), draw=False)
    load(decoder, lively_weights(decoder))
    return decoder.eval()


def _assert_evaluated_alike(model: GPT, text: torch.Tensor, logits: torch.Tensor) -> None:
    """Evaluation gives two tokens the probabilities that these logits after the text give them. Shapes: [s], [v]"""
    for label in (3, 40):
        mask = torch.zeros(1, len(text))
        mask[0, -1] = 1.0
        scored = run(model, {"tokens": text[None], "labels": torch.full_like(text, label)[None],
                             "loss_mask": mask, "sample_ids": torch.zeros(1, dtype=torch.int64)})
        assert float(scored[0, 0, -1]) == pytest.approx(float(logits.log_softmax(-1)[label]), abs=1e-4)
