"""The arms: what each changes of the shared settings, and how many steps its budget buys.

    N   steps of the dense run
    D   its FLOPs
    C   FLOPs of N steps of random-LTD whose kept length grows so that a third of the layer tokens is saved: the claim

Every other arm spends C, or reads the raw tokens of N steps, or both; one more arm of random-LTD spends D. LayerDrop
spends C in expectation. FLOPs are those of the runs' own accounting: attention's quadratic term and head included.
"""

from collections.abc import Callable

from examples.experiments.budget import Arm, Budget, Flags, layer_drop, linear_growth, steps_until_full, two_stages
from examples.experiments.compute_saving.editions import Edition

PUBLISHED_GROWTH = 0.54
"""Steps until the full length over all steps, in the published runs of GPT-3 1.3B (random-LTD, arXiv 2212.03597)."""
PUBLISHED_CURRICULUM = 0.3
"""The same of their sequence curriculum."""


def budget_of(edition: Edition) -> Budget:
    return Budget(edition.config, edition.vocab_size)


def arms(edition: Edition, share: float = 1.0) -> dict[str, Arm]:
    """All arms of an edition, or of one with `share` of its budget."""
    budget, steps, start = budget_of(edition), max(4, round(edition.steps * share)), edition.start_tokens
    linear = linear_growth(start, steps_until_full(budget, start, steps))
    claim, dense = budget.flops(linear, steps), budget.flops((), steps)
    halved = ("--token-drop-policy", "importance")

    def published(n: int) -> Flags:
        return linear_growth(start, max(1, round(PUBLISHED_GROWTH * n)))

    def shortened(n: int) -> Flags:
        return _curriculum(edition, n)

    found = [
        Arm("dense", "dense", (), steps),
        Arm("dense_cut", "dense, fewer steps", (), budget.steps_for(lambda n: (), claim)),
        Arm("ltd", "random-LTD, 1/3 saved", linear, steps),
        Arm("ltd_published", "random-LTD, published growth", published(steps), steps),
        Arm("ltd_long", "random-LTD, dense's FLOPs", *_solved(budget, published, dense)),
        Arm("ltd_two_stages", "random-LTD, 1/3 saved, two stages", two_stages(budget, start, steps, claim),
            steps),
        Arm("token_drop", "Token Dropping", halved, budget.steps_for(lambda n: halved, claim)),
        Arm("layer_drop", "LayerDrop", layer_drop(budget, steps, claim), steps),
        Arm("curriculum", "sequence curriculum", *_solved(budget, shortened, claim)),
        Arm("curriculum_ltd", "curriculum + random-LTD",
            *_solved(budget, lambda n: (*shortened(n), *published(n)), claim)),
    ]
    return {arm.name: arm for arm in found}


def _solved(budget: Budget, flags_of: Callable[[int], Flags], flops: int) -> tuple[Flags, int]:
    steps = budget.steps_for(flags_of, flops)
    return flags_of(steps), steps


def _curriculum(edition: Edition, steps: int) -> Flags:
    return ("--seq-length-curriculum-start-length", str(edition.start_tokens), "--seq-length-curriculum-steps",
            str(max(1, round(PUBLISHED_CURRICULUM * steps))), "--seq-length-curriculum-length-step",
            str(edition.length_step))
