"""Plot the loss and the kept length of runs against what they consumed.

    python tools/plot_run.py --metrics dense.jsonl random_ltd.jsonl --labels dense random-LTD --output runs.png

By default that is layer tokens, which measure the work done: the tokens a layer processed, averaged over layers. With
equal layer tokens, runs with and without token dropping have cost about the same. The upper panel shows the training
loss (faint: as logged; line: smoothed) and validation losses as points; the lower panel shows the kept length of
dropped layers.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

import numpy as np

from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.log import Console
from tools.commands.command_line import add_output, exit_code_of, parser_of
from tools.pages.metrics_file import read_metrics

TRAINING_NUMBERS = ("step", "lm_loss", "kept_length")
AXES = {"step": ("step", "steps"), "tokens": ("consumed_tokens", "raw tokens (read)"),
        "layer-tokens": ("consumed_layer_tokens", "layer tokens (tokens a layer processed, averaged over layers)"),
        "flops": ("consumed_flops|model_flops", "FLOPs (forward and backward, after dropping)"),
        "hours": ("step_seconds", "hours of training steps")}
"""Values of --x: what a record of a step must hold, and the name of the axis."""
COLOURS = ("#1f6fb4", "#d9632b", "#2a8c5a", "#8a4fae", "#b8860b", "#c23b75", "#4a5a6a", "#17909b")
SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Curves:
    """One run, by step; a step without a finite loss is NaN and leaves a gap.

    Args:
        consumed: by each logged step, in the unit of --x.
    """

    label: str
    consumed: np.ndarray
    loss: np.ndarray
    kept_tokens: np.ndarray
    validation_consumed: np.ndarray
    validation_loss: np.ndarray


def read_curves(path: Path, label: str, x: str = "layer-tokens") -> Curves:
    """The curves of a metrics file; where a step was repeated after a restart, its last record counts.

    Args:
        x: one of `AXES`.

    Raises:
        DataError: the file is missing, has a damaged line, or no training record.
    """
    training: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    records, _ = read_metrics(path, (*TRAINING_NUMBERS, AXES[x][0]))
    for record in records:
        if "validation_loss" in record:
            validation[record["step"]] = record
        elif "lm_loss" in record:
            training[record["step"]] = record
    if not training:
        raise DataError(f"{path} has no training record. It must be the --metrics-file of a run with a logged step.")
    steps = sorted(training)
    consumed = consumed_by([training[step] for step in steps], x)
    validated = sorted(validation)
    return Curves(
        label=label,
        consumed=consumed,
        loss=np.array([training[step]["lm_loss"] for step in steps], dtype=float),
        kept_tokens=np.array([training[step]["kept_length"] for step in steps], dtype=float),
        # A validation record holds only its step; between logged steps what is consumed grows about linearly.
        validation_consumed=np.interp(validated, [0, *steps], [0.0, *consumed]),
        validation_loss=np.array([validation[step]["validation_loss"] for step in validated], dtype=float),
    )


def consumed_by(records: list[dict[str, Any]], x: str) -> np.ndarray:
    """What a run had consumed by the records of its steps; those between them are taken to cost what the next does."""
    field = AXES[x][0].partition("|")[0]
    if x != "hours" and all(field in record for record in records):
        return np.array([record[field] for record in records], dtype=float)
    step, total, totals = 0, 0.0, []
    for record in records:
        each = record["step_seconds"] / 3600.0 if x == "hours" else record["model_flops"]
        total += (record["step"] - step) * each
        step = record["step"]
        totals.append(total)
    return np.array(totals)


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of the finite values up to `reach` away on either side; NaN stays NaN."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    # The window is symmetric, so that a falling curve is not lifted at its ends.
    reach_here = np.minimum(reach, np.minimum(at, at[::-1]))
    first, after = at - reach_here, at + reach_here + 1
    return np.where(finite, (sums[after] - sums[first]) / np.maximum(counts[after] - counts[first], 1), math.nan)


def loss_limits(curves: list[Curves]) -> tuple[float, float] | None:
    """A range that shows where runs differ; the first steps of a long run may exceed it."""
    seen = [curve.loss[len(curve.loss) // 50 if len(curve.loss) >= 200 else 0:] for curve in curves]
    values = np.concatenate([*seen, *(curve.validation_loss for curve in curves)])
    values = values[np.isfinite(values)]
    if not len(values) or values.min() == values.max():
        return None
    margin = 0.06 * (values.max() - values.min())
    return float(values.min() - margin), float(values.max() + margin)


def draw(curves: list[Curves], title: str | None, output: Path, x: str) -> None:
    """Write the plot."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("Plots need matplotlib, which is not installed: pip install matplotlib.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    style = {
        "font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8b949e",
        "axes.labelcolor": "#30363d", "xtick.color": "#57606a", "ytick.color": "#57606a", "axes.grid": True,
        "grid.color": "#e6e9ed", "grid.linewidth": 0.8, "axes.axisbelow": True, "svg.hashsalt": "megatron_ltd",
    }
    with pyplot.rc_context(style):
        figure, (upper, lower) = pyplot.subplots(
            2, 1, figsize=(8.6, 6.2), sharex=True, height_ratios=(2.6, 1), layout="constrained"
        )
        for index, curve in enumerate(curves):
            _draw_run(upper, lower, curve, COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--")
        limits = loss_limits(curves)
        if limits is not None:
            upper.set_ylim(limits)
        upper.set_ylabel("loss (nats per token)")
        upper.legend(frameon=False, loc="upper right")
        lower.set_ylabel("kept length")
        lower.set_ylim(bottom=0, top=1.08 * max(float(curve.kept_tokens.max()) for curve in curves))
        lower.set_xlim(left=0)
        lower.set_xlabel(AXES[x][1])
        if x != "hours":
            lower.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.align_ylabels()
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color="#1f2328")
        figure.savefig(output, dpi=160)
        pyplot.close(figure)


def _draw_run(upper: Any, lower: Any, curve: Curves, colour: str, dash: str) -> None:
    alone: dict[str, Any] = {"marker": "."} if len(curve.loss) < 4 else {}
    of_run = f"{curve.label}, " if curve.label else ""
    reach = len(curve.loss) // 80
    if reach:
        upper.plot(curve.consumed, curve.loss, color=colour, alpha=0.28, linewidth=0.9)
    line = {"color": colour, "linewidth": 1.9, **alone}
    upper.plot(curve.consumed, smooth(curve.loss, reach), dash, label=f"{of_run}training", **line)
    if len(curve.validation_loss):
        upper.plot(
            curve.validation_consumed, curve.validation_loss, "o", color=colour, markersize=7.5, zorder=3,
            markeredgecolor="white", markeredgewidth=1.3, label=f"{of_run}validation",
        )
    lower.plot(curve.consumed, curve.kept_tokens, dash, drawstyle="steps-pre", **line)


def labels_of(files: list[Path], given: list[str] | None) -> list[str]:
    """Names for the legend: those given, else the file names, with their folders if file names are equal; none for a
    single run."""
    if given is not None:
        if len(given) != len(files):
            raise ConfigError(f"--labels has {len(given)} names, --metrics {len(files)} files. Give one for each.")
        return given
    if len(files) == 1:
        return [""]
    names = [path.stem for path in files]
    return names if len(set(names)) == len(names) else [str(path.parent / path.stem) for path in files]


def run(args: argparse.Namespace) -> None:
    files = [Path(name) for name in args.metrics]
    output = Path(args.output)
    if output.suffix not in SUFFIXES or not output.parent.is_dir():
        raise ConfigError(f"--output = {output} must be a {', '.join(SUFFIXES)} file in an existing folder.")
    labels = labels_of(files, args.labels)
    curves = [read_curves(path, label, args.x) for path, label in zip(files, labels, strict=True)]
    try:
        draw(curves, args.title, output, args.x)
    except OSError as error:
        raise ConfigError(f"--output = {output} cannot be written: {error}. Choose a writable folder.") from error
    Console().line(f"{output}: {len(curves)} run{'s' if len(curves) > 1 else ''}")


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--metrics", required=True, nargs="+", metavar="FILE", help="--metrics-file of each run")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names of the runs (default: file names)")
    parser.add_argument("--title", help="title of the plot")
    parser.add_argument("--x", choices=AXES, default="layer-tokens", help="against what (default: layer-tokens)")
    add_output(parser, required=True, metavar="FILE", help="the plot: .png, .svg or .pdf")
    return exit_code_of(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
