"""Kept positions: the sets themselves, their statistics, and what they may depend on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.token_drop.draws import uniform
from megatron_ltd.token_drop.sampling import kept_positions, splitmix64, stream_rows
from tests.token_drop import splitmix_reference

LENGTHS = [512, 1000, 2048, 2049, 2304, 3072, 4096, 8192, 32768]
NORMAL_QUANTILE = 3.2905
"""|z| of a standard normal is larger once in 1000 draws."""


def sets(seed: int, samples: range | list[int], layers: range | list[int], *, tokens: int, keep: int,
         strata: int = 1) -> torch.Tensor:
    return kept_positions(seed, torch.tensor(list(samples)), torch.tensor(list(layers)), sequence_tokens=tokens,
                          kept_tokens=keep, strata=strata)


def indicators(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """1.0 where a position is kept. Shapes: [l, b, k] -> [l, b, s]"""
    return torch.zeros(*kept.shape[:2], tokens, dtype=torch.float64).scatter_(2, kept, 1.0)


def chi_square_bound(degrees: int, z: float) -> float:
    """Quantile of the chi-square distribution at the normal quantile z (Wilson and Hilferty)."""
    return degrees * (1.0 - 2.0 / (9.0 * degrees) + z * math.sqrt(2.0 / (9.0 * degrees))) ** 3


def assert_is_plain_chi_square(statistic: float, degrees: int) -> None:
    """Neither too uneven nor too even, each at 5e-4."""
    low, high = (chi_square_bound(degrees, z) for z in (-NORMAL_QUANTILE, NORMAL_QUANTILE))
    assert low < statistic < high, f"chi-square {statistic:.1f} with {degrees} degrees, not {low:.1f} to {high:.1f}"


def test_the_quantile_of_the_chi_square_distribution_is_that_of_the_tables() -> None:
    assert chi_square_bound(100, 3.0902) == pytest.approx(149.449, rel=1e-3)
    assert chi_square_bound(100, -3.0902) == pytest.approx(61.918, rel=1e-3)


def test_the_hash_is_splitmix64() -> None:
    """Against the sequences published with the algorithm."""
    published = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                  16408922859458223821],
    }
    for seed, sequence in published.items():
        counters = [seed + (i + 1) * splitmix_reference.GAMMA for i in range(len(sequence))]
        signed = torch.tensor([(c % 2**64) - 2**64 * ((c % 2**64) >= 2**63) for c in counters])
        assert [value % 2**64 for value in splitmix64(signed).tolist()] == sequence
        assert [splitmix_reference.finalise(c) for c in counters] == sequence


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("share", ["one", "eighth", "all but one", "all"])
def test_a_set_is_ascending_distinct_and_in_range_at_every_length(tokens: int, share: str) -> None:
    keep = {"one": 1, "eighth": tokens // 8, "all but one": tokens - 1, "all": tokens}[share]
    kept = sets(11, [0, 5], [1, 9], tokens=tokens, keep=keep)
    assert kept.shape == (2, 2, keep) and kept.dtype == torch.int64
    assert int(kept.min()) >= 0 and int(kept.max()) < tokens
    assert bool((kept.diff(dim=2) > 0).all())
    if share == "all":
        assert torch.equal(kept, torch.arange(tokens).expand_as(kept))


@st.composite
def draws(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    strata = draw(st.integers(1, 4))
    span = draw(st.integers(1, 40))
    keep = draw(st.integers(1, span)) * strata
    seed, sample, layer = draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 2**62)), draw(st.integers(0, 200))
    return seed, sample, layer, span * strata, keep, strata


@given(draws())
def test_the_sets_are_those_of_plain_python(arguments: tuple[int, int, int, int, int, int]) -> None:
    seed, sample, layer, tokens, keep, strata = arguments
    expected = splitmix_reference.kept(seed, sample, layer, tokens=tokens, keep=keep, strata=strata)
    assert sets(seed, [sample], [layer], tokens=tokens, keep=keep, strata=strata)[0, 0].tolist() == expected


@pytest.mark.parametrize(("tokens", "keep", "strata"), [(2048, 688, 1), (4096, 512, 8), (32768, 1024, 1)])
def test_the_sets_of_long_sequences_are_those_of_plain_python(tokens: int, keep: int, strata: int) -> None:
    expected = splitmix_reference.kept(1234, 10**9 + 7, 22, tokens=tokens, keep=keep, strata=strata)
    assert sets(1234, [10**9 + 7], [22], tokens=tokens, keep=keep, strata=strata)[0, 0].tolist() == expected


def test_a_set_depends_on_nothing_but_seed_sample_and_layer() -> None:
    samples, layers = [3, 14, 15, 92, 65, 35], [1, 4, 2, 7]
    together = sets(5, samples, layers, tokens=96, keep=24, strata=2)
    for b, sample in enumerate(samples):
        for i, layer in enumerate(layers):
            alone = sets(5, [sample], [layer], tokens=96, keep=24, strata=2)
            assert torch.equal(together[i, b], alone[0, 0])
    order = [4, 0, 5, 2]
    assert torch.equal(together[:, order], sets(5, [samples[i] for i in order], layers, tokens=96, keep=24, strata=2))


def test_drawing_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sets(5, range(4), range(3), tokens=128, keep=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(sets(5, range(4), range(3), tokens=128, keep=32), first)


@pytest.mark.parametrize("strata", [1, 2, 8])
def test_a_larger_set_contains_the_smaller_ones(strata: int) -> None:
    previous: set[tuple[int, int, int]] = set()
    for keep in (8, 16, 40, 128, 248, 256):
        kept = sets(7, range(6), range(5), tokens=256, keep=keep, strata=strata)
        members = {(i, b, p) for i in range(5) for b in range(6) for p in kept[i, b].tolist()}
        assert previous < members
        previous = members


@pytest.mark.parametrize("strata", [2, 4, 16])
def test_every_stratum_keeps_the_same_number(strata: int) -> None:
    kept = sets(3, range(20), range(5), tokens=512, keep=160, strata=strata)
    of_stratum = (kept // (512 // strata)).unflatten(2, (strata, 160 // strata))
    assert torch.equal(of_stratum, torch.arange(strata)[:, None].expand_as(of_stratum))


@pytest.mark.parametrize(("tokens", "keep", "strata"), [(64, 16, 1), (64, 1, 1), (64, 63, 1), (96, 24, 4), (50, 20, 2)])
@pytest.mark.parametrize("seed", [0, 1234])
def test_every_position_is_kept_equally_often(tokens: int, keep: int, strata: int, seed: int) -> None:
    kept = sets(seed, range(1000), range(1, 9), tokens=tokens, keep=keep, strata=strata)
    draws, p, span = kept.shape[0] * kept.shape[1], keep / tokens, tokens // strata
    counts = torch.bincount(kept.flatten(), minlength=tokens).double()
    # Within a stratum counts have a fixed sum, so they vary like draws without replacement.
    statistic = float((counts - draws * p).square().sum() / (draws * p * (1.0 - p))) * (span - 1) / span
    assert_is_plain_chi_square(statistic, tokens - strata)


def test_every_pair_of_positions_is_kept_equally_often() -> None:
    tokens, keep = 24, 8
    kept = indicators(sets(21, range(4000), range(1, 5), tokens=tokens, keep=keep), tokens).flatten(0, 1)
    together = (kept.t() @ kept)[tuple(torch.triu_indices(tokens, tokens, 1))]
    p = keep * (keep - 1) / (tokens * (tokens - 1))
    deviations = (together - len(kept) * p) / math.sqrt(len(kept) * p * (1.0 - p))
    assert float(deviations.abs().max()) < 4.5  # of 276 pairs; each exceeds it once in 150 thousand draws
    assert float(deviations.square().mean()) == pytest.approx(1.0, abs=0.35)


def overlap_score(first: torch.Tensor, second: torch.Tensor) -> float:
    """How far the mean overlap of pairs of sets is from that of independent ones, in standard deviations."""
    tokens, keep = first.shape[-1], float(first[0, 0].sum())
    overlaps = (first * second).sum(dim=-1).flatten()
    mean = keep * keep / tokens
    variance = mean * (1.0 - keep / tokens) * (tokens - keep) / (tokens - 1)  # hypergeometric
    return float((overlaps.mean() - mean) / math.sqrt(variance / overlaps.numel()))


def test_sets_of_different_layers_samples_and_seeds_are_independent() -> None:
    tokens, layers, samples = 64, 12, 400
    kept = indicators(sets(17, range(samples), range(layers), tokens=tokens, keep=16), tokens)
    other_seed = indicators(sets(18, range(samples), range(layers), tokens=tokens, keep=16), tokens)
    square = indicators(sets(17, range(200), range(200), tokens=tokens, keep=16), tokens)
    upper = torch.triu_indices(200, 200, 1)
    diagonals = torch.arange(199)
    scores = {
        "next layer": overlap_score(kept[:-1], kept[1:]),
        "layer after that": overlap_score(kept[:-2], kept[2:]),
        "first and last layer": overlap_score(kept[:1], kept[-1:]),
        "next sample": overlap_score(kept[:, :-1], kept[:, 1:]),
        "sample 256 further on": overlap_score(kept[:, :-256], kept[:, 256:]),
        "next seed": overlap_score(kept, other_seed),
        "layer i of sample j, layer j of sample i": overlap_score(
            square[upper[0], upper[1]][None], square[upper[1], upper[0]][None]),
        "next layer of the sample before": overlap_score(
            square[diagonals, diagonals + 1][None], square[diagonals + 1, diagonals][None]),
    }
    assert {name: score for name, score in scores.items() if abs(score) > NORMAL_QUANTILE} == {}


def test_no_two_sets_of_a_run_are_equal() -> None:
    kept = sets(0, range(500), range(24), tokens=512, keep=32).flatten(0, 1)
    assert len(kept.unique(dim=0)) == len(kept)


def test_rows_of_the_stream_are_position_major() -> None:
    kept = torch.tensor([[0, 3, 4], [1, 2, 5]])
    assert stream_rows(kept).tolist() == [0, 3, 6, 5, 8, 11]
    stream = torch.arange(12).view(6, 2)  # [s, b], value = 2 * position + sample
    assert torch.equal(stream.flatten()[stream_rows(kept)].view(3, 2), stream.gather(0, kept.t()))


def skips(seed: int, steps: range, layers: range, rate: float) -> torch.Tensor:
    return torch.tensor([[uniform(seed, step, layer) < rate for step in steps] for layer in layers])


def test_skipped_layers_are_those_of_unbounded_integers() -> None:
    found = skips(1234, range(50), range(24), 0.2)
    expected = [[splitmix_reference.finalise(splitmix_reference.state(1234, step, layer + 2**21)) >> 11 < round(
        0.2 * 2**53) for step in range(50)] for layer in range(24)]
    assert found.tolist() == expected
    # A step asked for alone, or a layer, draws the same.
    assert skips(1234, range(7, 8), range(5, 6), 0.2).tolist() == [[expected[5][7]]]


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_layers_are_skipped_as_often_as_the_rate_says_and_independently(rate: float) -> None:
    steps, layers = 4000, 24
    drawn = skips(7, range(steps), range(layers), rate).double()
    sigma = math.sqrt(rate * (1.0 - rate))
    assert abs(float(drawn.mean()) - rate) < NORMAL_QUANTILE * sigma / math.sqrt(steps * layers)
    assert float((drawn.mean(dim=1) - rate).abs().max()) < 5.0 * sigma / math.sqrt(steps)
    centred = (drawn - rate) / sigma
    between_layers = (centred @ centred.t() / steps).fill_diagonal_(0.0)
    assert float(between_layers.abs().max()) < 5.0 / math.sqrt(steps)
    between_steps = (centred[:, 1:] * centred[:, :-1]).mean()
    assert abs(float(between_steps)) < 4.0 / math.sqrt(steps * layers)
    counts = torch.bincount(drawn.sum(dim=0).long(), minlength=layers + 1).double()
    binomial = [math.comb(layers, n) * rate**n * (1.0 - rate)**(layers - n) * steps for n in range(layers + 1)]
    likely = [n for n, expected in enumerate(binomial) if expected > 20.0]
    statistic = sum((float(counts[n]) - binomial[n])**2 / binomial[n] for n in likely)
    assert statistic < chi_square_bound(len(likely), NORMAL_QUANTILE)


def test_a_higher_rate_skips_more_layers_and_never_fewer() -> None:
    low, high, none = (skips(3, range(200), range(12), rate) for rate in (0.2, 0.4, 0.0))
    assert bool((high | ~low).all()) and int(high.sum()) > int(low.sum()) > 0 and not bool(none.any())
