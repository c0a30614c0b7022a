"""The arithmetic of parameter shapes is what the models really have."""

from typing import Any

import pytest
from torch.distributed.tensor import DTensor

from megatron_ltd.model.arithmetic.shapes import parameter_shapes
from megatron_ltd.model.init import global_name
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import LLAMA_LIKE, NGRAMS, build_model, tiny_config

BERT = {"family": "bert"}


@pytest.mark.parametrize("settings", [
    {}, {"untie_embeddings_and_output_weights": True, "max_position_embeddings": 40}, LLAMA_LIKE,
    LLAMA_LIKE | {"kv_channels": 12, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    {"position_embedding_type": "none", "normalization": "RMSNorm", "swiglu": True}, BERT,
    LLAMA_LIKE | {"mixture_of_depths_capacity": 0.5, "mixture_of_depths_every": 3}, NGRAMS,
    BERT | {"bert_no_binary_head": True, "untie_embeddings_and_output_weights": True}, BERT | LLAMA_LIKE,
], ids=["gpt2", "untied", "llama", "llama-qkv-bias", "no positions", "bert", "mixture-of-depths", "n-grams",
        "bert-no-binary-head", "bert-llama"])
def test_shapes_by_arithmetic_are_those_of_the_model(tp: TensorParallel, settings: dict[str, Any]) -> None:
    config = tiny_config(**settings)
    built = {global_name(name, config): tuple(p.shape) for name, p in build_model(config, tp).named_parameters()
             if isinstance(p, DTensor)}
    assert parameter_shapes(config) == built
