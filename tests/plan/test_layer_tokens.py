"""Consumed samples and layer tokens in closed form, against a loop over steps and against published runs."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.layer_tokens import LayerTokens
from megatron_ltd.token_drop.policies.random_ltd import RandomLTD
from megatron_ltd.token_drop.policies.sequence_curriculum import SequenceCurriculum
from megatron_ltd.token_drop.policy import Shape
from megatron_ltd.token_drop.registry import Policies
from megatron_ltd.token_drop.schedule import KeptLength, ListedLength

BATCH_RAMPS = st.sampled_from([BatchRamp(8), BatchRamp(8, 2, 2, 70), BatchRamp(12, 4, 4, 1), BatchRamp(6, 2, 1, 300)])
SCHEDULES = st.sampled_from([KeptLength(64, 64), KeptLength(8, 64), KeptLength(8, 64, 40, 8),
                             KeptLength(5, 64, 23, 1, 2), ListedLength(((0, 8), (3, 24), (20, 64)))])

FULL = KeptLength(64, 64)


@dataclass(frozen=True)
class Case:
    """A run's schedules, and its tokens in closed form."""

    ramp: BatchRamp
    kept: KeptLength | ListedLength
    sequence: KeptLength | ListedLength
    layers: int
    dropped_layers: int

    @property
    def tokens(self) -> LayerTokens:
        shape = Shape("gpt", self.layers, max(length for _, length in self.sequence.changes()))
        return LayerTokens(self.ramp, Policies(shape, (
            SequenceCurriculum(self.sequence), RandomLTD(tuple(range(self.dropped_layers)), self.kept, 0, 1))))


def walk(tokens: Case, steps: int) -> list[int]:
    """The sum over layers after 0, 1, ... steps, step by step."""
    samples, sums = 0, [0]
    for step in range(steps):
        batch, kept, length = tokens.ramp.at(samples), tokens.kept.at(step), tokens.sequence.at(step)
        samples += batch
        sums.append(sums[-1] + batch * sum(
            length if layer >= tokens.dropped_layers else min(kept, length) for layer in range(tokens.layers)))
    return sums


@given(BATCH_RAMPS, SCHEDULES, SCHEDULES, st.integers(1, 7), st.integers(0, 90))
def test_the_sums_after_any_number_of_steps_are_those_of_a_loop(
        ramp: BatchRamp, kept: KeptLength, sequence: KeptLength, layers: int, steps: int) -> None:
    case = Case(ramp, kept, sequence, layers, max(0, layers - 2))
    tokens = case.tokens
    assert tokens.sum_after(steps) == walk(case, steps)[-1]
    assert tokens.raw_after(steps) == walk(replace(case, dropped_layers=0, layers=1), steps)[-1]


@given(BATCH_RAMPS, SCHEDULES, SCHEDULES, st.integers(1, 7), st.integers(0, 20_000))
def test_a_budget_holds_as_many_steps_as_a_loop_takes(
        ramp: BatchRamp, kept: KeptLength, sequence: KeptLength, layers: int, budget: int) -> None:
    tokens = Case(ramp, kept, sequence, layers, max(0, layers - 2)).tokens
    steps = tokens.steps_within(budget)
    assert tokens.sum_after(steps) <= budget * layers < tokens.sum_after(steps + 1)
    steps = tokens.steps_within_raw(budget)
    assert tokens.raw_after(steps) <= budget < tokens.raw_after(steps + 1)


@given(BATCH_RAMPS, SCHEDULES, st.integers(0, 90))
def test_the_stretches_within_a_number_of_steps_are_those_steps(ramp: BatchRamp, kept: KeptLength, steps: int) -> None:
    tokens = Case(ramp, kept, FULL, 4, 2).tokens
    found = [(stretch.batch_samples, stretch.plan.kept_tokens) for count, stretch in tokens.within(steps)
             for _ in range(count)]
    samples, expected = 0, []
    for step in range(steps):
        expected.append((ramp.at(samples), kept.at(step)))
        samples += ramp.at(samples)
    assert found == expected


def reference_steps(tokens: Case, budget: int) -> int:
    """Steps of Megatron-DeepSpeed until a budget is used up: the length of a step is the layer average rounded down to
    a whole number, and the step that passes the budget is the last one."""
    consumed = steps = 0
    changes = [*tokens.kept.changes(), (2**63, 0)]
    for (first, kept), (following, _) in zip(changes, changes[1:], strict=False):
        average = (tokens.sequence.at(0) * (tokens.layers - tokens.dropped_layers)
                   + kept * tokens.dropped_layers) // tokens.layers
        step_tokens = tokens.ramp.full_samples * average
        taken = min(following - first, -(-(budget - consumed) // step_tokens))
        consumed, steps = consumed + taken * step_tokens, steps + taken
        if consumed >= budget:
            break
    return steps


def published(growth_steps: int, sequence_tokens: int, batch_samples: int) -> Case:
    """The shipped runs: 24 layers of which 22 drop, from 128 tokens by 16."""
    kept = KeptLength(128, sequence_tokens, growth_steps, 16)
    return Case(BatchRamp(batch_samples), kept, KeptLength(sequence_tokens, sequence_tokens), 24, 22)


GPT_300B, GPT_200B, GPT_150B = (published(steps, 2048, 512) for steps in (200_000, 133_333, 100_000))
BERT_1049B, BERT_524B = (published(steps, 512, 1024) for steps in (2_000_000, 1_000_000))


@pytest.mark.parametrize(("tokens", "budget", "reference", "ours", "raw_billions", "without_dropping"), [
    (GPT_300B, 300 * 10**9, 372_789, 372_756, 390.9, 286_102),
    (GPT_200B, 200 * 10**9, 248_526, 248_504, 260.6, 190_734),
    (GPT_150B, 150 * 10**9, 186_395, 186_378, 195.4, 143_051),
    (BERT_1049B, 2_000_000 * 1024 * 512, 2_717_449, 2_716_146, 1424.7, 2_000_000),
    (BERT_524B, 1_000_000 * 1024 * 512, 1_358_725, 1_358_073, 712.4, 1_000_000),
], ids=["GPT 300B", "GPT 200B", "GPT 150B", "BERT 1049B", "BERT 524B"])
def test_the_published_runs_take_the_published_steps_and_raw_tokens(
        tokens: Case, budget: int, reference: int, ours: int, raw_billions: float,
        without_dropping: int) -> None:
    """Theirs are the step and raw-token counts of the shipped configurations. Ours are at most 0.05% fewer: the average
    over layers is not rounded down, and a step that does not fit into the budget is not taken."""
    assert reference_steps(tokens, budget) == reference
    assert reference * tokens.ramp.full_samples * tokens.sequence.at(0) / 1e9 == pytest.approx(raw_billions, abs=0.05)
    assert tokens.tokens.steps_within(budget) == ours
    assert ours == pytest.approx(reference, rel=5e-4)
    dense = Case(tokens.ramp, tokens.kept, tokens.sequence, 24, 0).tokens
    assert dense.steps_within(budget) == without_dropping


def test_the_published_warm_up_of_three_billion_tokens() -> None:
    """16,582 steps with dropping, by when 272 tokens are kept; 3e9 / (512 x 2,048) = 2,861 without."""
    assert reference_steps(GPT_300B, 3 * 10**9) == 16_582
    assert GPT_300B.kept.at(16_582) == 272
    assert GPT_300B.tokens.steps_within(3 * 10**9) == 16_570
    full = KeptLength(2048, 2048)
    assert Case(BatchRamp(512), full, full, 24, 0).tokens.steps_within(3 * 10**9) == 2_861
    # The first steps by hand: 2 layers of 2,048 tokens and 22 of 128, 512 samples; 16 tokens more from step 1,667 on.
    first = 512 * (2 * 2048 + 22 * 128)
    assert GPT_300B.tokens.sum_after(1_667) == 1_667 * first
    assert GPT_300B.tokens.sum_after(1_670) == 1_670 * first + 3 * 512 * 22 * 16
