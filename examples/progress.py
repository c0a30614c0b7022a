"""Show a training run that writes Megatron's log lines to standard input as one progress bar.

On a terminal the `iteration N/ M | ...` lines drive the bar and everything else is printed above it; elsewhere
every line is passed on as it is, so that a log file stays a log file.

    torchrun ... -m megatron_ltd.pretrain_gpt ... 2>&1 | python examples/progress.py
"""

import re
import signal
import sys

from tqdm import tqdm

ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+)")
SHOWN = {"lm loss": "loss", "kept length": "kept", "grad norm": "norm"}


def shown_fields(line: str) -> dict[str, str]:
    """The few fields of a log line that fit beside the bar."""
    fields = dict(part.strip().split(":", 1) for part in line.split("|") if ":" in part)
    return {SHOWN[name]: _short(value) for name, value in fields.items() if name in SHOWN}


def _short(value: str) -> str:
    text = value.strip().split()[0] if value.strip() else ""
    return f"{float(text):.3f}" if "E" in text else text


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the run; what it says while it saves is still shown
    if not sys.stderr.isatty():
        for line in sys.stdin:
            print(line, end="", flush=True)
        return
    with tqdm(unit="step", dynamic_ncols=True, disable=None) as bar:
        for line in sys.stdin:
            found = ITERATION.search(line)
            if found is None:
                bar.write(line.rstrip())
                continue
            if bar.n == 0:
                bar.initial = int(found[1]) - 1  # a resumed run starts in the middle
            bar.total = int(found[2])
            bar.set_postfix(shown_fields(line), refresh=False)
            bar.update(int(found[1]) - bar.n)


if __name__ == "__main__":
    main()
