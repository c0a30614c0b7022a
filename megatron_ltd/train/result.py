"""The result of a step, on its way from the device, and of an evaluation."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.token_drop.plan import StepPlan


class StepResult:
    """The result of a step, the same on every process.

    Whoever launches a step goes on without it; the first number that is read waits for the step to end, and for none
    that was launched after it.

    Args:
        losses: means over the global batch, before the update: of the predicted tokens' cross-entropy and, for models
            with that head, of the sentence order's, or the z-loss.
        norm: of the gradients, before clipping.
        void: whether something was not finite, so that the update was skipped.
        stop_level: the highest `stop_level` of any process, known to the host.
        own_part: sums of the losses on this process, zeros if it has none; read only after a fault.
        told: by each process, where numbers were asked for.
        met_at: time of this host's clock when all processes had met.
        z_loss: whether the second loss is the z-loss, which the gradient contains and `loss` does not.

    Shapes:
        losses [1 or 2], norm scalar, void scalar bool
    """

    def __init__(self, losses: torch.Tensor, norm: torch.Tensor, void: torch.Tensor, stop_level: int,
                 own_part: torch.Tensor, *, z_loss: bool = False, told: Sequence[Sequence[float]] = (),
                 met_at: float = 0.0):
        self.told, self.met_at = told, met_at
        self.void, self.stop_level, self._own_part, self._has_z_loss = void, stop_level, own_part, z_loss
        numbers = torch.cat((losses.double(), norm.double()[None], void.double()[None]))
        on_gpu = numbers.is_cuda
        # To pinned memory, since any other copy would wait for all that has been launched.
        self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True) if on_gpu else numbers
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._numbers.copy_(numbers, non_blocking=True)
            self._event.record()
        self._finished = time.monotonic()

    def _read(self) -> list[float]:
        """The losses, the norm, and whether the step was void."""
        if self._event is not None:
            self._event.synchronize()
            self._event, self._finished = None, time.monotonic()
        numbers: list[float] = self._numbers.tolist()
        return numbers

    @property
    def finished(self) -> float:
        """When the step ended, by the monotonic clock; not earlier than the host could know."""
        self._read()
        return self._finished

    @property
    def loss(self) -> float:
        return self._read()[0]

    @property
    def sentence_order_loss(self) -> float | None:
        """None for models without that head."""
        return self._read()[1] if len(self._numbers) == 4 and not self._has_z_loss else None

    @property
    def z_loss(self) -> float | None:
        """None without --z-loss-coeff."""
        return self._read()[1] if self._has_z_loss else None

    @property
    def gradient_norm(self) -> float:
        return self._read()[-2]

    @property
    def updated(self) -> bool:
        return not self._read()[-1]

    @property
    def own_part_is_finite(self) -> bool:
        """Whether what this process contributed to the losses is finite."""
        return bool(self._own_part.isfinite().all())


@dataclass(frozen=True)
class Launched:
    """A step that the device may still be computing, and what the host knows of it.

    Args:
        consumed: by the end of it.
        loss_scale: of fp16, on the device; 1 otherwise.
        started: when the host began it, by the monotonic clock.
    """

    result: StepResult
    consumed: Consumed
    plan: StepPlan
    samples: int
    rate: float
    decoupled: float | None
    loss_scale: float | torch.Tensor
    started: float

    @property
    def step(self) -> int:
        return self.consumed.steps


@dataclass(frozen=True)
class HeldOut:
    """Metrics of a model on held-out samples.

    Args:
        loss: mean cross-entropy of the predicted tokens.
        sentence_order_loss: mean cross-entropy of the sentence order; None for models without that head.
        top1, top5: shares of images whose class is the most probable, or among the five most probable; None for other
            models.
    """

    loss: float
    sentence_order_loss: float | None = None
    top1: float | None = None
    top5: float | None = None


def mean_of(found: Sequence[HeldOut]) -> HeldOut:
    """The mean over sets of each metric that all of them have."""
    means: dict[str, Any] = {}
    for entry in fields(HeldOut):
        values = [getattr(each, entry.name) for each in found]
        means[entry.name] = None if None in values else sum(values) / len(values)
    return HeldOut(**means)
