"""The faults: each disturbs one attempt of a run, or its files between two attempts, and checks what is said."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ltd.errors import EXIT_ON_SIGNAL, EXIT_PEER_LOST
from tests.campaign.processes import Ended, Handicap, Ranks
from tests.train.launchers import exit_record
from tests.train.runs import words

DATA, CHECKPOINT = 21, 22
ATTEMPT_SECONDS = 120.0


class Broken(Exception):
    """The law was broken.

    Args:
        fault: the last one that was played.
    """

    def __init__(self, what: str, fault: str = ""):
        super().__init__(what)
        self.fault = fault


@dataclass
class Play:
    """A run that is started again and again until it is complete.

    Args:
        folder: of its checkpoints, metrics and cache.
        corpus: a copy of the corpus that may be damaged, by prefix.
        layouts: (number of processes, settings) to choose from.
    """

    chance: random.Random
    folder: Path
    recipe: str
    settings: dict[str, Any]
    corpus: Path
    layouts: list[tuple[int, dict[str, Any]]]
    steps: int
    attempts: int = 0
    last: list[Ended] = field(default_factory=list)

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("iter_*"))

    def choose_layout(self, *, processes: int = 1) -> tuple[int, dict[str, Any]]:
        """A layout of at least so many processes."""
        return self.chance.choice([layout for layout in self.layouts if layout[0] >= processes])

    def start(self, layout: tuple[int, dict[str, Any]], handicaps: dict[int, Handicap] | None = None,
              **settings: Any) -> Ranks:
        self.attempts += 1
        world_size, places = layout
        command = words({**self.settings, **places, **settings})
        return Ranks(self.recipe, command, world_size, self.folder / "attempts" / str(self.attempts), handicaps)

    def attempt(self, layout: tuple[int, dict[str, Any]] | None = None,
                disturb: Callable[[Ranks], None] = lambda ranks: None,
                handicaps: dict[int, Handicap] | None = None, **settings: Any) -> list[Ended]:
        """Start the run, disturb it, and wait for its end."""
        ranks = self.start(layout or self.choose_layout(), handicaps, **settings)
        disturb(ranks)
        try:
            self.last = ranks.finish(ATTEMPT_SECONDS)
        except TimeoutError as error:
            raise Broken(str(error)) from error
        return self.last

    def wait_somewhere(self, ranks: Ranks) -> None:
        """Until a random moment: of the start, of a step, or of a save."""
        if self.chance.random() < 0.2:
            time.sleep(self.chance.uniform(0.0, 1.5))
        else:
            ranks.wait_for_step(self.metrics, self.chance.randrange(1, self.steps), ATTEMPT_SECONDS / 2)
            time.sleep(self.chance.uniform(0.0, 0.2))

    def flip_a_bit(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(data)


def demand(holds: bool, what: str, ended: list[Ended]) -> None:
    if not holds:
        told = "\n".join(f"--- rank {rank}: {end.code}\n{end.said[-1500:]}" for rank, end in enumerate(ended))
        raise Broken(f"{what}\n{told}")


def demand_refusal(play: Play, code: int, name: str) -> None:
    """All processes have ended with a code of the table, and one message names the file."""
    demand({end.code for end in play.last} == {code}, f"every process should have ended with {code}", play.last)
    said = "".join(end.said for end in play.last)
    demand(name in said and "Traceback" not in said, f"the message should name {name}, without a traceback", play.last)


def killed(play: Play) -> str:
    """One process is killed."""
    layout = play.choose_layout()
    victim = play.chance.randrange(layout[0])

    def kill(ranks: Ranks) -> None:
        play.wait_somewhere(ranks)
        ranks.send(victim, signal.SIGKILL)

    ended = play.attempt(layout, kill)
    allowed = {0, EXIT_PEER_LOST, -signal.SIGKILL}
    demand({end.code for end in ended} <= allowed, f"the others should have ended with {EXIT_PEER_LOST}", ended)
    return "survived"


def power_lost(play: Play) -> str:
    """All processes are killed at once."""
    layout = play.choose_layout()

    def kill(ranks: Ranks) -> None:
        play.wait_somewhere(ranks)
        for rank in range(layout[0]):
            ranks.send(rank, signal.SIGKILL)

    play.attempt(layout, kill)
    return "survived"


def half_lost(play: Play) -> str:
    """Half of the processes are killed, and the run continues on half as many."""
    layout = play.choose_layout(processes=2)

    def kill(ranks: Ranks) -> None:
        play.wait_somewhere(ranks)
        for rank in range(layout[0] // 2, layout[0]):
            ranks.send(rank, signal.SIGKILL)

    play.attempt(layout, kill)
    smaller = play.chance.choice([other for other in play.layouts if other[0] <= layout[0] // 2])
    ended = play.attempt(smaller)
    demand({end.code for end in ended} == {0}, "the smaller run should have come to its end", ended)
    return "survived"


def hung(play: Play) -> str:
    """One process stops answering."""
    layout = play.choose_layout(processes=2)
    victim = play.chance.randrange(layout[0])

    def stop(ranks: Ranks) -> None:
        play.wait_somewhere(ranks)
        ranks.send(victim, signal.SIGSTOP)

    ended = play.attempt(layout, stop, distributed_timeout_minutes=0.1)
    demand({end.code for end in ended} <= {0, EXIT_PEER_LOST, -signal.SIGKILL}, "the others should have noticed", ended)
    return "survived"


def signalled(play: Play) -> str:
    """One process is asked to stop, once or twice."""
    layout = play.choose_layout()
    victim = play.chance.randrange(layout[0])
    number = play.chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    times = play.chance.choice([1, 1, 2])

    def ask(ranks: Ranks) -> None:
        ranks.wait_for_step(play.metrics, play.chance.randrange(1, play.steps), ATTEMPT_SECONDS / 2)
        for _ in range(times):
            ranks.send(victim, number)
            time.sleep(play.chance.uniform(0.0, 0.3))

    ended = play.attempt(layout, ask)
    codes = {end.code for end in ended}
    demand(codes in ({0}, {EXIT_ON_SIGNAL}), f"all should have saved and stopped with {EXIT_ON_SIGNAL}", ended)
    record = exit_record(play.folder / "checkpoints")
    demand(play.checkpoints[-1].name == f"iter_{record['step']:07d}", f"exit.json says {record}", ended)
    return "survived"


def disk_full(play: Play) -> str:
    """One process cannot write more than some kilobytes to a file."""
    layout = play.choose_layout()
    victim = play.chance.randrange(layout[0])
    ended = play.attempt(layout, handicaps={victim: Handicap(play.chance.choice([100, 4_000, 20_000]))})
    codes = {end.code for end in ended}
    said = "".join(end.said for end in ended)
    if codes == {0}:
        return "survived"
    demand(codes <= {DATA, CHECKPOINT, EXIT_PEER_LOST} and codes != {EXIT_PEER_LOST} and "Traceback" not in said,
           "a save that fails should be told", ended)
    return "stopped rightly"


def clock_jumps(play: Play) -> str:
    """The clock of one process jumps by up to a year, forwards or back."""
    layout = play.choose_layout()
    victim = play.chance.randrange(layout[0])
    jump = play.chance.choice([-1, 1]) * 10 ** play.chance.uniform(1, 7.5)
    ended = play.attempt(layout, handicaps={victim: Handicap(clock_seconds=jump)})
    demand({end.code for end in ended} == {0}, "the run should not mind its clock", ended)
    return "survived"


def two_runs(play: Play) -> str:
    """The same command is started twice at the same time."""
    layouts = play.choose_layout(), play.choose_layout()
    first = play.start(layouts[0])
    time.sleep(play.chance.uniform(0.0, 2.0))
    second = play.start(layouts[1])
    try:
        ended = first.finish(ATTEMPT_SECONDS) + second.finish(ATTEMPT_SECONDS)
    except TimeoutError as error:
        raise Broken(str(error)) from error
    codes = {end.code for end in ended}
    said = "".join(end.said for end in ended)
    demand(0 in codes and codes <= {0, CHECKPOINT, EXIT_PEER_LOST} and "Traceback" not in said,
           "one of two runs in a folder should come to its end, and the other say why it does not", ended)
    return "survived"


def _with_a_checkpoint(play: Play) -> None:
    """Train until there are two checkpoints, so that one may be damaged."""
    if len(play.checkpoints) < 2:
        play.attempt(exit_interval=play.settings["save_interval"] * 2)


def checkpoint_flipped(play: Play) -> str:
    """A bit of the newest checkpoint is flipped, in weights or manifest."""
    _with_a_checkpoint(play)
    newest = play.checkpoints[-1]
    play.flip_a_bit(play.chance.choice(sorted(newest.iterdir())))
    play.attempt()
    demand_refusal(play, CHECKPOINT, newest.name)
    ended = play.attempt(load_fallback=True)
    demand({end.code for end in ended} == {0}, "--load-fallback should have continued from an older one", ended)
    return "stopped rightly"


def tracker_flipped(play: Play) -> str:
    """A bit of the file that names the newest checkpoint is flipped."""
    _with_a_checkpoint(play)
    tracker = play.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    good = tracker.read_bytes()
    play.flip_a_bit(tracker)
    ended = play.attempt()
    if {end.code for end in ended} == {0}:
        return "survived"
    demand_refusal(play, CHECKPOINT, tracker.name)
    tracker.write_bytes(good)
    return "stopped rightly"


def _damaged_corpus(play: Play, path: Path, damage: Callable[[Path], None], **settings: Any) -> str:
    good = path.read_bytes()
    damage(path)
    ended = play.attempt(**settings)
    if {end.code for end in ended} == {0}:
        path.write_bytes(good)
        return "survived"
    demand_refusal(play, DATA, path.name)
    path.write_bytes(good)
    return "stopped rightly"


def corpus_flipped(play: Play) -> str:
    """A bit of the corpus is flipped, and the run is started with --verify-corpus."""
    return _damaged_corpus(play, Path(f"{play.corpus}.bin"), play.flip_a_bit, verify_corpus=True)


def index_flipped(play: Play) -> str:
    """A bit of the corpus's index is flipped."""
    return _damaged_corpus(play, Path(f"{play.corpus}.idx"), play.flip_a_bit)


def sidecar_flipped(play: Play) -> str:
    """A bit of the corpus's manifest is flipped."""
    return _damaged_corpus(play, Path(f"{play.corpus}.manifest.json"), play.flip_a_bit)


def corpus_cut(play: Play) -> str:
    """The corpus has lost its end."""
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-play.chance.randrange(1, 5000)])

    return _damaged_corpus(play, Path(f"{play.corpus}.bin"), cut)


def cache_flipped(play: Play) -> str:
    """A bit of the cached sample index is flipped."""
    files = sorted(path for path in (play.folder / "cache").rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        play.attempt(exit_interval=2)
        files = sorted(path for path in (play.folder / "cache").rglob("*") if path.is_file() and path.stat().st_size)
    damaged = play.chance.choice(files)
    play.flip_a_bit(damaged)
    ended = play.attempt()
    if {end.code for end in ended} == {0}:
        return "survived"
    demand_refusal(play, DATA, damaged.name)
    for path in files:
        path.unlink()
    return "stopped rightly"


FAULTS: dict[str, Callable[[Play], str]] = {
    function.__name__.replace("_", " "): function for function in (
        killed, power_lost, half_lost, hung, signalled, disk_full, clock_jumps, two_runs, checkpoint_flipped,
        tracker_flipped, corpus_flipped, index_flipped, sidecar_flipped, corpus_cut, cache_flipped)}
