"""Keys and values that several heads share are given to a kernel as they are only where it takes them so.

Of a GPU's kernels torch's flash attention takes grouped queries, in half precision and without a mask; its
memory-efficient attention, which is left in fp32, does not (sdp_utils.cpp), and torch then forms all scores.
"""

from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ltd.model.attention import layer
from megatron_ltd.model.attention.context import ContextMaker, Microbatch
from megatron_ltd.model.block import Block
from megatron_ltd.model.init import materialize
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import LLAMA_LIKE, SEED, tiny_config

SAMPLES = 2


def update_and_heads(tp: TensorParallel, dtype: torch.dtype, on_gpu: bool) -> tuple[torch.Tensor, tuple[int, int]]:
    """What a layer adds to the stream, and the heads of queries and of keys that the kernel was given."""
    config = tiny_config(**LLAMA_LIKE)
    block = Block(config, tp)
    materialize(block, config, prefix="stack.blocks.1.", seed=SEED, device=torch.device("cpu"))
    block.to(dtype)
    contexts = ContextMaker(config, tp, SEED, False, Microbatch(config.seq_length, torch.arange(SAMPLES)))
    x = torch.randn(config.seq_length, SAMPLES, config.hidden_size, generator=torch.Generator().manual_seed(0))
    attend, heads = layer.F.scaled_dot_product_attention, []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
        heads.append((query.shape[1], key.shape[1]))
        return attend(query, key, value, **settings)

    with mock.patch.object(layer.F, "scaled_dot_product_attention", kernel), \
            mock.patch.object(torch.Tensor, "is_cuda", on_gpu), torch.no_grad():
        update = block(x.to(dtype), contexts.in_layer(contexts.whole, 1))
    (found,) = heads
    return update, found


@pytest.mark.parametrize(("dtype", "on_gpu", "heads"), [
    (torch.float32, False, (4, 2)), (torch.bfloat16, True, (4, 2)), (torch.float32, True, (4, 4))])
def test_a_kernel_gets_grouped_queries_if_it_takes_them(tp: TensorParallel, dtype: torch.dtype, on_gpu: bool,
                                                        heads: tuple[int, int]) -> None:
    update, found = update_and_heads(tp, dtype, on_gpu)
    assert found == heads
    torch.testing.assert_close(update, update_and_heads(tp, dtype, False)[0], rtol=1e-5, atol=1e-7)
