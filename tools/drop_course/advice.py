"""What the saving map (docs/results.md) says of a run: the FLOPs that its policies saved at equal loss where they were
measured, and how far the run is from there.

saving_map.json is written by examples/experiments/saving_map/report.py.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, prod
from pathlib import Path
from typing import Any

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.parts import PARTS
from megatron_ltd.model.arithmetic.shapes import parameter_shapes
from megatron_ltd.plan.derived import policies

MAP = Path(__file__).resolve().parent / "saving_map.json"
SOURCE = "docs/results.md"
LARGER = 10
"""A run whose model or text is so many times larger than any of the map is told that it is."""
Kind = tuple[tuple[str, ...], str, tuple[str, ...]]
"""Names of policies, optimizer, and what the model has beyond the usual."""
Against = tuple[float, tuple[float, float] | None, int, bool]
Size = tuple[int, int]
"""Parameters, without a table of n-grams, and layers."""
DENSE: Kind = ((), "adam", ())
MUON: Kind = ((), "muon", ())
CHEAPER: tuple[Kind, ...] = (MUON, ((), "muon", ("convolutions",)), ((), "muon", ("table of n-grams",)),
                             ((), "muon", ("convolutions", "table of n-grams")))
"""What is named beside a run's own kind."""
OPTIMIZERS = {"adam": "AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Measured:
    """What an arm saved at one length.

    Args:
        title: of the arm, with its schedule and its optimizer.
        policies: names, sorted; none for dense training.
        parts: see `parts_of`.
        size: of the model.
        against: by optimizer of the dense runs: share, interval (None for one seed), number of seeds, whether the loss
            lies beyond those of the dense runs.
    """

    title: str
    policies: tuple[str, ...]
    optimizer: str
    parts: tuple[str, ...]
    size: Size
    tokens_per_parameter: float
    against: dict[str, Against]

    @property
    def kind(self) -> Kind:
        return self.policies, self.optimizer, self.parts

    def saved(self, optimizer: str) -> str:
        share, interval, seeds, extrapolated = self.against[optimizer]
        spread = "one seed" if interval is None else f"95% interval {interval[0]:+z.0%} to {interval[1]:+z.0%}, " \
                                                     f"{seeds} seeds"
        return f"{share:+z.0%} at {self.tokens_per_parameter:g} ({spread}{', extrapolated' * extrapolated})"


def read_map(path: Path = MAP) -> list[Measured]:
    def against(found: dict[str, Any]) -> dict[str, Against]:
        return {name: (one["share"], one["interval"] and tuple(one["interval"]), one["seeds"], one["extrapolated"])
                for name, one in found.items()}

    return [Measured(row["title"], tuple(row["policies"]), row["optimizer"], tuple(row["parts"]),
                     (row["parameters"], row["layers"]), row["tokens_per_parameter"], against(row["against"]))
            for row in json.loads(path.read_text())]


def parts_of(model: ModelConfig) -> tuple[str, ...]:
    """What a model has that costs hardly any FLOPs."""
    return tuple(sorted(part.name for part in PARTS if getattr(model, part.free[0]) is not None))


def advice(config: RunConfig, tokens: float, measured: Sequence[Measured]) -> Iterator[str]:
    """Sentences about what to expect.

    Args:
        tokens: raw tokens of the run.
    """
    if config.model.family != "gpt":
        yield f"savings at equal loss were measured for GPT only ({SOURCE})"
        return
    parts = parts_of(config.model)
    shapes = parameter_shapes(replace(config.model, ngram_rows=None))
    parameters = sum(prod(shape) for shape in shapes.values())
    size = parameters, config.model.num_layers
    ratio, optimizer = tokens / parameters, config.optimizer.optimizer
    active = tuple(sorted(policy.name for policy in policies(config).active))
    without = " and a table of n-grams not" if "table of n-grams" in parts else ""
    yield f"{ratio:.3g} tokens per parameter ({parameters / 1e6:.3g} million parameters, embedding included{without})"
    own = (active, optimizer, parts)
    if own != DENSE:
        yield from _saved(own, "adam" if own == MUON else optimizer, ratio, size, measured)
    for better in CHEAPER:
        known = any(row.kind == better and optimizer in row.against for row in measured)
        if better != own and known:
            yield from _saved(better, optimizer, ratio, size, measured)
    largest = max(row.size[0] for row in measured)
    longest = max(row.size[0] * row.tokens_per_parameter for row in measured)
    if parameters > LARGER * largest or tokens > LARGER * longest:
        yield (f"measured with at most {largest / 1e6:.3g} million parameters and {longest / 1e6:.3g} million tokens. "
               "What was saved there fell with the number of tokens, more than with tokens per parameter; whether any "
               f"of it carries over to this run is not known ({SOURCE})")


def _saved(kind: Kind, baseline: str, ratio: float, size: Size, measured: Sequence[Measured]) -> Iterator[str]:
    """What each arm of a kind saved against dense training with an optimizer."""
    active, optimizer, parts = kind
    arms: dict[str, dict[Size, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(measured, key=lambda row: row.tokens_per_parameter):
        if row.kind == kind and baseline in row.against:
            arms[row.title][row.size].append(row)
    if not arms:
        what = " with ".join((*active, *parts))
        yield f"{what or 'dense'}, optimizer {optimizer}: no saving at equal loss was measured ({SOURCE})"
    for title, by_size in arms.items():
        parameters, layers = nearest = _most_telling(by_size, ratio, size)
        rows = by_size[nearest]
        below = [row for row in rows if row.tokens_per_parameter <= ratio][-1:]
        above = [row for row in rows if row.tokens_per_parameter > ratio][:1]
        where = "" if below and above else f"; the run is {'longer' if below else 'shorter'} than any that was measured"
        yield (f"{title}: FLOPs saved at the loss of dense {OPTIMIZERS[baseline]}, by tokens per parameter, with "
               f"{parameters / 1e6:.3g} million parameters in {layers} layers: "
               f"{', '.join(row.saved(baseline) for row in (*below, *above))}{where}")


def _most_telling(by_size: Mapping[Size, Sequence[Measured]], ratio: float, own: Size) -> Size:
    """The nearest size with a run as long as this one; if there is none, the size with the longest run. Among sizes
    that differ by a few percent of their parameters, that of the nearest depth."""
    def distance(size: Size) -> tuple[float, float, float]:
        parameters, layers = (abs(log(one / mine)) for one, mine in zip(size, own, strict=True))
        return -min(by_size[size][-1].tokens_per_parameter, ratio), round(parameters, 1), layers

    return min(by_size, key=distance)
