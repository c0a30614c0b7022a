"""Watch runs on one page: loss, rate, kept length, step time, saving, checkpoints, restarts, time left.

    python tools/watch_run.py --metrics dense=dense.jsonl ltd=ltd.jsonl --train-iters 20000 --output watch.html

Open the page in a browser: it needs no network and reads itself again while a run goes on. The files alone are read, so
a run may be on another machine that shares them. The program ends with the runs, which it knows from the exit.json in
their --checkpoints folders, or with Ctrl-C.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from tools.commands.command_line import add_output, exit_code_of, parser_of
from tools.watching.page import page
from tools.watching.progress import Progress, read_progress


def run(args: argparse.Namespace) -> None:
    if args.checkpoints and len(args.checkpoints) != len(args.metrics):
        raise ConfigError(f"--checkpoints names {len(args.checkpoints)} folders for {len(args.metrics)} runs; give one "
                          "for each, in the same order")
    if args.interval <= 0:
        raise ConfigError(f"--interval = {args.interval} must be positive")
    if args.train_iters is not None and args.train_iters < 1:
        raise ConfigError(f"--train-iters = {args.train_iters} must be at least 1; leave it out if the number of steps "
                          "is not known")
    output, told = Path(args.output), False
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            runs = _read(args)
            over = args.once or all(found.ended for found in runs)
            _write(output, page(runs, None if over else args.interval))
            if not told:
                Console().line(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
                told = True
            if over:
                return
            time.sleep(args.interval)


def _read(args: argparse.Namespace) -> list[Progress]:
    folders = args.checkpoints or [None] * len(args.metrics)
    found = []
    for given, folder in zip(args.metrics, folders, strict=True):
        label, _, path = given.rpartition("=")
        metrics = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
        found.append(read_progress(label or metrics.stem, metrics, Path(folder) if folder else None, args.train_iters))
    return found


def _write(output: Path, text: str) -> None:
    """Replace the page, so that a browser never reads half of it."""
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise ConfigError(f"--output = {output} cannot be written: {error}. Choose a writable file.") from error


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--metrics", required=True, nargs="+", metavar="[NAME=]FILE",
                        help="--metrics-file of a run, or the folder that holds it as metrics.jsonl")
    parser.add_argument("--checkpoints", nargs="+", metavar="DIR", help="--save folder of each run")
    parser.add_argument("--train-iters", type=int, metavar="N", help="steps of the runs, for the time left")
    add_output(parser, default="watch.html", metavar="FILE", help="the page (default: watch.html)")
    parser.add_argument("--interval", type=float, default=5.0, metavar="SECONDS",
                        help="how often the files are read (default: 5)")
    parser.add_argument("--once", action="store_true", help="write the page once and end")
    return exit_code_of(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
