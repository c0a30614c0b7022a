"""The arms: what each changes of the shared settings, and how many steps its budget buys.

    N   steps of the dense run
    D   its FLOPs
    C   FLOPs of N steps of random-LTD whose kept length grows so that a third of the layer tokens is saved: the claim

Every other arm spends C, or reads the raw tokens of N steps, or both; one more arm of random-LTD spends D. LayerDrop
spends C in expectation. FLOPs are those of the runs' own accounting: attention's quadratic term and head included.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # to run from a checkout that is not installed

from examples.experiments.compute_saving.editions import Edition
from megatron_ltd.config import RunConfig
from megatron_ltd.model.flops import head_flops
from megatron_ltd.plan.derived import global_batch_size, layer_tokens, policies
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.settings.cli import parse_run_config

Flags = tuple[str, ...]

SAVED_LAYER_TOKENS = 1 / 3
PUBLISHED_GROWTH = 0.54
"""Steps until the full length over all steps, in the published runs of GPT-3 1.3B (random-LTD, arXiv 2212.03597)."""
PUBLISHED_CURRICULUM = 0.3
"""The same of their sequence curriculum."""


@dataclass(frozen=True)
class Arm:
    """A way to spend a budget: flags beyond the shared ones, and the number of steps."""

    name: str
    title: str
    flags: Flags
    steps: int


class Budget:
    """Turns FLOPs into steps, by the accounting of the runs themselves."""

    def __init__(self, edition: Edition):
        self.edition = edition

    def config(self, flags: Flags, steps: int) -> RunConfig:
        words = ["--config", str(self.edition.config), *flags, "--train-iters", str(steps), "--vocab-size",
                 str(self.edition.vocab_size), "--mock-data"]
        return parse_run_config(words)[0]

    def flops(self, flags: Flags, steps: int) -> int:
        """Forward and backward FLOPs of a run."""
        return run_flops(self.config(flags, steps), steps)

    def steps_for(self, flags_of: Callable[[int], Flags], flops: int) -> int:
        """The number of steps whose FLOPs come closest, for flags that depend on it."""
        low, high = 1, 2
        while self.flops(flags_of(high), high) < flops:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.flops(flags_of(middle), middle) < flops else (low, middle)
        return min(low, high, key=lambda steps: abs(self.flops(flags_of(steps), steps) - flops))


def run_flops(config: RunConfig, steps: int) -> int:
    """FLOPs of the first `steps` steps on one process."""
    plans = Counter(policies(config).plan(step) for step in range(steps))
    return global_batch_size(config, 1) * sum(count * step_flops(config, plan) for plan, count in plans.items())


def arms(edition: Edition, share: float = 1.0) -> dict[str, Arm]:
    """All arms of an edition, or of one with `share` of its budget."""
    budget, steps = Budget(edition), max(4, round(edition.steps * share))
    linear = _linear(edition, _steps_until_full(budget, steps))
    claim, dense = budget.flops(linear, steps), budget.flops((), steps)
    halved = ("--token-drop-policy", "importance")

    def published(n: int) -> Flags:
        return _linear(edition, max(1, round(PUBLISHED_GROWTH * n)))

    def shortened(n: int) -> Flags:
        return _curriculum(edition, n)

    found = [
        Arm("dense", "dense", (), steps),
        Arm("dense_cut", "dense, fewer steps", (), budget.steps_for(lambda n: (), claim)),
        Arm("ltd", "random-LTD, 1/3 saved", linear, steps),
        Arm("ltd_published", "random-LTD, published growth", published(steps), steps),
        Arm("ltd_long", "random-LTD, dense's FLOPs", *_solved(budget, published, dense)),
        Arm("ltd_two_stages", "random-LTD, 1/3 saved, two stages", _two_stages(budget, steps, linear), steps),
        Arm("token_drop", "Token Dropping", halved, budget.steps_for(lambda n: halved, claim)),
        Arm("layer_drop", "LayerDrop", _layer_drop(budget, steps, claim), steps),
        Arm("curriculum", "sequence curriculum", *_solved(budget, shortened, claim)),
        Arm("curriculum_ltd", "curriculum + random-LTD",
            *_solved(budget, lambda n: (*shortened(n), *published(n)), claim)),
    ]
    return {arm.name: arm for arm in found}


def _solved(budget: Budget, flags_of: Callable[[int], Flags], flops: int) -> tuple[Flags, int]:
    steps = budget.steps_for(flags_of, flops)
    return flags_of(steps), steps


def _linear(edition: Edition, growth_steps: int) -> Flags:
    return ("--random-ltd", "--random-ltd-start-length", str(edition.start_tokens), "--random-ltd-steps",
            str(growth_steps), "--layer-token-lr")


def _steps_until_full(budget: Budget, steps: int) -> int:
    """Growth steps with which `steps` steps save a third of the layer tokens."""
    def saved(growth_steps: int) -> float:
        config = budget.config(_linear(budget.edition, growth_steps), steps)
        full = steps * global_batch_size(config, 1) * config.model.seq_length * config.model.num_layers
        return 1.0 - layer_tokens(config, 1).sum_after(steps) / full

    if saved(2 * steps) < SAVED_LAYER_TOKENS:
        raise SystemExit(f"{budget.edition.config}: no growth from {budget.edition.start_tokens} tokens saves a third "
                         "of the layer tokens; use more layers or a smaller start")
    return min(range(1, 2 * steps), key=lambda growth_steps: abs(saved(growth_steps) - SAVED_LAYER_TOKENS))


def _two_stages(budget: Budget, steps: int, linear: Flags) -> Flags:
    """The start length and then the full one, with the FLOPs of `linear`."""
    start, sequence = budget.edition.start_tokens, budget.config((), steps).model.seq_length

    def flags(switch: int) -> Flags:
        return ("--random-ltd", "--random-ltd-length-list", f"0:{start},{switch}:{sequence}", "--layer-token-lr")

    aim = budget.flops(linear, steps)
    return flags(min(range(1, steps), key=lambda switch: abs(budget.flops(flags(switch), steps) - aim)))


def _layer_drop(budget: Budget, steps: int, flops: int) -> Flags:
    """The rate at which `steps` steps are expected to cost so much; what a run costs varies with its draws."""
    config = budget.config((), steps)
    dense = budget.flops((), steps)
    of_layers = dense - 3 * head_flops(config.model) * steps * global_batch_size(config, 1)
    return ("--layer-drop-rate", f"{(dense - flops) / of_layers:.4f}")


def _curriculum(edition: Edition, steps: int) -> Flags:
    return ("--seq-length-curriculum-start-length", str(edition.start_tokens), "--seq-length-curriculum-steps",
            str(max(1, round(PUBLISHED_CURRICULUM * steps))), "--seq-length-curriculum-length-step",
            str(edition.length_step))
