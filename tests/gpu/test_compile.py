"""--compile: whole layers, no graph breaks, the same losses."""

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_ltd.model.attention.context import ContextMaker, Microbatch
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.setup import build_model
from tests.gpu.small import LENGTH, SAMPLES, losses, settings


def test_a_layer_is_one_graph(gpu: Runtime) -> None:
    (stage,) = build_model(settings(), gpu.mesh, gpu.device).stages
    batch = Microbatch(LENGTH, torch.arange(SAMPLES, device=gpu.device))
    tokens = ContextMaker(stage.config, stage.tp, 0, True, batch).whole
    x = torch.randn(LENGTH, SAMPLES, stage.config.hidden_size, device=gpu.device, requires_grad=True)
    explained = torch._dynamo.explain(stage.stack.blocks["1"].forward)(x, tokens)
    assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_growing_kept_length_compiles_once_and_trains_as_eager_layers_do(gpu: Runtime, precision: str) -> None:
    kept = [32, 48, 64, LENGTH]
    half = precision == "bf16"
    eager = losses(settings(bf16=half), gpu.mesh, gpu.device, kept)
    torch._dynamo.reset()
    counters.clear()
    compiled = losses(settings(bf16=half, compile=True), gpu.mesh, gpu.device, kept)
    assert compiled == pytest.approx(eager, rel=2e-3 if half else 1e-4)
    assert counters["stats"]["unique_graphs"] == 4  # full length, any other, and the head's two passes
    assert not counters["graph_break"], dict(counters["graph_break"])
