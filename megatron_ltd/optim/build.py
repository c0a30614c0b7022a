"""The optimizer, on the shards this process holds.

Parameters are DTensors; an optimizer's arithmetic is element-wise, so it runs on their local tensors, which share
storage with them. Any fused implementation works on those, and none pays for the dispatch of sharded tensors.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.config import OptimizerConfig
from megatron_ltd.parallel.gradients import local_gradient


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and embeddings decay; biases and norm weights, which are vectors, do not (as in Megatron-LM)."""
    return parameter.dim() > 1 and not name.endswith("bias")


class ShardedOptimizer:
    """AdamW or SGD over the local shards of named parameters.

    Args:
        named_parameters: global names and parameters; every gradient is set when `step` is called.
        config: hyperparameters; the learning rate is given at each step.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig):
        self.names, self.parameters = [], []
        for name, parameter in named_parameters:
            self.names.append(name)
            self.parameters.append(parameter)
        self._shards = [_local_leaf(parameter) for parameter in self.parameters]
        decay = [decays(name, p) for name, p in zip(self.names, self.parameters, strict=True)]
        groups = [{"params": [s for s, d in zip(self._shards, decay, strict=True) if d is wanted],
                   "weight_decay": config.weight_decay if wanted else 0.0} for wanted in (True, False)]
        self._optimizer, self.description = _build([group for group in groups if group["params"]], config)
        self.moments = ("momentum_buffer",) if config.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")

    def step(self, learning_rate: float) -> None:
        """One update with the gradients that the parameters hold."""
        for shard, parameter in zip(self._shards, self.parameters, strict=True):
            shard.grad = local_gradient(parameter).to(shard.dtype)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    def zero_grad(self) -> None:
        for shard, parameter in zip(self._shards, self.parameters, strict=True):
            shard.grad, parameter.grad = None, None

    def state_tensors(self, steps_taken: int) -> dict[str, torch.Tensor]:
        """The moments as tensors sharded like their parameters, by `<moment>.<parameter name>`; made (as zeros) where
        no step has been taken yet, so that a checkpoint can be read into them.

        Args:
            steps_taken: updates so far, which AdamW's bias correction counts.
        """
        tensors = {}
        for name, parameter, shard in zip(self.names, self.parameters, self._shards, strict=True):
            state = self._optimizer.state[shard]
            for moment in self.moments:
                if moment not in state or state[moment] is None:
                    state[moment] = torch.zeros_like(shard)
                tensors[f"{moment}.{name}"] = _sharded_like(state[moment], parameter)
        self._set_steps(steps_taken)
        return tensors

    def _set_steps(self, steps_taken: int) -> None:
        if "exp_avg" not in self.moments:
            return
        for group in self._optimizer.param_groups:
            if "step" in group:  # apex counts in the group
                group["step"] = steps_taken
        for shard in self._shards:
            self._optimizer.state[shard]["step"] = torch.tensor(float(steps_taken), device=shard.device)


def _local_leaf(parameter: nn.Parameter) -> torch.Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.detach()


def _sharded_like(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return tensor
    return DTensor.from_local(tensor, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())


def _build(groups: Sequence[dict], config: OptimizerConfig) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and a line that says which implementation runs."""
    lr = config.lr if config.lr is not None else 0.0
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9), "torch SGD"
    betas = (config.adam_beta1, config.adam_beta2)
    fused = apex_fused_adam()
    if fused is not None and all(shard.is_cuda for group in groups for shard in group["params"]):
        return fused(groups, lr=lr, betas=betas, eps=config.adam_eps, adam_w_mode=True), "apex FusedAdam"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.adam_eps, fused=True), "torch fused AdamW"


def apex_fused_adam() -> type | None:
    """NVIDIA apex's FusedAdam where it is installed with its CUDA kernels, or None. The package of the same name on
    PyPI is something else, and has no `amp_C`."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam
