"""What an arm costs, and schedules of dropping that cost a given amount."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.flops import head_flops
from megatron_ltd.model.arithmetic.shapes import parameter_shapes
from megatron_ltd.plan.derived import global_batch_size, layer_tokens, policies
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.settings.cli import parse_run_config

Flags = tuple[str, ...]

SAVED_LAYER_TOKENS = 1 / 3


@dataclass(frozen=True)
class Arm:
    """A way to spend a budget: flags beyond the shared ones, and the number of steps."""

    name: str
    title: str
    flags: Flags
    steps: int


@dataclass(frozen=True)
class Budget:
    """Turns FLOPs into steps, by the accounting of the runs themselves.

    Args:
        settings: the TOML file that all arms share.
        shape: what the model changes of it.
    """

    settings: Path
    vocab_size: int
    shape: Flags = ()

    def config(self, flags: Flags, steps: int) -> RunConfig:
        words = ["--config", str(self.settings), *self.shape, *flags, "--train-iters", str(steps), "--vocab-size",
                 str(self.vocab_size), "--mock-data"]
        return parse_run_config(words)[0]

    def flops(self, flags: Flags, steps: int) -> int:
        """Forward and backward FLOPs of a run."""
        return run_flops(self.config(flags, steps), steps)

    def steps_for(self, flags_of: Callable[[int], Flags], flops: int) -> int:
        """The number of steps whose FLOPs come closest, for flags that depend on it."""
        def cost(steps: int) -> int:
            return self.flops(flags_of(steps), steps)

        high = 2
        while cost(high) < flops:
            high *= 2
        return closest(range(1, high + 1), cost, flops)

    @property
    def parameters(self) -> int:
        """Parameters of the dense model, embedding included."""
        return sum(prod(shape) for shape in parameter_shapes(self.config((), 1).model).values())

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on one process."""
        config = self.config((), 1)
        return global_batch_size(config, 1) * config.model.seq_length


def closest(numbers: range, rising: Callable[[int], float], target: float) -> int:
    """The first of `numbers` at which a rising function comes closest to `target`."""
    above = min(bisect_left(numbers, target, key=rising), len(numbers) - 1)
    if above and target - rising(numbers[above - 1]) <= rising(numbers[above]) - target:
        above = bisect_left(numbers, rising(numbers[above - 1]), key=rising)
    return numbers[above]


def run_flops(config: RunConfig, steps: int) -> int:
    """FLOPs of the first `steps` steps on one process."""
    plans = Counter(policies(config).plan(step) for step in range(steps))
    return global_batch_size(config, 1) * sum(count * step_flops(config, plan) for plan, count in plans.items())


def linear_growth(start_tokens: int, growth_steps: int) -> Flags:
    """random-LTD whose kept length grows linearly, with the layer-token learning rate of its paper."""
    return ("--random-ltd", "--random-ltd-start-length", str(start_tokens), "--random-ltd-steps", str(growth_steps),
            "--layer-token-lr")


def steps_until_full(budget: Budget, start_tokens: int, steps: int) -> int:
    """Growth steps with which `steps` steps save a third of the layer tokens."""
    def saved(growth_steps: int) -> float:
        config = budget.config(linear_growth(start_tokens, growth_steps), steps)
        full = steps * global_batch_size(config, 1) * config.model.seq_length * config.model.num_layers
        return 1.0 - layer_tokens(config, 1).sum_after(steps) / full

    if saved(2 * steps) < SAVED_LAYER_TOKENS:
        raise SystemExit(f"{budget.settings}: no growth from {start_tokens} tokens saves a third "
                         "of the layer tokens; use more layers or a smaller start")
    return closest(range(1, 2 * steps), saved, SAVED_LAYER_TOKENS)


def two_stages(budget: Budget, start_tokens: int, steps: int, flops: int) -> Flags:
    """random-LTD with the start length and then the full one, for so many FLOPs."""
    sequence = budget.config((), steps).model.seq_length

    def flags(switch: int) -> Flags:
        return ("--random-ltd", "--random-ltd-length-list", f"0:{start_tokens},{switch}:{sequence}", "--layer-token-lr")

    return flags(closest(range(1, steps), lambda switch: -budget.flops(flags(switch), steps), -flops))


def layer_drop(budget: Budget, steps: int, flops: int) -> Flags:
    """The rate at which `steps` steps are expected to cost so much; what a run costs varies with its draws."""
    config = budget.config((), steps)
    dense = budget.flops((), steps)
    of_layers = dense - 3 * head_flops(config.model) * steps * global_batch_size(config, 1)
    return ("--layer-drop-rate", f"{(dense - flops) / of_layers:.4f}")
