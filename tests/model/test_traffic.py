"""What a layer's functions read and write against a count of every function that torch calls."""

from math import prod
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.attention.convolution import convolved, reading_of
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.plan.layouts.traffic import backward_traffic, forward_traffic
from tests.model.tiny import CONVOLUTION, LLAMA_LIKE, build_gpt, run, tiny_batch, tiny_config

PRODUCTS = ("mm", "bmm", "attention", "DTensor")


class ReadAndWritten(TorchDispatchMode):
    """Counts the numbers of tensors as large as a microbatch that functions other than products and views take and
    return."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.numbers = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        before, after = ([leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)]
                         for part in ((args, kwargs), found))
        storages = {tensor.untyped_storage()._cdata for tensor in before}
        is_view = not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in storages for tensor in after)
        if not is_view and not any(part in str(func) for part in PRODUCTS):
            sizes = [prod(tensor.shape) for tensor in (*before, *after)]
            self.numbers += sum(size for size in sizes if size >= self.least)
        return found


def counted(config: ModelConfig, tp: TensorParallel) -> int:
    batch = tiny_batch(config, samples=4)
    model = build_gpt(config, tp)
    with ReadAndWritten(4 * config.seq_length * 8) as found:
        run(model, batch).backward()
    return found.numbers


@pytest.mark.parametrize("settings", [{}, {"disable_bias_linear": True}, LLAMA_LIKE | {"normalization": "LayerNorm"},
                                      CONVOLUTION],
                         ids=["GPT", "without biases", "Llama with LayerNorm", "convolution"])
def test_a_layer_reads_and_writes_what_torch_counts(tp: TensorParallel, settings: dict[str, Any]) -> None:
    """Two layers less one. RMSNorm is one function on GPUs alone, so it is left out here."""
    one, two = (tiny_config(**settings, num_layers=layers, seq_length=64) for layers in (1, 2))
    numbers = counted(two, tp) - counted(one, tp)
    ways = forward_traffic(one, 1, dropped=False), backward_traffic(one, 1, dropped=False)
    assert numbers / (4 * 64) == pytest.approx(sum(sum(way) for way in ways), rel=0.05)


@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_convolution_reads_and_writes_what_torch_counts(kernel: int, dropped: bool) -> None:
    tokens, channels = 256, 64
    places = torch.arange(tokens)[:, None] * 4 // 3
    x = torch.randn(tokens, 1, channels, requires_grad=True)
    weight = torch.randn(channels, kernel - 1, requires_grad=True)
    grad, reading = torch.ones_like(x), reading_of(places, kernel - 1) if dropped else None
    with ReadAndWritten(tokens * channels // 2) as found:
        convolved(x, weight, reading).backward(grad)
    plain, config = (tiny_config(hidden_size=channels, qkv_conv_kernel=size) for size in (None, kernel))
    more = sum(sum(way(config, 1, dropped=dropped)) - sum(way(plain, 1, dropped=dropped))
               for way in (forward_traffic, backward_traffic))
    assert found.numbers / tokens == pytest.approx(more / 3, rel=0.05)  # of queries, of keys, and of values
