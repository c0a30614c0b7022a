"""Where does dropping pay? One command makes the runs of a queue, one after the other, and may be ended at any moment.

    python examples/experiments/saving_map/run.py --text DIR --output-dir build/saving_map
    python examples/experiments/saving_map/run.py --text DIR --output-dir build/saving_map --only NAME
    python examples/experiments/saving_map/run.py --text DIR --output-dir build/continued --queue FILE --start RUN

--text holds *.train.jsonl and *.valid.jsonl (also .gz, .zst), {"text": document} a line. The queue is a text file, read
again after every run, so that lines may be added while it is worked off. Start the command again after an interruption:
complete runs are kept, one that was cut off continues from its newest checkpoint. report.py makes tables and pictures.

With --start all runs begin with the weights of another run's folder, made with --keep-models, and read their text with
its tokenizer: continued pretraining.
"""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # to run from a checkout that is not installed

from examples.experiments.prepare import Corpus, Text, prepare
from examples.experiments.runs import ROOT, Run, complete_all, exit_code_of, say
from examples.experiments.saving_map.arms import METHODS, SIZES, arm_of
from megatron_ltd.errors import ConfigError

QUEUE = Path(__file__).resolve().parent / "queue.txt"
CHECKPOINTS = 4
"""Checkpoints of a run; an interruption loses at most what lies between two."""
CURVE_POINTS = 2
"""Validations of a run: half-way and at its end."""
Entry = tuple[str, str, float, float | None, int]
"""Size, arm, tokens per parameter, peak rate (None: the best that dense runs found), seed."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--text", type=Path, metavar="DIR",
                        help="folder with the text; may be left out where the corpus is there already")
    parser.add_argument("--output", "--output-dir", dest="output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--queue", type=Path, default=QUEUE, metavar="FILE", help="default: queue.txt beside run.py")
    parser.add_argument("--only", metavar="NAME", help="only the run of the queue that has this name")
    parser.add_argument("--start", type=Path, metavar="RUN",
                        help="folder of a run to continue, made with --keep-models")
    parser.add_argument("--keep-models", action="store_true", help="keep the last checkpoint of every run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; 1")
    parser.add_argument("--corpus-only", action="store_true", help="make tokenizer and corpus, and stop")
    parser.add_argument("--plan", action="store_true", help="print runs, steps and FLOPs, and stop")
    return parser.parse_args(argv)


def read_queue(path: Path) -> list[Entry]:
    """The entries of a queue.

    Raises:
        ConfigError: a line is not one.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            size, arm, tokens, rate, seed = words
            entry = (size, arm, float(tokens), None if rate == "best" else float(rate), int(seed))
        except ValueError:
            raise ConfigError(f"{path}, line {number}: {line!r} is not size, arm, tokens per parameter, peak rate, "
                              "seed; write `small dense 10 0.004 1`, say") from None
        if size not in SIZES or arm not in METHODS:
            raise ConfigError(f"{path}, line {number}: no size {size!r} with an arm {arm!r}; sizes are "
                              f"{', '.join(SIZES)}, arms {', '.join(METHODS)}")
        found.append(entry)
    return found


def name_of(entry: Entry) -> str:
    size, arm, tokens, rate, seed = entry
    return f"{size}-{arm}-t{tokens:g}-lr{'best' if rate is None else f'{rate:g}'}-seed{seed}"


def with_best_rate(entry: Entry, runs: Path) -> Entry | None:
    """The entry at the best peak rate of the longest dense runs, with its size, optimizer and seed, that tried several;
    None while there are none."""
    size, arm, tokens, rate, seed = entry
    if rate is not None:
        return entry
    tried: dict[float, dict[float, float]] = defaultdict(dict)
    for path in runs.glob(f"{size}-{'muon' if arm.startswith('muon') else 'dense'}-t*-seed{seed}/done.json"):
        length, _, found = path.parent.name.partition("-t")[2].partition("-seed")[0].partition("-lr")
        tried[float(length)][float(found)] = json.loads(path.read_text())["validation_loss"]
    several = {length: losses for length, losses in tried.items() if len(losses) > 1}
    if not several:
        return None
    losses = several[max(several)]
    return size, arm, tokens, min(losses, key=losses.__getitem__), seed


def planned_run(entry: Entry, corpus: Corpus, runs: Path, start: Path | None = None, keeps_model: bool = False) -> Run:
    """A run as the training program's arguments.

    Args:
        start: folder of checkpoints whose weights it starts from.
    """
    size, name, tokens, rate, seed = entry
    assert rate is not None
    budget, arm = SIZES[size].budget, arm_of(SIZES[size], name, tokens)
    arguments = ("--config", str(budget.settings.relative_to(ROOT)), *budget.shape, *arm.flags, *corpus.flags(),
                 "--train-iters", str(arm.steps), "--lr", f"{rate:g}", "--seed", str(seed), "--save-interval",
                 str(-(-arm.steps // CHECKPOINTS)), "--eval-interval", str(-(-arm.steps // CURVE_POINTS)))
    return Run(runs / name_of(entry), name, seed, rate, arm.steps, arguments, keeps_model,
               budget.flops(arm.flags, arm.steps), start)


def work_off(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Make the runs of the queue that are missing, until there is none."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    corpus, folder = None, args.output_dir / "runs"
    while True:
        queue = read_queue(args.queue)
        if args.only is not None and args.only not in map(name_of, queue):
            raise ConfigError(f"--only = {args.only}: no such run in {args.queue}")
        known = [with_best_rate(entry, folder) for entry in queue if args.only in (None, name_of(entry))]
        missing = [entry for entry in known if entry and not (folder / name_of(entry) / "done.json").exists()]
        if not missing and None in known:
            raise ConfigError(f"{args.queue}: `best` needs dense runs with several peak rates; add them")
        if not missing:
            return
        corpus = corpus or _corpus(args, SIZES[missing[0][0]].budget.vocab_size)
        if args.corpus_only:
            return
        say(f"{len(missing)} runs left; next is {name_of(missing[0])}")
        start = None if args.start is None else args.start / "checkpoints"
        complete_all([planned_run(entry, corpus, folder, start, args.keep_models)
                      for entry in missing[:1 if args.jobs == 1 else None]], args.jobs, say)


def _corpus(args: argparse.Namespace, vocab_size: int) -> Corpus:
    folder = _from_root(args.output_dir) / "corpus"
    if args.start is not None:
        _take_tokenizer(args.start, ROOT / folder)
    return prepare(Text((), ()) if args.text is None else Text.of(args.text), vocab_size, folder, say)


def _take_tokenizer(start: Path, corpus: Path) -> None:
    """Give a corpus the tokenizer of the run that is continued, whose folder lies beside its runs.

    Raises:
        ConfigError: there is no model or no tokenizer.
    """
    tokenizer = start.parent.parent / "corpus" / "tokenizer"
    if not (start / "checkpoints").is_dir() or not tokenizer.is_dir():
        raise ConfigError(f"--start = {start}: no model there, or no tokenizer in {tokenizer}; make the run with "
                          "--keep-models and name its folder, build/base/runs/NAME, say")
    if not (corpus / "tokenizer").exists():
        shutil.copytree(tokenizer, corpus / "tokenizer")


def _from_root(path: Path) -> Path:
    """The path as runs write it into run.json: the same in every checkout that it lies in."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def plan(queue: Path, say: Callable[[str], None]) -> None:
    for entry in read_queue(queue):
        arm, budget = arm_of(SIZES[entry[0]], entry[1], entry[2]), SIZES[entry[0]].budget
        flops = budget.flops(arm.flags, arm.steps)
        say(f"{name_of(entry)}: {arm.steps} steps, {flops:.4g} FLOPs; {' '.join(arm.flags)}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(**vars(args) | {name: getattr(args, name) and getattr(args, name).resolve()
                                              for name in ("output_dir", "text", "start")})
    return exit_code_of(lambda: plan(args.queue, say) if args.plan else work_off(args, say))


if __name__ == "__main__":
    sys.exit(main())
