"""Plan a run before it is started: memory, time and cost on a cluster, and the layout that suits it best.

    python tools/plan_run.py --gpus 128 --gpu h100 --config examples/configs/gpt_13b.toml
    python tools/plan_run.py --gpus 1024 --gpu h100 --search --global-batch-size 1536 --num-layers 96 ...
    python tools/plan_run.py --gpus 256 --gpu h100 --search --hf-config model/config.json --global-batch-size 512 --bf16
    python tools/plan_run.py --script train_gpt3_175b_distributed.sh --gpus 1024
    python tools/plan_run.py --gpus 512 --dry-run --config examples/configs/gpt_13b.toml --global-batch-size 1024

Takes the flags of a run of `megatron_ltd.pretrain_gpt`, or of the program that --program names; they may be the
arguments of a Megatron-LM script. Nothing is read but the settings of a checkpoint with --use-checkpoint-args, nothing
is trained, no GPU is needed. What the numbers are made of, and how far they can be trusted: docs/planning.md.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from tools.commands.command_line import add_output, exit_code_of, parser_of
from tools.pages.report_page import markdown_table
from tools.planning.answers import Answer, of_layout, of_search
from tools.planning.inputs import RECIPES, read_plan
from tools.planning.page import page
from tools.planning.scripts import read_script


def _check(args: argparse.Namespace) -> None:
    """Flags of this tool that contradict each other.

    Raises:
        ConfigError: there are such.
    """
    if args.search and args.dry_run:
        raise ConfigError("--search and --dry-run: a dry run goes through one layout; search first, then add --dry-run "
                          "to the flags of the layout that is chosen")
    if args.rank is not None and not args.dry_run:
        raise ConfigError(f"--rank = {args.rank}: says which process a dry run goes through; add --dry-run, or leave "
                          "--rank out")
    if args.bert and args.program not in (None, "pretrain_bert"):
        raise ConfigError(f"--program = {args.program} and --bert, short for pretrain_bert; leave one out")
    if args.cluster is not None and args.gpu is not None:
        raise ConfigError(f"--gpu = {args.gpu} and --cluster = {args.cluster}, which says the kind; leave one out")
    files = {flag: path for flag, path in (
        ("--script", args.script), ("--cluster", args.cluster), ("--hf-config", args.hf_config), ("--json", args.json),
        ("--page", args.output)) if path is not None}
    for flag, path in files.items():
        if not path.strip():
            raise ConfigError(f"{flag} = {path!r}: names no file; name one, or leave it out")
        if flag not in ("--json", "--page"):
            continue
        if not Path(path).parent.is_dir():
            raise ConfigError(f"{flag} = {path}: its folder does not exist; choose another")
        if Path(path).is_dir():
            raise ConfigError(f"{flag} = {path}: is a folder; name a file in it")
        for other, taken in files.items():
            if other != flag and Path(taken).resolve() == Path(path).resolve():
                raise ConfigError(f"{flag} = {path} is the file of {other} too, and would overwrite it; name another")


def run(args: argparse.Namespace, flags: list[str]) -> None:
    console = Console()
    _check(args)
    recipe, gpus = "pretrain_bert" if args.bert else args.program, args.gpus
    if args.script is not None:
        script = read_script(Path(args.script))
        flags = [*script.arguments, *flags]
        recipe = recipe or script.program
        gpus = script.processes if gpus is None and args.cluster is None else gpus
        console.line(f"{args.script}: {script.program or 'arguments'} {shlex.join(script.arguments)}")
    planned = read_plan(flags, recipe=recipe or "pretrain_gpt", gpus=gpus, gpu="h100" if args.gpu is None else args.gpu,
                        cluster_file=args.cluster, hf_config=args.hf_config, epoch_samples=args.epoch_samples,
                        searches=args.search, console=console)
    if args.dry_run:
        from tools.planning.dry_run import of_dry_run  # imports torch

        answer = of_dry_run(planned, args.rank)
    else:
        answer = of_search(planned) if args.search else of_layout(planned)
    for table in answer.tables:
        console.line(f"{table.title}\n\n{markdown_table(table)}\n")
    for line in answer.lines:
        console.line(line)
    _write(args, answer)
    if answer.problem is not None:
        raise ConfigError(answer.problem)


def _write(args: argparse.Namespace, answer: Answer) -> None:
    contents: dict[str, Any] = {}
    if args.json is not None:
        contents[args.json] = json.dumps(answer.values | {"problem": answer.problem}, indent=1) + "\n"
    if args.output is not None:
        contents[args.output] = page(answer)
    for path, text in contents.items():
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}; choose a writable folder") from error


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__, usage="%(prog)s [--gpus N] [--gpu KIND | --cluster FILE.toml] [--search | --dry-run] "
                                      "[--json FILE] [--output FILE] FLAGS OF THE RUN")
    parser.add_argument("--gpus", type=int, metavar="N", help="accelerators in all (default: those of one replica)")
    parser.add_argument("--gpu", metavar="KIND", help="kind of accelerator (default: h100)")
    parser.add_argument("--cluster", metavar="FILE.toml", help="the cluster, in place of --gpu")
    parser.add_argument("--script", metavar="FILE", help="a launch script, whose flags come before those here")
    parser.add_argument("--hf-config", metavar="FILE", help="a Hugging Face config.json, in place of the model's flags")
    parser.add_argument("--search", action="store_true", help="find the fastest layouts that fit")
    parser.add_argument("--dry-run", action="store_true",
                        help="build the run without memory and go through one step of its schedule")
    parser.add_argument("--rank", type=int, metavar="R", help="with --dry-run: of this process (default: one a stage)")
    parser.add_argument("--program", choices=RECIPES,
                        help="the program whose flags they are (default: the script's, or pretrain_gpt)")
    parser.add_argument("--bert", action="store_true", help="short for --program pretrain_bert")
    parser.add_argument("--epoch-samples", type=int, metavar="N", help="samples of an epoch, for --train-epochs")
    parser.add_argument("--json", metavar="FILE", help="write everything, unrounded")
    add_output(parser, "--page", metavar="FILE.html", help="write a page with tables and pictures")
    args, flags = parser.parse_known_args(argv)
    return exit_code_of(lambda: run(args, flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
