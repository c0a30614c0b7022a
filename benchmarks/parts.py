"""Where the time of a step goes: marks at the seams of the model, in the forward and in the backward pass."""

import time
from typing import Any

import torch

PARTS = ("embedding", "layers", "head and loss", "clipping", "optimizer")


class StepClock:
    """Notes when a step passes named points; on a GPU, when the stream does."""

    def __init__(self, device: torch.device, clock: str = "wall"):
        self._cuda = device.type == "cuda"
        self._now = time.process_time if clock == "cpu" else time.perf_counter
        self._marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = self._now()

    def seconds(self, start: str, end: str) -> float:
        """Time between two marks of the last step."""
        if self._cuda:
            torch.cuda.synchronize()
            return float(self._marks[start].elapsed_time(self._marks[end])) / 1000.0
        return float(self._marks[end] - self._marks[start])

    def parts(self) -> dict[str, float]:
        """Seconds of each of `PARTS`: the marks are set by a step that `benchmarks.ours` has wired up.

        The head's gradients are formed in its forward pass, so it is one stretch of time; embedding and layers have
        one in each direction.
        """
        return {
            "embedding": self.seconds("start", "embedded") + self.seconds("embedded backward", "gradients"),
            "layers": self.seconds("embedded", "stacked") + self.seconds("stacked backward", "embedded backward"),
            "head and loss": self.seconds("stacked", "stacked backward"),
            "clipping": self.seconds("gradients", "clipped"),
            "optimizer": self.seconds("clipped", "end"),
        }


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: StepClock, name: str) -> torch.Tensor:
        ctx.clock, ctx.name = clock, name
        clock.mark(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.clock.mark(f"{ctx.name} backward")
        return grad, None, None


def marked(x: torch.Tensor, clock: StepClock, name: str) -> torch.Tensor:
    """x, with the clock told when it passes and when its gradient does. Shapes: unchanged"""
    return _Mark.apply(x, clock, name)
