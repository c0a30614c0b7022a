"""The optimizer, on the local shards.

Parameters are DTensors; the arithmetic of AdamW and SGD is element-wise, so they run on the local tensors, which share
storage with them. Any fused implementation works on those, without the overhead of dispatching sharded tensors. Muon
needs whole matrices for one operation (`optim/muon.py`).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig
from megatron_ltd.model.arithmetic.shapes import CONVOLUTION, layer_matrices
from megatron_ltd.model.init import global_name
from megatron_ltd.optim.muon import Muon
from megatron_ltd.optim.parametrization import adam_factors, muon_factor
from megatron_ltd.parallel.data_parallel import compute_dtype
from megatron_ltd.parallel.gradients import local_gradient
from megatron_ltd.parallel.layers import local
from megatron_ltd.plan.derived import muon_precision

_DECOUPLED = ("embedding.word.weight", "head.weight")
"""The parameters of --decoupled-lr, as in megatron-core: not those of learned positions."""
_OF_TORCH = Muon | torch.optim.AdamW | torch.optim.SGD
"""All but apex's."""


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and embeddings decay; biases and norm weights, which are vectors, do not (as in Megatron-LM), nor do the
    weights of convolutions, which are vectors as well, one for each distance."""
    return parameter.dim() > 1 and not name.endswith(("bias", CONVOLUTION))


class ShardedOptimizer:
    """AdamW, SGD, or Muon and AdamW, over the local shards of named parameters.

    Args:
        named_parameters: global names and parameters; every gradient is set when `step` is called.
        config: of the run; the learning rate is passed to each step.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: RunConfig):
        self._parameters = dict(named_parameters)
        self._shards = {name: local(parameter).detach() for name, parameter in self._parameters.items()}
        matrices = _muon_matrices(self._parameters, config) if config.optimizer.optimizer == "muon" else {}
        others = [name for name in self._parameters if name not in matrices]
        optimizer, self.description = _build(self._groups(others, config), config.optimizer)
        self._optimizers: dict[str, torch.optim.Optimizer] = dict.fromkeys(others, optimizer)
        if matrices:
            precision = muon_precision(config)
            muon = Muon([self._parameters[name] for name in matrices], [self._shards[name] for name in matrices],
                        list(matrices.values()), config.optimizer, compute_dtype(precision),
                        muon_factor(config.model, config.optimizer.muon_scale_mode))
            self._optimizers |= dict.fromkeys(matrices, muon)
            self.description = f"Muon in {precision} for the layers' matrices, {self.description} for the rest"

    def _groups(self, names: Sequence[str], config: RunConfig) -> list[dict]:
        """Parameters by weight decay, factor on the learning rate, AdamW's epsilon, and whether --decoupled-lr is
        theirs; those that decay first."""
        groups: dict[tuple[float, float, float, bool], list[torch.Tensor]] = {}
        for name in names:
            known_as = global_name(name, config.model)
            in_layer = known_as.startswith("layers.")
            decoupled = config.optimizer.decoupled_lr is not None and known_as in _DECOUPLED
            is_matrix = decays(name, self._parameters[name])
            does_decay = is_matrix or config.optimizer.do_layernorm_bias_weight_decay
            rate, epsilon = adam_factors(config.model, in_layer, is_matrix)
            # AdamW multiplies weight decay by the learning rate, so dividing keeps what a step takes away.
            decay = config.optimizer.weight_decay / rate if does_decay else 0.0
            groups.setdefault((-decay, rate, epsilon, decoupled), []).append(self._shards[name])
        is_adam = config.optimizer.optimizer != "sgd"
        return [{"params": shards, "weight_decay": abs(decay), "rate_factor": rate,
                 "decoupled": decoupled, **({"eps": config.optimizer.adam_eps * epsilon} if is_adam else {})}
                for (decay, rate, epsilon, decoupled), shards in sorted(groups.items(), key=lambda item: item[0])]

    def step(self, learning_rate: float, void: torch.Tensor | None = None, decoupled_rate: float | None = None) -> None:
        """Apply one update with the gradients stored on the parameters.

        Args:
            void: scalar bool on the device of the parameters; where it is true, nothing changes. Only apex reads it.
            decoupled_rate: of the word embedding and the head, with --decoupled-lr.
        """
        found_inf = None if void is None else void.float()
        for name, parameter in self._parameters.items():
            shard = self._shards[name]
            shard.grad = local_gradient(parameter).to(shard.dtype)
        for optimizer in dict.fromkeys(self._optimizers.values()):
            for group in optimizer.param_groups:
                rate = decoupled_rate if group.get("decoupled") else learning_rate
                assert rate is not None, "with --decoupled-lr both rates are given"
                group["lr"] = rate * group["rate_factor"]
            if isinstance(optimizer, _OF_TORCH):
                optimizer.found_inf = found_inf  # type: ignore[union-attr]
            elif found_inf is not None and bool(found_inf):
                continue
            optimizer.step()

    def zero_grad(self) -> None:
        for name, parameter in self._parameters.items():
            self._shards[name].grad, parameter.grad = None, None

    def moments(self, name: str) -> tuple[str, ...]:
        """torch's names for the moments of a parameter."""
        return ("momentum_buffer",) if isinstance(self._optimizers[name], Muon | torch.optim.SGD) \
            else ("exp_avg", "exp_avg_sq")

    def state_tensors(self, steps_taken: int) -> dict[str, torch.Tensor]:
        """The moments as tensors sharded like their parameters, by `<moment>.<parameter name>`; created as zeros if no
        step has been taken yet, so that a checkpoint can be read into them.

        Args:
            steps_taken: updates so far, needed by AdamW's bias correction.
        """
        tensors = {}
        for name, parameter in self._parameters.items():
            shard, optimizer = self._shards[name], self._optimizers[name]
            state = optimizer.state[shard]
            for moment in self.moments(name):
                if moment not in state or state[moment] is None:
                    state[moment] = torch.zeros_like(shard)
                tensors[f"{moment}.{name}"] = _sharded_like(state[moment], parameter)
            if "exp_avg" in state:
                state["step"] = torch.tensor(float(steps_taken), device=shard.device)
        for optimizer in dict.fromkeys(self._optimizers.values()):
            if not isinstance(optimizer, _OF_TORCH):  # apex keeps the count in the group, once it has one
                for group in optimizer.param_groups:
                    group["step"] = steps_taken
        return tensors


def _muon_matrices(parameters: Mapping[str, nn.Parameter], config: RunConfig) -> dict[str, tuple[int, ...]]:
    """The parameters that Muon updates, by name, with the row counts of the matrices in each."""
    rows = {name: layer_matrices(config.model).get(".".join(name.split(".")[-3:])) for name in parameters}
    return {name: turn if config.optimizer.muon_split_qkv else (parameters[name].shape[0],)
            for name, turn in rows.items() if turn is not None}


def _sharded_like(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return tensor
    return DTensor.from_local(tensor, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())


def _build(groups: Sequence[dict], config: OptimizerConfig) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and a description of its implementation for the log."""
    lr = config.lr if config.lr is not None else 0.0
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
        for group in groups:  # torch would leave them undefined if the first update is void
            sgd.state.update((shard, {"momentum_buffer": torch.zeros_like(shard)}) for shard in group["params"])
        return sgd, "torch SGD"
    betas = (config.adam_beta1, config.adam_beta2)
    fused = apex_fused_adam()
    if fused is not None and all(shard.is_cuda for group in groups for shard in group["params"]):
        return fused(groups, lr=lr, betas=betas, eps=config.adam_eps, adam_w_mode=True), "apex FusedAdam"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.adam_eps, fused=True), "torch fused AdamW"


def apex_fused_adam() -> type | None:
    """NVIDIA apex's FusedAdam if it is installed with its CUDA kernels, else None. The PyPI package of the same name is
    unrelated and has no `amp_C`."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam
