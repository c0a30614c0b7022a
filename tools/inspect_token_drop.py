"""Show what a policy will do over a run before it is started: a table, and a picture.

    python tools/inspect_token_drop.py --world-size 8 --output drop.png --config examples/configs/gpt_350m.toml \\
        --random-ltd-steps 200000

Takes the flags of a run (`megatron_ltd.pretrain_gpt`, or with --bert of `megatron_ltd.pretrain_bert`); corpus and
checkpoints are neither needed nor opened, except a checkpoint for its settings with --use-checkpoint-args. Everything
is computed from the settings, nothing is trained. --world-size is the number of processes of the launch, from which the
default global batch size follows; the default is the number that one replica needs. Without --lr the learning rate is
left out. The last lines give what docs/results.md measured for such a run: the FLOPs saved at equal loss, with an
interval.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.plan.derived import data_parallel_size, has_curriculum, policies
from megatron_ltd.plan.layouts.pipeline_costs import describe as describe_pipeline
from megatron_ltd.settings.checks.all import check
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.train.process.recipe import Recipe
from tools.commands.command_line import add_output, exit_code_of, parser_of
from tools.commands.run_flags import completed, with_learning_rate, without_files
from tools.drop_course.advice import advice, read_map
from tools.drop_course.course import MEAN_STEPS, Course, Row
from tools.drop_course.picture import asked_for, draw

SUFFIXES = (".png", ".svg", ".pdf")


def report(course: Course) -> str:
    """The table and a summary."""
    columns = _columns(course)
    lines = ["| " + " | ".join(columns) + " |", "|" + "--:|" * len(columns)]
    lines += ["| " + " | ".join(_cells(course, row, columns)) + " |" for row in course.rows()]
    total, dropped, layers = course.before[-1], len(course.dropped), course.layers
    share = total.layer_tokens(layers) / total.tokens
    lines += [
        "",
        f"{course.steps} steps, {total.tokens:.5g} raw tokens, {total.layer_tokens(layers):.5g} layer tokens "
        f"({share:.1%})",
        f"FLOPs {total.flops:.4g} rather than {total.full_flops:.4g}: {total.saving:.1%} saved against the same "
        f"{course.steps} steps without dropping"]
    lines += _of_layers(course)
    if dropped:
        first, last = (course.passing(policies(course.config).plan(step)) for step in (0, course.steps - 1))
        lines += [
            f"{dropped} of {layers} layers drop tokens; one of them processes a token {course.visits():.3f} times a "
            f"pass on average, all of them {course.visits() * dropped:.2f} times",
            "routers choose the tokens, so how many of them skip all these layers is not known before the run"
            if course.config.model.mixture_of_depths_capacity is not None else
            f"{course.mean(course.passing):.2%} of the tokens skip all {dropped} dropped layers ({first:.1%} -> "
            f"{last:.1%} over the run)"]
    elif not policies(course.config).active:
        lines.append("no layer drops tokens: give --random-ltd")
    if course.config.parallel.pipeline_model_parallel_size > 1:
        lines += [line for line in describe_pipeline(course.config, course.dp) if line is not None]
    lines += ["", *advice(course.config, total.tokens, read_map())]
    return "\n".join(lines)


def _of_layers(course: Course) -> Iterator[str]:
    """Sentences about layers that are drawn."""
    if not policies(course.config).is_drawn:
        return
    skipped = course.mean(lambda plan: len(plan.skipped_layers))
    constant = course.mean(lambda plan: sum(not (layer.skipped or layer.backward) for layer in plan.layers))
    if skipped:
        yield f"a step skips {skipped:.2f} of {course.layers} layers on average"
    if constant:
        yield f"{constant:.2f} of {course.layers} layers have a forward pass only, on average"
    yield (f"drawn layers: a row of the table is a mean over up to {MEAN_STEPS} steps, beginning with its own"
           + (f"; the totals are estimated from {len(course.works)} steps" if len(course.works) < course.steps else ""))


def _columns(course: Course) -> list[str]:
    columns = ["step", "kept length", "raw tokens before", "layer tokens before", "learning rate", "FLOPs saved"]
    if course.config.optimizer.lr is None:
        columns.remove("learning rate")
    return columns + (["layers that run", "with a backward pass"] if policies(course.config).is_drawn else [])


def _cells(course: Course, row: Row, columns: list[str]) -> list[str]:
    kept = f"{row.plan.kept_tokens} of {row.plan.read_tokens}" if has_curriculum(course.config) else \
        str(row.plan.kept_tokens)
    cells = {"step": str(row.step), "kept length": kept, "raw tokens before": f"{row.before.tokens:.4g}",
             "layer tokens before": f"{row.before.layer_tokens(course.layers):.4g}",
             "learning rate": f"{row.learning_rate or 0.0:.3g}", "FLOPs saved": f"{row.saving:.1%}",
             "layers that run": f"{row.forward:.1f}", "with a backward pass": f"{row.backward:.1f}"}
    return [cells[column] for column in columns]


def run(args: argparse.Namespace, flags: list[str]) -> None:
    console = Console()
    recipe = Recipe("bert" if args.bert else "gpt")
    config, notes = parse_run_config(flags, recipe.family)
    for note in notes:
        console.line(note)
    config = without_files(completed(recipe, config, console))
    replica = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    world_size = args.world_size if args.world_size is not None else replica
    check(with_learning_rate(config), world_size)
    dp = data_parallel_size(config, world_size)
    path = None if args.output is None else Path(args.output)
    if path is not None and (path.suffix not in SUFFIXES or not path.parent.is_dir()):
        raise ConfigError(f"--output = {path} must be a {', '.join(SUFFIXES)} file in an existing folder; choose one.")
    course = Course.of(config, dp)
    console.line(f"{asked_for(course)}\n")
    console.line(report(course))
    if path is not None:
        try:
            draw(course, path)
        except OSError as error:
            raise ConfigError(f"--output = {path} cannot be written: {error}. Choose a writable folder.") from error
        console.line(f"{path}: written")


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__, usage="%(prog)s [--bert] [--world-size N] [--output FILE] FLAGS OF THE RUN")
    parser.add_argument("--bert", action="store_true", help="the flags are those of a BERT run")
    parser.add_argument("--world-size", type=int, metavar="N", help="processes of the launch")
    add_output(parser, "--plot", metavar="FILE", help="draw it: .png, .svg or .pdf")
    args, flags = parser.parse_known_args(argv)
    return exit_code_of(lambda: run(args, flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
