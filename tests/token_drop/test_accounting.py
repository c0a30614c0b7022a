"""Raw tokens, layer tokens and FLOPs of a run, counted by hand."""

from collections.abc import Collection
from dataclasses import replace

import pytest

from megatron_ltd.token_drop.accounting import Consumed
from tests.plans import plan_of


def step(consumed: Consumed, *, kept: int, samples: int = 8, layers: int = 24, dropped: int = 22,
         flops: int = 30, full_flops: int = 100, sequence: int = 2048, skipped: Collection[int] = ()) -> Consumed:
    plan = plan_of(sequence, layers, kept, range(1, dropped + 1), skipped=skipped)
    return consumed.after_step(plan, samples=samples, sample_flops=flops, full_sample_flops=full_flops)


def test_one_step_by_hand() -> None:
    """8 samples of 2,048 tokens: 2 layers process all, 22 process 128, in all layers 8 x (4,096 + 2,816) = 55,296."""
    consumed = step(Consumed(), kept=128)
    assert consumed == Consumed(steps=1, samples=8, tokens=16_384, layer_token_sum=55_296, flops=240, full_flops=800)
    assert consumed.layer_tokens(24) == 2304
    assert consumed.saving == pytest.approx(0.7)


def test_skipped_layers_process_nothing() -> None:
    """Of 6 layers, 4 of which keep 128 of 2,048 tokens, one of each kind is skipped: 2,048 + 3 x 128 a sample."""
    consumed = step(Consumed(), kept=128, samples=2, layers=6, dropped=4, skipped=(0, 3))
    assert consumed.layer_token_sum == 2 * (2048 + 3 * 128) and consumed.tokens == 2 * 2048
    everything = step(Consumed(), kept=128, samples=2, layers=6, dropped=4, skipped=range(6))
    assert everything.layer_token_sum == 0 and everything.tokens == 2 * 2048


def test_tokens_that_a_curriculum_cuts_off_are_neither_read_nor_processed() -> None:
    consumed = step(Consumed(), kept=128, samples=2, layers=6, dropped=4, sequence=512)
    assert consumed.tokens == 2 * 512 and consumed.layer_token_sum == 2 * (2 * 512 + 4 * 128)
    # Layers drop only what is read: no more tokens are kept than there are.
    assert step(Consumed(), kept=128, samples=2, layers=6, dropped=4, sequence=64).layer_token_sum == 2 * 6 * 64


def test_without_dropping_layer_tokens_are_raw_tokens() -> None:
    for kept, dropped in ((2048, 22), (128, 0), (5000, 22)):
        consumed = step(Consumed(), kept=kept, dropped=dropped, flops=100)
        assert consumed.layer_tokens(24) == consumed.tokens == 16_384
        assert consumed.saving == 0.0


def test_the_layer_tokens_of_a_whole_run_are_exact() -> None:
    """The published GPT run labelled 300B: 512 samples a step; its middle layers grow from 128 to 2,048 tokens."""
    consumed, expected = Consumed(), 0
    for number in range(1000):
        kept = 128 + 16 * (number // 9)
        consumed = step(consumed, kept=kept, samples=512, layers=7, dropped=5)
        expected += 512 * (2 * 2048 + 5 * kept)
    assert consumed.layer_token_sum == expected
    assert consumed.layer_tokens(7) == expected // 7
    assert expected % 7, "the case must be one in which a mean per step would be rounded"


def test_counters_grow_beyond_64_bits_without_rounding() -> None:
    large = 3 * 10**21 + 1
    consumed = step(step(Consumed(), kept=128, samples=1, flops=large, full_flops=2 * large), kept=128, samples=1,
                    flops=large, full_flops=2 * large)
    assert consumed.flops == 6 * 10**21 + 2 and consumed.saving == pytest.approx(0.5)


def test_the_saving_of_an_empty_run_is_zero() -> None:
    assert Consumed().saving == 0.0


def test_the_counters_of_a_resumed_run_go_on() -> None:
    whole = Consumed()
    for kept in (128, 256, 512):
        whole = step(whole, kept=kept)
    saved = step(step(Consumed(), kept=128), kept=256)
    assert step(replace(saved), kept=512) == whole
