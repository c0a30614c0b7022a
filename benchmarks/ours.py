"""Our training step as users run it, and the oracle it is held against.

The oracle is the same model with the middle layers run on one contiguous slice of k tokens: one slice after the first
layer and one concatenation before the last, with no selection, gather or add. No token dropping can cost less.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.parts import PARTS, StepClock, marked
from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.attention.context import ContextMaker
from megatron_ltd.model.stack import Stack
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.layers import local
from megatron_ltd.plan.derived import policies
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.setup import Model, build_model
from megatron_ltd.train.step import train_step

_BATCHES = 4
_FP16_SCALE = 1024.0


def random_batches(config: RunConfig, microbatches: int = 1) -> list[list[dict[str, torch.Tensor]]]:
    """The microbatches of a few steps, as the loader would give them."""
    model, samples = config.model, config.training.micro_batch_size
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    steps = []
    for step in range(_BATCHES):
        batch = []
        for number in range(microbatches):
            text = torch.randint(model.vocab_size, (samples, model.seq_length + 1), generator=generator)
            first = (step * microbatches + number) * samples
            batch.append({"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(),
                          "loss_mask": torch.ones(samples, model.seq_length),
                          "sample_ids": torch.arange(first, first + samples)})
        steps.append(batch)
    return steps


class OurModel:
    """One model and its optimizer, which take dense, dropped and oracle steps in turn.

    Args:
        batches: the microbatches of some steps, which are taken in turn; default: random text.
        on_device: make the weights on the device, in seconds where drawing those of a run takes minutes.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, microbatches: int = 1,
                 batches: list[list[dict[str, torch.Tensor]]] | None = None, on_device: bool = False):
        self.config, self.runtime = config, runtime
        self.model = build_model(config, runtime.mesh, runtime.device, draw=not on_device)
        if on_device:
            _fill(self.model)
        self.optimizer = ShardedOptimizer([(p.name, p.parameter) for p in self.model.parameters], config)
        self._batches = random_batches(config, microbatches) if batches is None else batches
        self._steps = 0

    def step(self, kept_tokens: int) -> float:
        """One training step in which dropped layers keep so many tokens; its loss."""
        return self.step_of(policies(self.config).keeping(kept_tokens))

    def step_of(self, plan: StepPlan) -> float:
        """One training step of this plan; its loss."""
        batch = self._batches[self._steps % len(self._batches)]
        self._steps += 1
        result = train_step(self.model, self.optimizer, batch, self.config, plan, learning_rate=1e-4,
                            loss_scale=_FP16_SCALE if self.config.training.fp16 else 1.0, stop_level=0,
                            device=self.runtime.device)
        return result.loss

    def oracle_step(self, kept_tokens: int) -> float:
        """One training step in which the middle layers see the first `kept_tokens` tokens."""
        with _oracle_stack(self.model.stages[0].stack, kept_tokens):
            return self.step(self.config.model.seq_length)

    def timed_parts(self, kept_tokens: int, clock: str = "wall", steps: int = 3) -> dict[str, float]:
        """Seconds of each part of a step, the median of a few.

        Args:
            clock: "wall", or "cpu" for the time the process ran.
        """
        found = []
        marks = StepClock(self.runtime.device, clock)
        with _wired(self, marks):
            for _ in range(steps):
                marks.mark("start")
                self.step(kept_tokens)
                marks.mark("end")
                found.append(marks.parts())
        return {part: statistics.median(seconds[part] for seconds in found) for part in PARTS}


@torch.no_grad()
def _fill(model: Model) -> None:
    """Weights of the usual sizes, whatever their values."""
    torch.manual_seed(0)
    for named in model.parameters:
        weight = local(named.parameter)
        if named.name.endswith("norm.weight"):
            weight.fill_(1.0)
        elif named.name.endswith("bias"):
            weight.zero_()
        else:
            weight.normal_(0.0, 0.02)


@contextmanager
def _oracle_stack(stack: Stack, kept_tokens: int) -> Iterator[None]:
    first, *middle, last = stack.blocks.values()

    def forward(stream: torch.Tensor, contexts: ContextMaker, *rest: Any) -> torch.Tensor:
        full = contexts.whole
        stream = stream + first(stream, full)
        kept = stream[:kept_tokens]
        for block in middle:
            kept = kept + block(kept, full)
        stream = torch.cat((kept, stream[kept_tokens:]))
        return stream + last(stream, full)

    with _replaced(stack, "forward", forward):
        yield


@contextmanager
def _wired(ours: OurModel, clock: StepClock) -> Iterator[None]:
    """Marks at the seams of a step."""
    (stage,) = ours.model.stages
    assert stage.embedding is not None
    finish, update = ours.model.finish_gradients, ours.optimizer.step

    def finish_gradients(plan: StepPlan) -> None:
        clock.mark("gradients")
        finish(plan)

    def optimizer_step(*of_step: Any) -> None:
        clock.mark("clipped")
        update(*of_step)

    hooks = [stage.embedding.register_forward_hook(lambda module, inputs, out: marked(out, clock, "embedded")),
             stage.stack.register_forward_hook(lambda module, inputs, out: marked(out, clock, "stacked"))]
    with _replaced(ours.model, "finish_gradients", finish_gradients), \
            _replaced(ours.optimizer, "step", optimizer_step):
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A method of one object replaced for a while."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
