"""Stages one after the other are the whole model."""

from typing import Any

import pytest
import torch

from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import (
    GPT2_LIKE,
    LLAMA_LIKE,
    assert_gradients_close,
    build_gpt,
    documents,
    loss_and_gradients,
    run,
    tiny_batch,
    tiny_config,
    whole_gradients,
)


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE], ids=["tied", "untied"])
@pytest.mark.parametrize("spans", [[(0, 2), (2, 5)], [(0, 1), (1, 2), (2, 4), (4, 5)]], ids=["two", "four"])
def test_stages_in_a_row_are_the_whole_model(tp: TensorParallel, settings: dict[str, Any],
                                             spans: list[tuple[int, int]]) -> None:
    """Runs of dropped layers that a stage boundary cuts, and a tied embedding in two copies whose gradients add up."""
    config = tiny_config(**settings, hidden_dropout=0.1, attention_dropout=0.1)
    batch = tiny_batch(config) | documents(config)
    expected_loss, expected = loss_and_gradients(build_gpt(config, tp, dropped=[1, 2, 3], kept=8), batch)
    stages = [build_gpt(config, tp, dropped=[1, 2, 3], kept=8, span=span) for span in spans]
    x, facts = batch["tokens"], {name: value for name, value in batch.items() if name != "tokens"}
    for stage in stages:
        x = stage(x, **facts)
    x.backward()
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, gradient in whole_gradients(stage).items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    torch.testing.assert_close(x.detach()[0], expected_loss, rtol=1e-6, atol=0.0)
    assert_gradients_close(gradients, expected, tolerance=1e-6)


def test_stages_in_a_row_score_as_the_whole_model(tp: TensorParallel) -> None:
    config = tiny_config(**LLAMA_LIKE)
    batch = tiny_batch(config)
    x, facts = batch["tokens"], {name: value for name, value in batch.items() if name != "tokens"}
    with torch.no_grad():
        for span in ((0, 3), (3, 5)):
            x = build_gpt(config, tp, dropped=[1, 2, 3], kept=8, span=span).eval()(x, **facts)
        assert torch.equal(x, run(build_gpt(config, tp).eval(), batch))
