"""The tables of the map, in Markdown."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from examples.experiments.saving_map.arms import METHODS, SIZES
from examples.experiments.saving_map.line import Saving, saving
from examples.experiments.saving_map.points import BASELINES, Complete, Point, against, order, savings

CHEAPER = ("muon", "muon_conv", "muon_ngram", "muon_ngram_conv")
"""Arms of which it is said with what share of a dense run's FLOPs they reach its loss."""


def saved_table(points: Sequence[Point], baseline: str) -> str:
    """What each arm saves against a baseline with the same optimizer, and what Muon saves against AdamW; intervals over
    seeds where there are several, and ~ before what is extrapolated."""
    found = {key: one for key, one in savings(points, baseline).items()
             if key[2].startswith("muon_") == (baseline == "muon")}
    lengths = sorted({tokens for _, tokens, _ in found})
    lines = [f"| FLOPs saved against {BASELINES[baseline]} | model | "
             + " | ".join(f"{tokens:g}" for tokens in lengths) + " |", "|---|---|" + "--:|" * len(lengths)]
    for arm in METHODS:
        for size in SIZES:
            cells = [_saved(found.get((size, tokens, arm))) for tokens in lengths]
            if any(cells):
                lines.append(f"| {METHODS[arm].title} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _saved(found: Saving | None) -> str:
    if found is None:
        return ""
    spread = "" if found.interval is None else f" ({found.interval[0]:z.0%} to {found.interval[1]:z.0%})"
    return f"{'~' if found.extrapolated else ''}{found.share:z.0%}{spread}"


def reached_table(points: Sequence[Point]) -> str:
    """The share of a dense run's FLOPs with which a cheaper arm reaches its loss, on the curve through that arm's own
    budgets, between which the loss must lie."""
    lengths = sorted({point.tokens_per_parameter for point in points if point.arm == "muon"})
    found = {(arm, size, baseline, tokens): share for arm in CHEAPER for size in SIZES for baseline in BASELINES
             for tokens in lengths if (share := _reached(points, size, arm, baseline, tokens))}
    columns = [(baseline, tokens) for baseline in BASELINES for tokens in lengths
               if any(key[2:] == (baseline, tokens) for key in found)]
    lines = ["| share of FLOPs to the loss of | model | "
             + " | ".join(f"{BASELINES[baseline]}, at {tokens:g}" for baseline, tokens in columns) + " |",
             "|---|---|" + "--:|" * len(columns)]
    for arm in CHEAPER:
        for size in SIZES:
            cells = [found.get((arm, size, *column), "") for column in columns]
            if any(cells):
                lines.append(f"| {METHODS[arm].title} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reached(points: Sequence[Point], size: str, arm: str, baseline: str, tokens: float) -> str:
    """Empty where it is not known."""
    budgets = against(points, size, arm)
    dense = next((point for point in points if (point.size, point.arm, point.tokens_per_parameter)
                  == (size, baseline, tokens)), None)
    if not budgets or dense is None or arm == baseline:
        return ""
    found = saving(dense.losses, dense.flops, budgets)
    if found.extrapolated:
        return ""
    bounds = [] if found.interval is None else [1.0 / (1.0 - bound) for bound in found.interval]
    return f"{1.0 / (1.0 - found.share):.2f}" + (f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else "")


def map_table(points: Sequence[Point]) -> str:
    """The map as Markdown; FLOPs are in units of dense AdamW on the same tokens."""
    found = {baseline: savings(points, baseline) for baseline in BASELINES}
    dense = {(point.size, point.tokens_per_parameter): point for point in points if point.arm == "dense"}
    lines = ["| model | tokens per parameter | arm | peak rate | seeds | FLOPs | loss | minus dense | "
             + " | ".join(f"FLOPs saved against {title}" for title in BASELINES.values()) + " |",
             "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    for point in points:
        key = (point.size, point.tokens_per_parameter, point.arm)
        same = dense.get(key[:2])
        rate = f"{point.rate:g}" + ("" if point.inside else " *")
        share = minus = ""
        if same is not None:
            share = f"{point.flops / same.flops:.3f}"
            common = sorted(point.losses.keys() & same.losses.keys())
            if point.arm != "dense" and common:
                minus = f"{fmean(point.losses[seed] - same.losses[seed] for seed in common):+.3f}"
        saved = " | ".join(found[baseline][key].text() if key in found[baseline] else "" for baseline in BASELINES)
        lines.append(f"| {point.size} | {point.tokens_per_parameter:g} | {METHODS[point.arm].title} | {rate} | "
                     f"{len(point.losses)} | {share} | {point.loss:.4f} | {minus} | {saved} |")
    return "\n".join([*lines, "", "\\* the lowest or the highest rate tried at this length, or the only one."])


def shapes_table(points: Sequence[Point], arm: str = "ltd") -> str:
    """What an arm saves against dense AdamW, by the shape of the model."""
    found = {key[:2]: one for key, one in savings(points, "dense").items() if key[2] == arm}
    lengths = sorted({tokens for _, tokens in found})
    lines = ["| model | layers x width | parameters | " + " | ".join(f"at {tokens:g}" for tokens in lengths) + " |",
             "|---|--:|--:|" + "--:|" * len(lengths)]
    for name, size in SIZES.items():
        cells = [_saved(found.get((name, tokens))) for tokens in lengths]
        if any(cells):
            model = size.budget.config((), 1).model
            lines.append(f"| {name} | {model.num_layers} x {model.hidden_size} | {size.budget.parameters:,} | "
                         + " | ".join(cells) + " |")
    return "\n".join(lines)


def rates_table(runs: Sequence[Complete]) -> str:
    """Every peak rate that was tried, with the loss of the first seed."""
    rates = sorted({run.rate for run in runs})
    losses: dict[tuple[str, float, str], dict[float, float]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: -run.seed):
        losses[run.size, run.tokens_per_parameter, run.arm][run.rate] = run.loss
    lines = ["| model | tokens per parameter | arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
             "|---|--:|---|" + "--:|" * len(rates)]
    for (size, tokens, arm), found in sorted(losses.items(), key=lambda item: (*item[0][:2], order(item[0][2]))):
        cells = [f"{found[rate]:.4f}" if rate in found else "" for rate in rates]
        marked = [f"**{cell}**" if found.get(rate) == min(found.values()) else cell
                  for rate, cell in zip(rates, cells, strict=True)]
        lines.append(f"| {size} | {tokens:g} | {METHODS[arm].title} | " + " | ".join(marked) + " |")
    return "\n".join(lines)


def digests_table(runs: Sequence[Complete]) -> str:
    lines = ["| run | steps | FLOPs | commit, package | loss | SHA-256 of metrics.jsonl |", "|---|--:|--:|---|--:|---|"]
    lines += [f"| {run.name} | {run.steps} | {run.flops:.4g} | {run.commit}, {run.package} | {run.loss:.6f} | "
              f"{run.digest} |" for run in runs]
    return "\n".join(lines)
