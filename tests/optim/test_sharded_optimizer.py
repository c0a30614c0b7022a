"""The optimizer on shards against torch's on whole tensors."""

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig
from megatron_ltd.optim import build
from megatron_ltd.optim.build import ShardedOptimizer, decays
from megatron_ltd.parallel.gradients import local_gradient
from tests.gloo import run_ranks

PARAMETERS: dict[str, tuple[tuple[int, ...], Placement]] = {
    "layers.0.mlp.fc1.weight": ((8, 6), Shard(0)), "layers.0.mlp.fc1.bias": ((8,), Shard(0)),
    "layers.0.mlp.fc2.weight": ((6, 8), Shard(1)), "layers.0.mlp_norm.weight": ((6,), Replicate()),
    "embedding.word.weight": ((10, 6), Shard(0)),
}
DECOUPLED = 0.3
"""The rate of the word embedding as a share of the others' with --decoupled-lr."""
RATES = [0.0, 1e-3, 3e-3, 1e-2, 1e-3]
ADAM = OptimizerConfig(lr=1e-2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6)
ADAM_ALL_DECAY = replace(ADAM, do_layernorm_bias_weight_decay=True)
ADAM_DECOUPLED = replace(ADAM, decoupled_lr=DECOUPLED * 1e-2)
SGD = OptimizerConfig(optimizer="sgd", lr=1e-2, weight_decay=0.1)
MODEL = ModelConfig(num_layers=1, hidden_size=6, num_attention_heads=1, ffn_hidden_size=8, seq_length=8, vocab_size=10)
MUON = OptimizerConfig(optimizer="muon", lr=1e-2, weight_decay=0.1)


def whole(name: str, step: int) -> torch.Tensor:
    """The initial weight for step -1, the gradient of a step otherwise."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * (step + 1))
    return torch.randn(PARAMETERS[name][0], generator=generator)


def sharded_parameters(ranks: int) -> dict[str, nn.Parameter]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    return {name: nn.Parameter(distribute_tensor(whole(name, -1), mesh, [placement], src_data_rank=None))
            for name, (_, placement) in PARAMETERS.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    for name, parameter in parameters.items():
        gradient = whole(name, step)
        if isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements,
                                               src_data_rank=None)
        else:
            parameter.grad = gradient


def full(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def reference(config: OptimizerConfig) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """torch's optimizer, in its plain implementation, with the groups written out."""
    parameters = {name: nn.Parameter(whole(name, -1)) for name in PARAMETERS}
    groups = [
        {"params": [parameters[name] for name in ("layers.0.mlp.fc1.weight", "layers.0.mlp.fc2.weight")],
         "weight_decay": 0.1},
        {"params": [parameters["embedding.word.weight"]], "weight_decay": 0.1},
        {"params": [parameters[name] for name in ("layers.0.mlp.fc1.bias", "layers.0.mlp_norm.weight")],
         "weight_decay": 0.1 if config.do_layernorm_bias_weight_decay else 0.0},
    ]
    if config.optimizer == "sgd":
        return parameters, torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=False)
    return parameters, torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, foreach=False)


def step_both(ours: ShardedOptimizer, parameters: dict[str, nn.Parameter], expected: torch.optim.Optimizer,
              plain: dict[str, nn.Parameter], step: int) -> None:
    """One step of ours and of torch's with the same gradients."""
    for weights in (parameters, plain):
        set_gradients(weights, step)
    ours.step(1e-2)
    expected.step()


def assert_close(parameters: dict[str, nn.Parameter], plain: dict[str, nn.Parameter], atol: float) -> None:
    for name, parameter in plain.items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-6, atol=atol)


def train_on_ranks(rank: int, ranks: int, config: OptimizerConfig) -> list[dict[str, torch.Tensor]]:
    """Whole weights after each step, and the whole state after the last."""
    parameters = sharded_parameters(ranks)
    optimizer = ShardedOptimizer(parameters.items(), RunConfig(optimizer=config))
    weights = []
    for step, rate in enumerate(RATES):
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters.values())
        set_gradients(parameters, step)
        optimizer.step(rate, decoupled_rate=None if config.decoupled_lr is None else DECOUPLED * rate)
        weights.append(full(parameters))
    return [*weights, full(optimizer.state_tensors(len(RATES)))]


@pytest.mark.parametrize("config", [ADAM, ADAM_DECOUPLED, ADAM_ALL_DECAY, SGD],
                         ids=["adam", "adam-decoupled", "adam-all-decay", "sgd"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_and_moments_are_those_of_torch_on_whole_tensors(ranks: int, config: OptimizerConfig) -> None:
    results = run_ranks(train_on_ranks, ranks, config)
    parameters, optimizer = reference(config)
    for step, rate in enumerate(RATES):
        set_gradients(parameters, step)
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = DECOUPLED * rate if number == 1 and config.decoupled_lr is not None else rate
        optimizer.step()
        for result in results:
            for name, parameter in parameters.items():
                # Weights are of the size of one, and torch's fused kernels round other intermediate results.
                torch.testing.assert_close(result[step][name], parameter.detach(), rtol=1e-6, atol=3e-7)
    moments = ["momentum_buffer"] if config is SGD else ["exp_avg", "exp_avg_sq"]
    expected = {f"{moment}.{name}": optimizer.state[parameter][moment]
                for name, parameter in parameters.items() for moment in moments}
    for result in results:
        assert result[-1].keys() == expected.keys()
        for name, moment in expected.items():
            torch.testing.assert_close(result[-1][name], moment, rtol=1e-6, atol=3e-7)


def resumed_on_ranks(rank: int, ranks: int, config: OptimizerConfig, before: int) -> list[dict[str, torch.Tensor]]:
    """The weights of an uninterrupted run, and of one whose state went through a checkpoint's tensors."""
    runs = []
    for interrupted in (False, True):
        parameters = sharded_parameters(ranks)
        optimizer = ShardedOptimizer(parameters.items(), RunConfig(optimizer=config))
        for step in range(len(RATES)):
            if interrupted and step == before:
                saved = full(optimizer.state_tensors(before))
                optimizer = ShardedOptimizer(parameters.items(), RunConfig(optimizer=config))
                for name, target in optimizer.state_tensors(before).items():
                    assert isinstance(target, DTensor)
                    target.copy_(distribute_tensor(saved[name], target.device_mesh, target.placements,
                                                   src_data_rank=None))
            set_gradients(parameters, step)
            optimizer.step(RATES[step])
        runs.append(full(parameters))
    return runs


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_run_that_goes_through_its_state_tensors_goes_on_bit_for_bit(config: OptimizerConfig, before: int) -> None:
    for uninterrupted, resumed in run_ranks(resumed_on_ranks, 2, config, before):
        assert [name for name in PARAMETERS if not torch.equal(uninterrupted[name], resumed[name])] == []


class CountsInGroups(torch.optim.Optimizer):
    """apex's FusedAdam in what a checkpoint sees of it: a group has the number of its steps, from the first one on."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for shard in group["params"]:
                state, (first, second) = self.state[shard], group["betas"]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(shard), "exp_avg_sq": torch.zeros_like(shard)}
                state["exp_avg"].lerp_(shard.grad, 1.0 - first)
                state["exp_avg_sq"].lerp_(shard.grad.square(), 1.0 - second)
                mean, square = (state[name] / (1.0 - beta ** group["step"])
                                for name, beta in (("exp_avg", first), ("exp_avg_sq", second)))
                shard.mul_(1.0 - group["lr"] * group["weight_decay"])
                shard.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))


def apex_like(groups: list[dict[str, Any]], config: OptimizerConfig) -> tuple[torch.optim.Optimizer, str]:
    return CountsInGroups(groups, {"lr": 0.0, "betas": (config.adam_beta1, config.adam_beta2)}), "apex"


@pytest.mark.parametrize("before", [0, 1, 3])
def test_an_optimizer_that_counts_in_its_groups_goes_on_too(before: int) -> None:
    parameters = {name: nn.Parameter(whole(name, -1)) for name in PARAMETERS}
    plain, expected = reference(ADAM)
    with mock.patch.object(build, "_build", apex_like):
        optimizer = ShardedOptimizer(parameters.items(), RunConfig(optimizer=ADAM))
        for step in range(len(RATES)):
            if step == before:
                saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors(before).items()}
                optimizer = ShardedOptimizer(parameters.items(), RunConfig(optimizer=ADAM))
                for name, target in optimizer.state_tensors(before).items():
                    target.copy_(saved[name])
            step_both(optimizer, parameters, expected, plain, step)
    assert_close(parameters, plain, atol=3e-7)


def with_void_steps(rank: int, ranks: int, config: OptimizerConfig) -> list[dict[str, torch.Tensor]]:
    """Weights and state after the same steps, alone and with steps between whose gradients are no numbers."""
    runs = []
    for void_before in ((), (0, 3)):
        parameters = sharded_parameters(ranks)
        optimizer = ShardedOptimizer(parameters.items(), RunConfig(model=MODEL, optimizer=config))
        for step, rate in enumerate(RATES):
            for void in (True, False) if step in void_before else (False,):
                set_gradients(parameters, step)
                for parameter in parameters.values() if void else ():
                    local_gradient(parameter)[0] = math.nan
                optimizer.step(0.1 if void else rate, torch.tensor(void))
        steps = {name: state["step"] for name, state in enumerate(
            state for group in dict.fromkeys(optimizer._optimizers.values()) for state in group.state.values())
            if "step" in state}
        runs.append(full({**parameters, **{f"step of {name}": step for name, step in steps.items()},
                          **optimizer.state_tensors(len(RATES))}))
    return runs


@pytest.mark.parametrize("config", [ADAM, SGD, MUON], ids=["adam", "sgd", "muon"])
def test_a_void_step_changes_no_bit_of_weights_moments_and_counts(config: OptimizerConfig) -> None:
    for alone, with_void in run_ranks(with_void_steps, 2, config):
        assert alone.keys() == with_void.keys()
        assert any(name.startswith("step") for name in alone) == (config is not SGD)
        assert [name for name in alone if not torch.equal(alone[name], with_void[name])] == []


def test_reading_the_state_does_not_disturb_the_run() -> None:
    runs = []
    for reads in (False, True):
        parameters = {name: nn.Parameter(whole(name, -1)) for name in PARAMETERS}
        optimizer = ShardedOptimizer(parameters.items(), RunConfig(optimizer=ADAM))
        for step, rate in enumerate(RATES):
            if reads:
                optimizer.state_tensors(step)
            set_gradients(parameters, step)
            optimizer.step(rate)
        runs.append(full(parameters))
    assert [name for name in PARAMETERS if not torch.equal(runs[0][name], runs[1][name])] == []


def test_updates_that_were_left_out_are_not_counted() -> None:
    """Three steps of which one overflowed: the bias correction is that of two updates."""
    parameters = {name: nn.Parameter(whole(name, -1)) for name in PARAMETERS}
    optimizer = ShardedOptimizer(parameters.items(), RunConfig(optimizer=ADAM))
    plain, expected = reference(ADAM)
    for step in (0, 2, 3):
        if step == 3:
            optimizer.state_tensors(steps_taken=2)
        step_both(optimizer, parameters, expected, plain, step)
    assert_close(parameters, plain, atol=1e-7)


@pytest.mark.parametrize(("name", "shape", "wanted"), [
    ("layers.0.attention.qkv.weight", (8, 4), True), ("embedding.word.weight", (8, 4), True),
    ("embedding.position.weight", (8, 4), True), ("head.weight", (8, 4), True),
    ("layers.0.attention.qkv.bias", (8,), False), ("layers.0.attention_norm.weight", (4,), False),
    ("final_norm.weight", (4,), False), ("final_norm.bias", (4,), False),
])
def test_matrices_decay_and_vectors_do_not(name: str, shape: tuple[int, ...], wanted: bool) -> None:
    assert decays(name, nn.Parameter(torch.zeros(shape))) is wanted


def test_decay_is_decoupled_and_scaled_by_the_rate() -> None:
    """With gradients of zero a matrix shrinks by 1 - rate x decay, and a vector stays."""
    parameters = {name: nn.Parameter(whole(name, -1)) for name in PARAMETERS}
    optimizer = ShardedOptimizer(parameters.items(), RunConfig(optimizer=ADAM))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for name, parameter in parameters.items():
        factor = 1.0 - 0.5 * 0.1 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), whole(name, -1) * factor, rtol=1e-6, atol=0.0)


def test_a_gradient_of_another_precision_is_taken_in_that_of_the_weight() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float32))
    optimizer = ShardedOptimizer([("a.bias", parameter)], RunConfig(optimizer=SGD))
    parameter.grad = torch.tensor([1.0, -1.0])
    optimizer.step(0.25)
    assert parameter.tolist() == [0.75, 2.25]


def test_the_description_says_which_implementation_runs() -> None:
    parameter = [("a.weight", nn.Parameter(torch.zeros(2, 2)))]
    assert ShardedOptimizer(parameter, RunConfig(optimizer=ADAM)).description == "torch fused AdamW"
    assert ShardedOptimizer(parameter, RunConfig(optimizer=SGD)).description == "torch SGD"
