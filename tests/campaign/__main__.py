"""Random faults against small real runs, and one law.

The finished curve equals that of the uninterrupted run, to 1e-5 on whatever layouts; or the run stopped with a message
that names the cause, an exit code of the table in docs/multi_node.md, and nothing lost.

    python -m tests.campaign --minutes 30 --seed 1 --output campaign.json

An episode is one run with one to three faults, on random layouts, of a random model. A failure prints the command that
plays its episode again; moments differ from machine to machine, so play it several times. Lost links and full file
systems need root, and are left out without it.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count
from pathlib import Path

from tests.campaign.episodes import Stage, episode
from tests.campaign.faults import FAULTS
from tests.campaign.play import Broken

Counts = Counter[tuple[str, str]]


def table(counts: Counts) -> str:
    """Faults by kind and by how they ended, as Markdown."""
    ends = ("survived", "stopped rightly", "failed")
    lines = ["| fault | " + " | ".join(ends) + " |", "|---|--:|--:|--:|"]
    for name in FAULTS:
        lines.append(f"| {name} | " + " | ".join(str(counts[name, end]) for end in ends) + " |")
    totals = [sum(number for (_, how), number in counts.items() if how == end) for end in ends]
    return "\n".join([*lines, "| all | " + " | ".join(map(str, totals)) + " |"])


def told(number: int, seed: int, played: "Future[Counts]") -> Counts:
    """How the faults of an episode ended; a failure is printed."""
    try:
        return played.result()
    except Broken as broken:
        print(f"FAILED: python -m tests.campaign --seed {seed} --episode {number}\n{broken}\n", flush=True)
        return Counter({(broken.fault, "failed"): 1})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="start no episode after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episode", type=int, help="play this one only")
    parser.add_argument("--at-once", type=int, default=3, help="episodes that are played at the same time")
    parser.add_argument("--output", type=Path, help="JSON file of the counts, written after every episode")
    args = parser.parse_args(argv)
    counts: Counts = Counter()
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="campaign-") as scratch, \
            ProcessPoolExecutor(args.at_once, multiprocessing.get_context("spawn")) as pool:
        stage = Stage(Path(scratch))
        under_way: dict[Future[Counts], int] = {}
        numbers = count() if args.episode is None else iter([args.episode])
        while True:
            while len(under_way) < args.at_once and time.monotonic() < deadline:
                if (number := next(numbers, None)) is None:
                    break
                under_way[pool.submit(episode, stage, args.seed, number)] = number
            if not under_way:
                break
            for played in wait(under_way, return_when=FIRST_COMPLETED).done:
                number = under_way.pop(played)
                counts += told(number, args.seed, played)
                print(f"episode {number}: {sum(counts.values())} faults", file=sys.stderr, flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps({" / ".join(key): value for key, value in counts.items()}, indent=1))
    print(table(counts))
    return int(any(how == "failed" for _, how in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
