"""The faults: each disturbs one attempt of a run, or its files between two attempts, and checks what is said."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ltd.errors import EXIT_ON_SIGNAL, EXIT_PEER_LOST
from tests.campaign.play import ATTEMPT_SECONDS, Broken, Play, demand, demand_refusal
from tests.campaign.processes import Ended, Handicap, Ranks
from tests.hosts import network
from tests.train.launchers import exit_record

DATA, CHECKPOINT = 21, 22
PAGE_BYTES = 4096


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


def lost_link(play: Play) -> str:
    """The network between two hosts is silent for a moment, or from now on."""
    layout = play.choose_layout(processes=2)
    outage = play.chance.choice([0.3, 1.0, ATTEMPT_SECONDS])

    def cut(ranks: Ranks) -> None:
        play.wait_somewhere(ranks)
        hosts[1].cable.cut = True
        if outage < ATTEMPT_SECONDS:
            time.sleep(outage)
            hosts[1].cable.cut = False

    timeout = {"distributed_timeout_minutes": 0.1} if outage == ATTEMPT_SECONDS else {}
    with network(2) as hosts:
        ended = play.attempt(layout, cut, hosts=hosts, **timeout)
    allowed = {0, EXIT_PEER_LOST, -signal.SIGKILL} if timeout else {0}
    demand({end.code for end in ended} <= allowed, f"a link lost for {outage} s should end with {allowed}", ended)
    return "survived"


def files_limited(play: Play) -> str:
    """One process cannot write more than some kilobytes to a file."""
    layout = play.choose_layout()
    victim = play.chance.randrange(layout[0])
    return _failed_save(play.attempt(layout, handicaps={victim: Handicap(play.chance.choice([100, 4_000, 20_000]))}))


def disk_full(play: Play) -> str:
    """The file system of the checkpoints has space for little or nothing."""
    with _small_disk(play.folder / "checkpoints", play.chance.choice([0, 4_096, 300_000, 2_000_000])):
        return _failed_save(play.attempt())


@contextmanager
def _small_disk(folder: Path, free_bytes: int) -> Iterator[None]:
    """Meanwhile the folder is a file system of its own, with so much space left."""
    aside = folder.with_name("aside")
    folder.mkdir(exist_ok=True)
    folder.rename(aside)
    folder.mkdir()
    pages = sum(-(-path.stat().st_size // PAGE_BYTES) for path in aside.rglob("*") if path.is_file())
    size = (pages * PAGE_BYTES + free_bytes) or PAGE_BYTES  # 0 would mean any size
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
        shutil.rmtree(aside)
        shutil.copytree(folder, aside)
    finally:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    aside.rename(folder)


def _failed_save(ended: list[Ended]) -> str:
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
    end = _damaged_corpus(play, Path(f"{play.corpus}.bin"), play.flip_a_bit, verify_corpus=True)
    demand(end != "survived", "another token should not have been read", play.last)
    return end


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
        killed, power_lost, half_lost, hung, signalled, files_limited, clock_jumps, two_runs, checkpoint_flipped,
        tracker_flipped, corpus_flipped, index_flipped, sidecar_flipped, corpus_cut, cache_flipped, lost_link,
        disk_full)}
FOR_ROOT = {"lost link", "disk full"}
