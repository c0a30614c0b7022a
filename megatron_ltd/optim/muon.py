"""Muon (https://kellerjordan.github.io/posts/muon/) for the layers' matrices, on any parallel layout.

    m <- b m + (1 - b) g                        momentum b, gradient g
    u  = b m + (1 - b) g                        with Nesterov's momentum; else u = m
    w <- (1 - lr d) w - lr s NS(u)              weight decay d, scale s by the shape of the matrix

NS is a Newton-Schulz iteration: NS(u) has the singular vectors of u and singular values near 1. It needs whole
matrices; everything else is element-wise and runs on shards. Each matrix is gathered on one process, which returns the
shards of the result: two collectives a step, with the iterations spread evenly over the processes.

Formulas, coefficients and defaults are those of `torch.optim.Muon`, except for the scale. The default here is
`match_rms_adamw`: updates have the root mean square of AdamW's, so that one learning rate serves both
(https://arxiv.org/abs/2502.16982, section 2.2).

torch iterates in bf16, which amplifies rounding: gradients that differ by 1e-7, as between two layouts, give updates
that differ by up to 1e-2. In fp32 they differ by 1e-6 to 1e-5. So, unless --muon-precision is given, runs in fp32
iterate in fp32, and runs in half precision in bf16.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.config.training import OptimizerConfig
from megatron_ltd.parallel.owners import Owners

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM = 1e-7


def orthogonalized(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The matrix with its singular values brought close to 1 by Newton-Schulz iterations, in its own dtype.

    Shapes:
        [o, i] -> [o, i]
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix  # so that the Gram matrix is the smaller one
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def update_scale(mode: str, rows: int, columns: int) -> float:
    """The factor on an orthogonalised update, besides the learning rate. `match_rms_adamw` is torch's name,
    the others are Megatron-LM's; torch calls `shape_scaling` `original`."""
    if mode == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if mode == "spectral":
        return math.sqrt(max(rows, columns))
    if mode == "shape_scaling":
        return math.sqrt(max(1.0, rows / columns))
    assert mode == "unit_rms_norm", mode
    return math.sqrt(rows / columns)


class Muon(torch.optim.Optimizer):
    """Muon on the local shards of matrices.

    Args:
        parameters: the matrices.
        shards: the local shard of each; their gradients are set when `step` is called.
        rows: of each parameter. One number for a single matrix; several for fused matrices whose rows alternate in
            blocks of these sizes, such as query, key and value.
        dtype: of the Newton-Schulz iterations.
        rate_factor: on the learning rate; what weight decay takes away in a step does not depend on it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], shards: Sequence[torch.Tensor],
                 rows: Sequence[tuple[int, ...]], config: OptimizerConfig, dtype: torch.dtype,
                 rate_factor: float = 1.0):
        super().__init__(shards, {"lr": 0.0, "weight_decay": config.weight_decay / rate_factor,
                                  "rate_factor": rate_factor})
        self._config, self._rows, self._dtype = config, rows, dtype
        matrices = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        assert len(matrices) == len(parameters), "parameters know their placement"
        self._owners = Owners(matrices, [_iteration_cost(matrix.shape, sizes)
                                         for matrix, sizes in zip(matrices, rows, strict=True)])

    found_inf: torch.Tensor | None = None
    """As in torch's fused optimizers: where it is 1, a step changes nothing."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Apply one update with the gradients stored on the shards. Every process of the run must call it."""
        (group,) = self.param_groups
        shards, learning_rate = group["params"], group["lr"]
        updates = [self._momentum(shard) for shard in shards]
        whole = self._owners.gather([update.to(self._dtype) for update in updates])
        for number, update in whole.items():
            whole[number] = self._direction(update, self._rows[number])
        self._owners.scatter(whole, updates)
        for shard, direction in zip(shards, updates, strict=True):
            new = (shard * (1.0 - learning_rate * group["weight_decay"])).sub_(direction, alpha=learning_rate)
            shard.copy_(self._unless_void(new, shard))

    def _momentum(self, shard: torch.Tensor) -> torch.Tensor:
        """The update before orthogonalisation, as a new tensor."""
        state, momentum = self.state[shard], self._config.muon_momentum
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(shard)
        gradient = shard.grad
        assert gradient is not None
        gradient = self._unless_void(gradient, state["momentum_buffer"])
        average = state["momentum_buffer"].lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(average, momentum) if self._config.muon_nesterov else average.clone()

    def _unless_void(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf > 0, old, new)

    def _direction(self, update: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
        """The update, orthogonalised and scaled, in fp32. Shapes: [o, i] -> [o, i]"""
        blocks = update.unflatten(0, (-1, sum(rows)))
        direction = torch.empty_like(blocks, dtype=torch.float32)
        for part, target in zip(blocks.split(rows, dim=1), direction.split(rows, dim=1), strict=True):
            matrix = part.flatten(0, 1)
            scale = update_scale(self._config.muon_scale_mode, *matrix.shape) * self._config.muon_extra_scale_factor
            target.copy_(orthogonalized(matrix, self._config.muon_num_ns_steps).view(target.shape)).mul_(scale)
        return direction.flatten(0, 1)


def _iteration_cost(shape: torch.Size, rows: tuple[int, ...]) -> float:
    """Multiplications of one Newton-Schulz iteration, up to a factor."""
    blocks, columns = shape[0] // sum(rows), shape[1]
    return sum(min(blocks * count, columns) ** 2 * max(blocks * count, columns) for count in rows)
