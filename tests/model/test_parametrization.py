"""CompleteP: the rules of its table, written out once more, and what they are for: a width and a depth that do not
change how far a step moves the model."""

import math
from typing import Any

import pytest
import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import global_name, initial_value, materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model import dense_reference
from tests.model.tiny import LLAMA_LIKE, build_gpt, lively_weights, tiny_batch, tiny_config

BASE = {"parametrization": "completep", "base_hidden_size": 8, "base_num_layers": 2}
"""The tiny model is four times as wide and two and a half times as deep."""
WIDTH, DEPTH = 4.0, 2.5
LLAMA_SHAPE: dict[str, Any] = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
                               "disable_bias_linear": True}


def drawn(config: ModelConfig, tp: TensorParallel) -> GPT:
    model = GPT(config, tp, StageSpan(0, config.num_layers, config.num_layers))
    materialize(model, config, prefix="", seed=5, device=torch.device("cpu"))
    return model.train()


def loss_of(model: GPT, config: ModelConfig, first_id: int = 40) -> torch.Tensor:
    batch = tiny_batch(config, first_id=first_id)
    return model(batch.pop("tokens"), **batch)[0]


@pytest.mark.parametrize("settings", [{}, LLAMA_LIKE], ids=["GPT-2", "Llama"])
def test_the_loss_is_that_of_a_standard_model_whose_weights_hold_the_multipliers(
        tp: TensorParallel, settings: dict[str, Any]) -> None:
    config = tiny_config(**settings, **BASE)
    model = build_gpt(config, tp)
    weights = lively_weights(model)
    for name, weight in weights.items():
        if ".attention.proj." in name or ".mlp.fc2." in name:
            weights[name] = weight / DEPTH
        elif name.startswith("final_norm."):
            weights[name] = weight / WIDTH
    expected = dense_reference.loss(dense_reference.leaves(weights), tiny_config(**settings), tiny_batch(config))
    assert float(loss_of(model, config)) == pytest.approx(float(expected), rel=1e-5)


def test_initial_weights_shrink_with_the_width_and_not_with_the_depth() -> None:
    for name, shape, std in (("layers.4.mlp.fc1.weight", (128, 32), 0.02 / math.sqrt(WIDTH)),
                             ("layers.4.mlp.fc2.weight", (32, 128), 0.02 / math.sqrt(WIDTH) / math.sqrt(2 * 2)),
                             ("embedding.word.weight", (64, 32), 0.02)):
        drawn_weight = initial_value(name, torch.Size(shape), tiny_config(**BASE), 7)
        unit = initial_value(name, torch.Size(shape), tiny_config(init_method_std=1.0, num_layers=1), 7)
        if name.endswith("fc2.weight"):
            unit = unit * math.sqrt(2.0)
        torch.testing.assert_close(drawn_weight, unit * std, rtol=1e-6, atol=0.0)


def test_at_the_size_of_the_base_model_nothing_changes() -> None:
    standard = tiny_config()
    base = tiny_config(parametrization="completep", base_hidden_size=32, base_num_layers=5)
    for name, shape in (("layers.0.attention.proj.weight", (32, 32)), ("embedding.word.weight", (64, 32))):
        assert torch.equal(initial_value(name, torch.Size(shape), standard, 7),
                           initial_value(name, torch.Size(shape), base, 7))


def test_every_parameter_takes_the_steps_of_adamw_with_the_settings_of_its_row(tp: TensorParallel) -> None:
    config = tiny_config(**BASE)
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-3)
    model = build_gpt(config, tp)
    weights = {name: weight.double() for name, weight in lively_weights(model).items()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    optimizer = ShardedOptimizer(model.named_parameters(), RunConfig(model=config, optimizer=settings))
    for step, rate in enumerate((1e-2, 3e-3), 1):
        optimizer.zero_grad()
        loss_of(model, config, step).backward()
        gradients = {global_name(name, config): parameter.grad.full_tensor().double()  # type: ignore[union-attr]
                     for name, parameter in model.named_parameters()}
        optimizer.step(rate)
        for name, gradient in gradients.items():
            in_layer, is_matrix = name.startswith("layers."), gradient.dim() > 1
            own_rate = rate / WIDTH if in_layer and is_matrix else rate
            decay = 0.0 if not is_matrix else 0.1 * WIDTH if in_layer else 0.1
            epsilon = 1e-3 / WIDTH / (DEPTH if in_layer else 1.0)
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            direction = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.95**step)).sqrt() + epsilon)
            weights[name] = weights[name] * (1 - own_rate * decay) - own_rate * direction
    for name, parameter in model.named_parameters():
        found = parameter.full_tensor().detach()  # type: ignore[attr-defined]
        torch.testing.assert_close(found.double(), weights[global_name(name, config)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_step_moves_what_wider_and_deeper_models_compute_by_the_same_amount(
        tp: TensorParallel, optimizer: str) -> None:
    """The coordinate check: root mean square of the change of the final hidden states over four steps. The standard
    parametrization is beside it, to show that the check can fail."""

    def movement(width: int, layers: int, parametrization: dict[str, Any]) -> float:
        config = tiny_config(hidden_size=width, num_attention_heads=width // 16, num_layers=layers,
                             init_method_std=0.1, **LLAMA_SHAPE, **parametrization)
        model = drawn(config, tp)
        settings = OptimizerConfig(optimizer=optimizer, lr=4e-3)  # type: ignore[arg-type]
        training = ShardedOptimizer(model.named_parameters(), RunConfig(model=config, optimizer=settings))
        states: list[torch.Tensor] = []
        model.final_norm.register_forward_hook(lambda *call: states.append(call[2].detach()))  # type: ignore[union-attr]
        for _ in range(4):
            training.zero_grad()
            (loss_of(model, config) / 72).backward()
            training.step(4e-3)
        loss_of(model, config)
        return float((states[-1] - states[0]).pow(2).mean().sqrt())

    completep = {"parametrization": "completep", "base_hidden_size": 32, "base_num_layers": 2}
    base = movement(32, 2, completep)
    for width, layers in ((128, 2), (32, 8), (128, 8)):
        assert movement(width, layers, completep) / base == pytest.approx(1.0, abs=0.15), (width, layers)
    assert movement(128, 8, {}) / movement(32, 2, {}) > 1.3
