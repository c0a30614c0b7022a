"""Muon against `torch.optim.Muon` on whole matrices, and its parts by hand."""

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from megatron_ltd.config.model import Family, ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig, TrainingConfig
from megatron_ltd.model.arithmetic.shapes import layer_matrices, parameter_shapes
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.muon import orthogonalized, update_scale
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.train.setup import build_model
from tests.gloo import run_ranks

HEADS, GROUPS, HEAD = 8, 2, 3
"""Each of the two groups has four heads of queries, one of keys and one of values, of three rows each."""

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=HEADS, kv_channels=HEAD, seq_length=8,
                    vocab_size=20, group_query_attention=True, num_query_groups=GROUPS, swiglu=True,
                    ffn_hidden_size=24, normalization="RMSNorm", disable_bias_linear=True)
PARAMETERS: dict[str, tuple[tuple[int, ...], Placement]] = {
    "layers.0.attention.qkv.weight": ((36, 16), Shard(0)), "layers.0.attention.proj.weight": ((16, 24), Shard(1)),
    "layers.0.mlp.gate.weight": ((24, 16), Shard(0)), "layers.0.mlp.up.weight": ((24, 16), Shard(0)),
    "layers.0.mlp.fc2.weight": ((16, 24), Shard(1)), "layers.0.mlp_norm.weight": ((16,), Replicate()),
    "embedding.word.weight": ((20, 16), Shard(0)),
}
RATES = [1e-3, 3e-2, 1e-2, 0.0, 2e-2]
DEFAULTS = OptimizerConfig(optimizer="muon", lr=1e-2, weight_decay=0.1, muon_precision="bf16")
VARIANTS: dict[str, tuple[OptimizerConfig, dict[str, Any]]] = {
    "defaults": (DEFAULTS, {"adjust_lr_fn": "match_rms_adamw"}),
    "original-scale": (replace(DEFAULTS, muon_scale_mode="shape_scaling"), {"adjust_lr_fn": "original"}),
    "no-nesterov": (replace(DEFAULTS, muon_nesterov=False, muon_momentum=0.8, muon_num_ns_steps=3),
                    {"adjust_lr_fn": "match_rms_adamw", "nesterov": False, "momentum": 0.8, "ns_steps": 3}),
}


def whole(name: str, step: int) -> torch.Tensor:
    """The initial weight for step -1, the gradient of a step otherwise."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * (step + 1))
    return torch.randn(PARAMETERS[name][0], generator=generator)


def sharded(tensor: torch.Tensor, like: DTensor) -> torch.Tensor:
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def train_on_ranks(rank: int, ranks: int, config: OptimizerConfig, resumed_at: int = -1) -> dict[str, torch.Tensor]:
    """Whole weights and moments after the last step; before step `resumed_at` the state moves to a new optimizer."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    parameters = {name: nn.Parameter(distribute_tensor(whole(name, -1), mesh, [placement], src_data_rank=None))
                  for name, (_, placement) in PARAMETERS.items()}
    run = RunConfig(model=MODEL, optimizer=config)
    optimizer = ShardedOptimizer(parameters.items(), run)
    for step, rate in enumerate(RATES):
        if step == resumed_at:
            saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors(step).items()}
            optimizer = ShardedOptimizer(parameters.items(), run)
            for name, target in optimizer.state_tensors(step).items():
                target.copy_(saved[name])
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            assert isinstance(parameter, DTensor)
            parameter.grad = sharded(whole(name, step), parameter)
        optimizer.step(rate)
    state = optimizer.state_tensors(len(RATES))
    return {name: tensor.full_tensor().detach().clone() for name, tensor in {**parameters, **state}.items()
            if isinstance(tensor, DTensor)}


def split_rows(fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value: of the six heads of a group the first four, the fifth, and the last."""
    kinds = [(0, 0, 0, 0, 1, 2)[row // HEAD % 6] for row in range(len(fused))]
    return tuple(fused[[kind == wanted for kind in kinds]] for wanted in range(3))


def torchs(settings: Mapping[str, Any], split: bool = True) -> dict[str, torch.Tensor]:
    """The same steps by torch on whole matrices: query, key and value are parameters of their own."""
    def pieces(name: str, step: int) -> dict[str, torch.Tensor]:
        tensor = whole(name, step)
        if not name.endswith("qkv.weight") or not split:
            return {name: tensor}
        return {f"{name}.{letter}": part for letter, part in zip("qkv", split_rows(tensor), strict=True)}

    parameters = {key: nn.Parameter(part) for name in PARAMETERS for key, part in pieces(name, -1).items()}
    adams = {"layers.0.mlp_norm.weight": 0.0, "embedding.word.weight": 0.1}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon([p for key, p in parameters.items() if key not in adams], lr=1e-2, weight_decay=0.1,
                         **settings),
        torch.optim.AdamW([{"params": [parameters[key]], "weight_decay": decay} for key, decay in adams.items()],
                          lr=1e-2)]
    for step, rate in enumerate(RATES):
        for name in PARAMETERS:
            for key, part in pieces(name, step).items():
                parameters[key].grad = part
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    moments = {f"{moment}.{key}": optimizer.state[p][moment] for optimizer in optimizers
               for key, p in parameters.items() for moment in ("momentum_buffer", "exp_avg", "exp_avg_sq")
               if moment in optimizer.state[p]}
    return {**{key: p.detach() for key, p in parameters.items()}, **moments}


def by_piece(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fused = [name for name in found if name.endswith("qkv.weight")]
    return {name: tensor for name, tensor in found.items() if name not in fused} | {
        f"{name}.{letter}": part for name in fused
        for letter, part in zip("qkv", split_rows(found[name]), strict=True)}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_moments_are_those_of_torch_on_whole_matrices(ranks: int, variant: str) -> None:
    config, settings = VARIANTS[variant]
    expected = torchs(settings)
    for found in run_ranks(train_on_ranks, ranks, config):
        assert_same(by_piece(found), expected)


def test_the_fused_matrix_can_be_taken_as_one() -> None:
    (found,) = run_ranks(train_on_ranks, 1, replace(DEFAULTS, muon_split_qkv=False))
    assert_same(found, torchs({"adjust_lr_fn": "match_rms_adamw"}, split=False))


def test_a_run_whose_state_moves_to_a_new_optimizer_goes_on_bit_for_bit() -> None:
    for found, resumed in zip(run_ranks(train_on_ranks, 2, DEFAULTS), run_ranks(train_on_ranks, 2, DEFAULTS, 3),
                              strict=True):
        assert [name for name in found if not torch.equal(found[name], resumed[name])] == []


@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (5, 2)])
def test_newton_schulz_takes_each_singular_value_through_the_polynomial(shape: tuple[int, int]) -> None:
    """Of a matrix with 3 and 4 on its diagonal, which has norm 5, the values are 0.6 and 0.8 at first."""
    expected = torch.zeros(shape, dtype=torch.float64)
    matrix = torch.zeros(shape, dtype=torch.float64)
    for place, value in enumerate((3.0, 4.0)):
        matrix[place, place] = value
        value /= 5.0
        for _ in range(5):
            value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
        expected[place, place] = value
        assert 0.5 < value < 1.5
    torch.testing.assert_close(orthogonalized(matrix, 5), expected, rtol=1e-12, atol=1e-12)


def test_in_fp32_the_update_has_the_singular_vectors_of_the_gradient() -> None:
    gradient = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    values = left.mT @ orthogonalized(gradient, 5).double() @ right.mT
    off_diagonal = values - values.diagonal().diag()
    assert float(off_diagonal.abs().max()) < 1e-5
    assert 0.6 < float(values.diagonal().min()) and float(values.diagonal().max()) < 1.3


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert torch.equal(orthogonalized(torch.zeros(3, 4), 5), torch.zeros(3, 4))


@pytest.mark.parametrize(("mode", "tall", "wide"), [
    ("match_rms_adamw", 0.2 * 3.0, 0.2 * 3.0), ("spectral", 3.0, 3.0), ("shape_scaling", 1.5, 1.0),
    ("unit_rms_norm", 1.5, 2.0 / 3.0)])
def test_scales_by_hand(mode: str, tall: float, wide: float) -> None:
    assert math.isclose(update_scale(mode, 9, 4), tall) and math.isclose(update_scale(mode, 4, 9), wide)


def test_updates_have_the_root_mean_square_of_adamws() -> None:
    """0.2, for singular values of 1."""
    update = orthogonalized(torch.randn(64, 96, generator=torch.Generator().manual_seed(2)), 5)
    assert 0.15 < float(update.square().mean().sqrt()) * update_scale("match_rms_adamw", 64, 96) < 0.25


def test_rows_of_query_key_and_value_are_those_of_a_group() -> None:
    assert layer_matrices(MODEL) == {
        "attention.qkv.weight": (4 * HEAD, HEAD, HEAD), "attention.proj.weight": (16,), "mlp.gate.weight": (24,),
        "mlp.up.weight": (24,), "mlp.fc2.weight": (16,)}


FAMILIES: dict[Family, ModelConfig] = {
    "gpt": MODEL,
    "bert": ModelConfig(family="bert", num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=8,
                        vocab_size=20),
    "vit": ModelConfig(family="vit", num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=5, img_h=4,
                       img_w=4, patch_dim=2, num_channels=1, num_classes=3),
}


def moments_by_name(rank: int, ranks: int, config: RunConfig) -> tuple[str, list[str]]:
    mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
    model = build_model(config, mesh, torch.device("cpu"))
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    known_as = {p.name: p.global_name for p in model.parameters}
    return optimizer.description, [f"{moment} {known_as[name]}" for name in known_as
                                   for moment in optimizer.moments(name)]


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(family: Family) -> None:
    config = RunConfig(model=FAMILIES[family], optimizer=OptimizerConfig(optimizer="muon", lr=1.0),
                       training=TrainingConfig(bf16=family == "vit"))
    ((description, found),) = run_ranks(moments_by_name, 1, config)
    expected = []
    for name, shape in parameter_shapes(config.model).items():
        is_matrix = name.startswith("layers.") and len(shape) == 2
        expected += [f"{moment} {name}" for moment in (["momentum_buffer"] if is_matrix else ["exp_avg", "exp_avg_sq"])]
    assert sorted(found) == sorted(expected)
    assert sum(line.startswith("momentum_buffer") for line in found) == {"gpt": 5, "bert": 8, "vit": 8}[family]
    precision = "bf16" if family == "vit" else "fp32"
    assert description == f"Muon in {precision} for the layers' matrices, torch fused AdamW for the rest"
