"""Show what token dropping will do over a run before it is started: a table, and a plot.

    python tools/inspect_token_drop.py --world-size 8 --plot drop.png --config examples/configs/gpt_350m.toml \\
        --random-ltd-steps 200000

Takes the flags of a run (`megatron_ltd.pretrain_gpt`, or with --bert of `megatron_ltd.pretrain_bert`); corpus and
checkpoints are neither needed nor opened. Everything is computed from the settings, nothing is trained. --world-size is
the number of processes of the launch, from which the default global batch size follows; the default is the number that
one replica needs.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.config import CheckpointConfig, DataConfig, RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.plan.derived import (
    batch_ramp,
    data_parallel_size,
    has_curriculum,
    layer_tokens,
    policies,
    total_steps,
)
from megatron_ltd.plan.flops import step_flops, whole_step_flops
from megatron_ltd.plan.learning_rate import LearningRate
from megatron_ltd.plan.pipeline_costs import describe as describe_pipeline
from megatron_ltd.plan.pipeline_costs import plan_samples
from megatron_ltd.settings.checks.all import check
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.token_drop.plan import StepPlan, TokenSet
from tools.command_line import exit_code_of, parser_of

ROWS = 12
VOCABULARIES = {"GPT2BPETokenizer": 50257, "BertWordPieceLowerCase": 30522, "BertWordPieceCase": 28996}
"""Vocabulary sizes of common tokenizers; only the head's FLOPs depend on them."""
SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Row:
    """The state of the run before a step, and what the step does."""

    step: int
    plan: StepPlan
    raw_tokens: int
    layer_tokens: int
    learning_rate: float
    saving: float
    """Share of the step's FLOPs that dropping saves."""


@dataclass(frozen=True)
class Totals:
    """The whole run.

    Args:
        visits: average number of times a dropped layer processes a token.
        skipping: share of the tokens that no dropped layer processes.
    """

    steps: int
    raw_tokens: int
    layer_tokens: int
    flops: int
    full_flops: int
    visits: float
    skipping: float


def rows(config: RunConfig, dp: int, count: int = ROWS) -> Iterator[Row]:
    """Evenly spaced steps, including the first and the last."""
    last, layers = total_steps(config, dp) - 1, config.model.num_layers
    ramp, tokens = batch_ramp(config, dp), layer_tokens(config, dp)
    rate = LearningRate.of_run(config, dp)
    for step in sorted({last * number // (count - 1) for number in range(count)}):
        samples, plan = ramp.samples_after(step), policies(config).plan(step)
        saving = 1.0 - step_flops(config, plan) / whole_step_flops(config, plan)
        yield Row(step, plan, tokens.raw_after(step), tokens.sum_after(step) // layers,
                  rate.at(step, samples, ramp.at(samples)), saving)


def totals(config: RunConfig, dp: int) -> Totals:
    """Sums and means over all samples of the run, in closed form."""
    steps, by_plan = total_steps(config, dp), plan_samples(config, dp)
    samples = sum(by_plan.values())
    # A mean over the tokens that are read, so longer samples count more.
    read = sum(count * plan.read_tokens for plan, count in by_plan.items())
    of_run = batch_ramp(config, dp).samples_after(steps)
    return Totals(
        steps=steps, raw_tokens=layer_tokens(config, dp).raw_after(steps),
        layer_tokens=layer_tokens(config, dp).sum_after(steps) // config.model.num_layers,
        flops=sum(count * step_flops(config, plan) for plan, count in by_plan.items()) * of_run // samples,
        full_flops=sum(count * whole_step_flops(config, plan) for plan, count in by_plan.items()) * of_run // samples,
        visits=sum(plan.kept_tokens * count for plan, count in by_plan.items()) / read,
        skipping=sum(_skipping(plan) * plan.read_tokens * count for plan, count in by_plan.items()) / read)


def _dropped(config: RunConfig) -> int:
    """Layers that drop tokens in at least one step."""
    return len({layer for plan in policies(config).stretches for layer in range(config.model.num_layers)
                if plan.layers[layer].token_set is not None})


def report(config: RunConfig, dp: int) -> str:
    """The table and a summary."""
    found, dropped, layers = totals(config, dp), _dropped(config), config.model.num_layers
    lines = ["| step | kept length | raw tokens before | layer tokens before | learning rate | FLOPs saved |",
             "|--:|--:|--:|--:|--:|--:|"]
    lines += [f"| {row.step} | {_lengths(config, row.plan)} | {row.raw_tokens:.4g} | {row.layer_tokens:.4g} | "
              f"{row.learning_rate:.3g} | {row.saving:.1%} |" for row in rows(config, dp)]
    share = found.layer_tokens / found.raw_tokens
    lines += [
        "",
        f"{found.steps} steps, {found.raw_tokens:.5g} raw tokens, {found.layer_tokens:.5g} layer tokens ({share:.1%})",
        f"FLOPs {found.flops:.4g} rather than {found.full_flops:.4g}: {1.0 - found.flops / found.full_flops:.1%} saved "
        f"against the same {found.steps} steps without dropping"]
    if dropped:
        lines += [
            f"{dropped} of {layers} layers drop tokens; one of them processes a token {found.visits:.3f} times a "
            f"pass on average, all of them {found.visits * dropped:.2f} times",
            f"{found.skipping:.2%} of the tokens skip all {dropped} dropped layers ("
            + " -> ".join(f"{_skipping(row.plan):.1%}" for row in _ends(config, dp)) + " over the run)"]
    else:
        lines.append("no layer drops tokens: give --random-ltd")
    if config.parallel.pipeline_model_parallel_size > 1:
        lines += [line for line in describe_pipeline(config, dp) if line is not None]
    return "\n".join(lines)


def _ends(config: RunConfig, dp: int) -> list[Row]:
    return list(rows(config, dp, 2))


def _lengths(config: RunConfig, plan: StepPlan) -> str:
    """The kept length; with a sequence curriculum also the number of tokens read."""
    return f"{plan.kept_tokens} of {plan.read_tokens}" if has_curriculum(config) else str(plan.kept_tokens)


def _skipping(plan: StepPlan) -> float:
    """Share of the tokens that no dropped layer processes, with one draw per set of tokens."""
    sets: dict[TokenSet, int] = {layer.token_set: layer.tokens for layer in plan.layers if layer.token_set is not None}
    return math.prod(1.0 - tokens / plan.read_tokens for tokens in sets.values()) if sets else 0.0


def draw(config: RunConfig, dp: int, path: Path) -> None:
    """Kept length, tokens and learning rate over the steps."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("Plots need matplotlib, which is not installed: pip install matplotlib.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    points = list(rows(config, dp, 400))
    steps = [point.step for point in points]
    figure, (lengths, tokens, rates) = pyplot.subplots(3, 1, sharex=True, figsize=(7.5, 7.5), layout="constrained")
    lengths.plot(steps, [point.plan.kept_tokens for point in points], drawstyle="steps-post", color="#1f6fb4")
    lengths.axhline(config.model.seq_length, color="#4a5a6a", linewidth=0.8, linestyle=":")
    lengths.set_ylabel("kept length")
    lengths.set_ylim(bottom=0)
    tokens.plot(steps, [point.raw_tokens for point in points], color="#4a5a6a", label="raw tokens")
    tokens.plot(steps, [point.layer_tokens for point in points], color="#d9632b", label="layer tokens")
    tokens.yaxis.set_major_formatter(EngFormatter(sep=""))
    tokens.set_ylabel("consumed")
    tokens.legend(frameon=False)
    rates.plot(steps, [point.learning_rate for point in points], color="#2a8c5a")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def runnable(config: RunConfig) -> RunConfig:
    """The settings without the corpus and checkpoints, which are not opened.

    Raises:
        ConfigError: the vocabulary size, the length of the run, or the plan of a step is unknown.
    """
    if config.training.train_epochs is not None:
        raise ConfigError(f"--train-epochs = {config.training.train_epochs}: how many steps that is follows from the "
                          "data, which are not read here; give --train-iters in its place")
    for policy in policies(config).active:
        if policy.is_drawn:
            raise ConfigError(f"{policy.asked_for}: which layers a step skips is drawn at that step, and only what is "
                              "planned is shown here; leave it out")
    vocabulary = config.model.vocab_size or VOCABULARIES.get(config.data.tokenizer_type or "")
    if vocabulary is None:
        raise ConfigError(f"--tokenizer-type = {config.data.tokenizer_type}: its vocabulary is not read here, and the "
                          "head's FLOPs depend on it; give --vocab-size")
    return replace(config, model=replace(config.model, vocab_size=vocabulary), checkpoint=CheckpointConfig(),
                   data=DataConfig(mock_data=True, mask_prob=config.data.mask_prob))


def run(args: argparse.Namespace, flags: list[str]) -> None:
    console = Console()
    config, notes = parse_run_config(flags, "bert" if args.bert else "gpt")
    for note in notes:
        console.line(note)
    config = runnable(config)
    replica = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    world_size = args.world_size if args.world_size is not None else replica
    check(config, world_size)
    dp = data_parallel_size(config, world_size)
    path = None if args.plot is None else Path(args.plot)
    if path is not None and (path.suffix not in SUFFIXES or not path.parent.is_dir()):
        raise ConfigError(f"--plot = {path} must be a {', '.join(SUFFIXES)} file in an existing folder; choose one.")
    console.line(report(config, dp))
    if path is not None:
        try:
            draw(config, dp, path)
        except OSError as error:
            raise ConfigError(f"--plot = {path} cannot be written: {error}. Choose a writable folder.") from error
        console.line(f"{path}: written")


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__, usage="%(prog)s [--bert] [--world-size N] [--plot FILE] FLAGS OF THE RUN")
    parser.add_argument("--bert", action="store_true", help="the flags are those of a BERT run")
    parser.add_argument("--world-size", type=int, metavar="N", help="processes of the launch")
    parser.add_argument("--plot", metavar="FILE", help=".png, .svg or .pdf")
    args, flags = parser.parse_known_args(argv)
    return exit_code_of(lambda: run(args, flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
