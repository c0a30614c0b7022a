"""Show a training run, whose log lines in Megatron's format arrive on standard input, as one progress bar.

On a terminal the `iteration N/ M | ...` lines drive the bar and everything else is printed above it; elsewhere every
line is passed through unchanged, so that a log file stays a log file. torchrun reports every exit code but 0 as a
crash; if the run has already printed why it stopped, that report is omitted.

    torchrun ... -m megatron_ltd.pretrain_gpt ... 2>&1 | python examples/progress.py
"""

import re
import signal
import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+)")
LAUNCHER = re.compile(r"torch/distributed/elastic/.*(closing signal|failed \(exitcode: (?P<code>\d+)\))")
EXPLAINED = {"10", "11", "20", "21", "22", "30", "50"}
"""Exit codes of requested stops, and of errors that come with a message."""

SHOWN = {"lm loss": "loss", "loss": "loss", "kept length": "kept", "grad norm": "norm"}


def without_crash_report(lines: Iterable[str]) -> Iterator[str]:
    """The lines up to torchrun's report if the stop needs none; the rest is read and discarded."""
    stopped = False
    for line in lines:
        launcher = LAUNCHER.search(line)
        stopped = stopped or (launcher is not None and launcher["code"] in EXPLAINED)
        if not stopped and (launcher is None or launcher["code"] is not None):
            yield line


def shown_fields(line: str) -> dict[str, str]:
    """The few fields of a log line that fit beside the bar."""
    fields = dict(part.strip().split(":", 1) for part in line.split("|") if ":" in part)
    return {SHOWN[name]: short(value.strip()) for name, value in fields.items() if name in SHOWN}


def short(value: str) -> str:
    return f"{float(value):.3f}" if "E" in value else value


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the run; its messages while it saves are still shown
    lines = without_crash_report(sys.stdin)
    if not sys.stderr.isatty():
        for line in lines:
            print(line, end="", flush=True)
        return
    with tqdm(unit="step") as bar:
        for line in lines:
            found = ITERATION.search(line)
            if found is None:
                bar.write(line.rstrip())
                continue
            if bar.n == 0:
                bar.initial = bar.n = int(found[1]) - 1  # a resumed run starts in the middle
            bar.total = int(found[2])
            bar.set_postfix(shown_fields(line), refresh=False)
            bar.update(int(found[1]) - bar.n)


if __name__ == "__main__":
    main()
