"""Selective recomputation keeps less and repeats no product."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ltd.model.attention.context import ContextMaker, Microbatch
from megatron_ltd.model.block import Block
from megatron_ltd.model.init import materialize
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import GPT2_LIKE, LLAMA_LIKE, OLMO2_LIKE, SEED, tiny_config

SAMPLES = 2


def kept_and_flops(tp: TensorParallel, settings: dict[str, Any], recompute: bool) -> tuple[float, int]:
    """Values of the hidden size that a layer keeps of each token, and FLOPs of its forward and backward pass."""
    config = tiny_config(**settings)
    block = Block(config, tp, recompute=recompute).train()
    materialize(block, config, prefix="stack.blocks.1.", seed=SEED, device=torch.device("cpu"))
    tokens = config.seq_length * SAMPLES
    contexts = ContextMaker(config, tp, SEED, True, Microbatch(config.seq_length, torch.arange(SAMPLES)))
    context = contexts.in_layer(contexts.whole, 1)
    x = torch.randn(config.seq_length, SAMPLES, config.hidden_size, requires_grad=True)
    parameters = {p.to_local().untyped_storage()._cdata for p in block.parameters()}  # type: ignore[attr-defined]
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage.nbytes() >= 4 * tokens * config.hidden_size:
            kept[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            update = block(x, context)
        update.sum().backward()
    kept_bytes = sum(storage.nbytes() for storage in kept.values())
    return kept_bytes / (4 * tokens * config.hidden_size), flops.get_total_flops()


@pytest.mark.parametrize(("settings", "spared"), [
    (GPT2_LIKE, 6.0),  # two norms, and what the activation function makes of 4 values
    (LLAMA_LIKE, 4.0 + 2 * 48 / 32),  # two norms, two values each on a CPU, silu(gate), and that times up
    (OLMO2_LIKE, 2 * 48 / 32),  # norms after the branches have nothing to spare
], ids=["gpt2", "llama", "olmo2"])
def test_selective_recomputation_spares_norms_and_activation_functions(
        tp: TensorParallel, settings: dict[str, Any], spared: float) -> None:
    all_kept, once = kept_and_flops(tp, settings, False)
    selective, again = kept_and_flops(tp, settings, True)
    assert all_kept - selective == pytest.approx(spared)
    assert once == again
