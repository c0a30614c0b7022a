"""Elastic runs on three hosts of two processes, each with a fault of the network or of a host; writes the table of
docs/reliability.md.

    python -m tests.extra.several_hosts --work /tmp/hosts --output hosts.md [--only link-down ...]

Takes about a minute a fault on an idle machine, so it is no test. Needs root, for network namespaces, as
`tests/hosts.py` says. A row fails where an exit code, the curve, or the steps that were trained again are not as
promised; times are reported only.
"""

import argparse
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hosts import Host, network, why_not
from tests.train.launchers import ROOT
from tests.train.runs import TINY, Corpus, read_lines, run, words, write_corpus

STEPS, SAVE_INTERVAL, FAULT_STEP, PORT = 60, 8, 20, 29500
NOTICED = re.compile(r"stopped, since another process|lost the node at which|did not meet|Timed out|timed out")
SETTINGS: dict[str, Any] = {**TINY, "train_iters": STEPS, "random_ltd_steps": STEPS, "global_batch_size": 24,
                            "eval_interval": 10_000, "distributed_timeout_minutes": 0.25}


@dataclass
class Trial:
    """A run on these hosts, and what was seen of it."""

    folder: Path
    hosts: list[Host]
    flags: dict[str, Any]
    variables: dict[str, str]
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    seen: dict[Path, int] = field(default_factory=dict)
    """Of each log: the lines that have been read."""
    steps: list[tuple[float, int]] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)
    fault_at: float = 0.0
    lost: int | None = None
    """The host that the others have to go on without; what it notices does not count."""

    def start(self, *numbers: int) -> None:
        for number in numbers:
            self.processes[number] = self.hosts[number].start(
                ["bash", str(ROOT / "examples" / "pretrain_gpt.sh"), *words(self.flags)],
                self.folder / f"host-{number}-{len(self.hosts[number].started)}.log", self.variables)

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("host-*.log"))

    def look(self) -> None:
        """Read what the hosts have said since, at about the time they said it."""
        now = time.monotonic()
        for path in self.logs():
            lines = path.read_text(errors="replace").splitlines()
            for line in lines[self.seen.get(path, 0):]:
                step = re.search(r"iteration\s+(\d+)/", line)
                if step:
                    self.steps.append((now, int(step[1])))
                elif NOTICED.search(line) and self.fault_at and not path.name.startswith(f"host-{self.lost}-"):
                    self.noticed.append(now)
            self.seen[path] = len(lines)

    def wait_for_step(self, step: int, since: float = 0.0, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not any(at >= since and number >= step for at, number in self.steps):
            self.look()
            if time.monotonic() > deadline or all(process.poll() is not None for process in self.processes.values()):
                raise AssertionError(f"{self.folder} did not come so far within {seconds:.0f} s")
            time.sleep(0.05)

    def fault(self, lost: int | None = None) -> None:
        """From now on the clock runs.

        Args:
            lost: the host that is hit.
        """
        self.look()
        self.fault_at, self.lost = time.monotonic(), lost

    def finish(self, *numbers: int, seconds: float = 500) -> list[int | None]:
        deadline = time.monotonic() + seconds
        while any(self.processes[number].poll() is None for number in numbers) and time.monotonic() < deadline:
            self.look()
            time.sleep(0.1)
        self.look()
        return [self.processes[number].poll() for number in numbers]

    def recovery(self) -> tuple[float, float, int]:
        """Seconds from the fault until it was noticed and from then to the next step, and the steps trained again."""
        before = max(step for at, step in self.steps if at <= self.fault_at)
        resumed_at, resumed = next(
            ((at, step) for at, step in self.steps if at > self.fault_at + 0.5 and step <= before
             and at > (self.noticed[0] if self.noticed else 0)), (float("nan"), before + 1))
        noticed = self.noticed[0] if self.noticed else resumed_at
        return noticed - self.fault_at, resumed_at - noticed, before + 1 - resumed


def no_fault(trial: Trial) -> list[int | None]:
    trial.start(0, 1, 2)
    return trial.finish(0, 1, 2)


def link_down(number: int, comes_back: bool) -> Callable[[Trial], list[int | None]]:
    def play(trial: Trial) -> list[int | None]:
        trial.start(0, 1, 2)
        trial.wait_for_step(FAULT_STEP)
        trial.fault(number)
        trial.hosts[number].cable.cut = True
        others = [other for other in range(3) if other != number]
        trial.wait_for_step(FAULT_STEP + SAVE_INTERVAL, trial.fault_at)
        if comes_back:
            trial.hosts[number].cable.cut = False
            return trial.finish(0, 1, 2)
        return trial.finish(*others)

    return play


def power_off(number: int) -> Callable[[Trial], list[int | None]]:
    def play(trial: Trial) -> list[int | None]:
        trial.start(0, 1, 2)
        trial.wait_for_step(FAULT_STEP)
        trial.fault(number)
        trial.hosts[number].lose_power()
        return trial.finish(*(other for other in range(3) if other != number))

    return play


def killed(number: int) -> Callable[[Trial], list[int | None]]:
    def play(trial: Trial) -> list[int | None]:
        trial.start(0, 1, 2)
        trial.wait_for_step(FAULT_STEP)
        trial.fault(number)
        trial.hosts[number].kill()
        trial.wait_for_step(FAULT_STEP + SAVE_INTERVAL, trial.fault_at)
        trial.start(number)
        return trial.finish(0, 1, 2)

    return play


def slow_and_lossy(trial: Trial) -> list[int | None]:
    trial.start(0, 1, 2)
    trial.wait_for_step(FAULT_STEP)
    trial.fault()
    for host in trial.hosts:
        host.cable.delay_seconds, host.cable.loss = 0.01, 0.01
    trial.wait_for_step(FAULT_STEP + 20)
    for host in trial.hosts:
        host.cable.delay_seconds, host.cable.loss = 0.0, 0.0
    return trial.finish(0, 1, 2)


def port_taken(trial: Trial) -> list[int | None]:
    """Another program listens at the first meeting place."""
    listen = f"import socket, time; s = socket.create_server(('', {PORT})); time.sleep(1000)"
    trial.hosts[0].start([sys.executable, "-c", listen], trial.folder / "listener.log", {})
    time.sleep(1)
    trial.start(0, 1, 2)
    return trial.finish(0, 1, 2)


def own_name_is_loopback(trial: Trial) -> list[int | None]:
    """As Debian sets it up: on each host its own name is 127.0.1.1."""
    for host in trial.hosts:
        names = {"localhost": "127.0.0.1"} | {other.name: other.address for other in trial.hosts}
        host.set_names(names | {host.name: "127.0.1.1"})
    trial.start(0, 1, 2)
    return trial.finish(0, 1, 2)


def name_unknown(trial: Trial) -> list[int | None]:
    """No host's name is known to the others; the meeting places are addresses."""
    for host in trial.hosts:
        host.set_names({"localhost": "127.0.0.1"})
    trial.variables["RDZV_HOSTS"] = ",".join(host.address for host in trial.hosts)
    trial.start(0, 1, 2)
    return trial.finish(0, 1, 2)


TRIALS: dict[str, tuple[str, Callable[[Trial], list[int | None]]]] = {
    "no-fault": ("none", no_fault),
    "link-down": ("the link of a host goes down for good", link_down(2, comes_back=False)),
    "link-back": ("the link of a host goes down, and comes back", link_down(2, comes_back=True)),
    "meeting-link-back": ("the link of the meeting host goes down, and comes back",
                          link_down(0, comes_back=True)),
    "power-off": ("a host loses power", power_off(2)),
    "meeting-power-off": ("the meeting host loses power", power_off(0)),
    "killed": ("all processes of a host are killed, and its launcher is started again", killed(1)),
    "meeting-killed": ("the same on the meeting host", killed(0)),
    "slow": ("for 20 steps every packet takes 20 ms longer, and 2 of 100 are lost", slow_and_lossy),
    "port-taken": ("another program has the port of the first meeting place", port_taken),
    "own-loopback": ("each host's own name resolves to 127.0.1.1", own_name_is_loopback),
    "name-unknown": ("the hosts do not know each other's names", name_unknown),
}


def play(name: str, folder: Path, corpus: Corpus, truth: list[dict[str, Any]]) -> tuple[str, bool]:
    """One row of the table, and whether all was as promised."""
    folder.mkdir(parents=True)
    checkpoints = str(folder / "checkpoints")
    flags = {**SETTINGS, **corpus.settings, "save": checkpoints, "load": checkpoints, "save_interval": SAVE_INTERVAL,
             "metrics_file": str(folder / "metrics.jsonl")}
    title, fault = TRIALS[name]
    with ExitStack() as stack:
        hosts = stack.enter_context(network(3))
        variables = {"GPUS_PER_NODE": "2", "NNODES": "2:3", "MASTER_PORT": str(PORT),
                     "RDZV_HOSTS": ",".join(host.name for host in hosts)}
        trial = Trial(folder, hosts, flags, variables)
        started = time.monotonic()
        problem = ""
        try:
            codes = fault(trial)
        except AssertionError as error:
            codes, problem = [process.poll() for process in trial.processes.values()], str(error)
        seconds = time.monotonic() - started
    found = read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    of_step = {line["step"]: line["lm_loss"] for line in truth if "lm_loss" in line}
    curve = {line["step"]: line["lm_loss"] for line in found if "lm_loss" in line}
    worst = max((abs(curve[step] / of_step[step] - 1) for step in curve if step in of_step), default=float("nan"))
    noticed, recovered, again = trial.recovery() if trial.fault_at and trial.steps else (float("nan"),) * 2 + (0,)
    sound = set(codes) == {0} and curve.keys() == of_step.keys() and worst < 1e-5 and again <= SAVE_INTERVAL
    if problem:
        print(problem, file=sys.stderr)
    times = " | ".join("" if math.isnan(passed) else f"{passed:.1f} s" for passed in (noticed, recovered))
    return (f"| {title} | {', '.join(map(str, codes))} | {times} | {again} | {worst:.0e} | "
            f"{seconds:.0f} s | {'as promised' if sound else 'NOT AS PROMISED'} |"), sound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    options = parser.parse_args()
    if why_not():
        sys.exit(f"several hosts on this machine: {why_not()}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts end with this process
    options.work.mkdir(parents=True)
    corpus = write_corpus(options.work)
    truth = run(options.work, {**SETTINGS, **corpus.settings}, timeout=600).lines
    rows = ["| fault | exit codes | noticed after | next step after | steps trained again | largest difference of the "
            "curve | whole run | result |", "|---|---|---|---|---|---|---|---|"]
    all_sound = True
    for name in options.only:
        row, sound = play(name, options.work / name, corpus, truth)
        print(row, flush=True)
        rows.append(row)
        all_sound = all_sound and sound
        options.output.write_text("\n".join(rows) + "\n")
    return 0 if all_sound else 1


if __name__ == "__main__":
    sys.exit(main())
