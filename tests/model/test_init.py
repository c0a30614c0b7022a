"""Initial weights: their distribution, and that they belong to a name rather than to a layout."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import global_name, materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import LLAMA_LIKE, tiny_config, whole_parameters

CPU = torch.device("cpu")


def initialised(config: ModelConfig, tp: TensorParallel, span: tuple[int, int] | None = None, seed: int = 5) -> GPT:
    first, stop = span or (0, config.num_layers)
    model = GPT(config, tp, StageSpan(first, stop, config.num_layers))
    materialize(model, config, prefix="", seed=seed, device=CPU)
    return model


PUBLISHED = {"scaled_init": False, "apply_layernorm_1p": True, "embed_layernorm": True}


@pytest.mark.parametrize("settings", [{}, LLAMA_LIKE, PUBLISHED], ids=["GPT-2", "Llama", "unscaled, norms at 0"])
def test_every_parameter_has_the_distribution_that_is_documented(tp: TensorParallel, settings: dict) -> None:
    config = tiny_config(**settings, hidden_size=128, init_method_std=0.05, vocab_size=500)
    for name, weight in whole_parameters(initialised(config, tp)).items():
        if name.endswith("bias"):
            assert not bool(weight.any())
        elif "norm" in name:
            assert bool((weight == (0.0 if config.apply_layernorm_1p else 1.0)).all())
        else:
            into_stream = config.scaled_init and name.endswith(("proj.weight", "fc2.weight"))
            std = 0.05 / math.sqrt(10.0) if into_stream else 0.05
            noise = 1.0 / math.sqrt(2 * weight.numel())
            assert float(weight.std()) == pytest.approx(std, rel=4.5 * noise), name
            assert abs(float(weight.mean())) < 4.5 * std / math.sqrt(weight.numel()), name
            assert float((weight / std).pow(4).mean()) == pytest.approx(3.0, abs=45 * noise), name


def test_no_two_parameters_and_no_two_seeds_share_their_numbers(tp: TensorParallel) -> None:
    config = tiny_config(untie_embeddings_and_output_weights=True)
    matrices = [weight for seed in (5, 6) for weight in whole_parameters(initialised(config, tp, seed=seed)).values()
                if weight.dim() > 1]
    leading = torch.stack([weight.flatten()[:24 * 32] / weight.std() for weight in matrices])
    correlations = torch.corrcoef(leading).triu(1)
    assert float(correlations.abs().max()) < 5.0 / math.sqrt(24 * 32)


def test_a_stage_has_the_weights_that_the_whole_model_has_there(tp: TensorParallel) -> None:
    config = tiny_config()
    whole = whole_parameters(initialised(config, tp))
    parts = [whole_parameters(initialised(config, tp, span)) for span in ((0, 2), (2, 3), (3, 5))]
    for part in parts:
        assert [name for name, weight in part.items() if not torch.equal(weight, whole[name])] == []
    assert set().union(*parts) == set(whole)
    assert "embedding.word.weight" in parts[0] and "embedding.word.weight" in parts[2]  # the tied head


def test_names_are_global(tp: TensorParallel) -> None:
    config = tiny_config(num_layers=2, untie_embeddings_and_output_weights=True)
    block = ["attention_norm.weight", "attention_norm.bias", "attention.qkv.weight", "attention.qkv.bias",
             "attention.proj.weight", "attention.proj.bias", "mlp_norm.weight", "mlp_norm.bias", "mlp.fc1.weight",
             "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    expected = ["embedding.word.weight", "embedding.position.weight", *(f"layers.0.{name}" for name in block),
                *(f"layers.1.{name}" for name in block), "final_norm.weight", "final_norm.bias", "head.weight"]
    assert list(whole_parameters(initialised(config, tp))) == expected
    assert global_name("head.weight", tiny_config()) == "embedding.word.weight"
    assert global_name("head.weight", config) == "head.weight"


def test_allocating_block_by_block_gives_the_same_weights(tp: TensorParallel) -> None:
    config = tiny_config()
    expected = whole_parameters(initialised(config, tp))
    model = GPT(config, tp, StageSpan(0, 5, 5))
    for layer, block in model.stack.blocks.items():
        materialize(block, config, prefix=f"stack.blocks.{layer}.", seed=5, device=CPU)
    assert isinstance(model.final_norm, nn.Module)
    assert all(parameter.is_meta for parameter in model.final_norm.parameters())
    materialize(model, config, prefix="", seed=5, device=CPU)
    found = whole_parameters(model)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_without_drawing_parameters_are_allocated(tp: TensorParallel) -> None:
    config = tiny_config()
    model = GPT(config, tp, StageSpan(0, 5, 5))
    materialize(model, config, prefix="", seed=5, device=CPU, draw=False)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor) and not parameter.is_meta and parameter.dtype is torch.float32
