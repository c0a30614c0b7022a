"""A run that is started again and again, and what is demanded of the processes that have ended."""

import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ltd.errors import EXIT_COMPLETE
from megatron_ltd.train.process.exits import RECORD_NAME
from tests.campaign.processes import Ended, Handicap, Ranks
from tests.hosts import Host
from tests.train.launchers import exit_record
from tests.train.runs import words

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

    @property
    def complete(self) -> bool:
        """Whether the last attempt came to the end of the run."""
        record = self.folder / "checkpoints" / RECORD_NAME
        return record.exists() and exit_record(record.parent)["code"] == EXIT_COMPLETE

    def begin_anew(self) -> None:
        """Forget the complete run, so that the next fault does not find one with nothing left to do."""
        shutil.rmtree(self.folder / "checkpoints")
        self.metrics.unlink()

    def start(self, layout: tuple[int, dict[str, Any]], handicaps: dict[int, Handicap] | None = None,
              hosts: Sequence[Host] = (), **settings: Any) -> Ranks:
        self.attempts += 1
        world_size, places = layout
        command = words({**self.settings, **places, **settings})
        return Ranks(self.recipe, command, world_size, self.folder / "attempts" / str(self.attempts), handicaps, hosts)

    def attempt(self, layout: tuple[int, dict[str, Any]] | None = None,
                disturb: Callable[[Ranks], None] = lambda ranks: None,
                handicaps: dict[int, Handicap] | None = None, hosts: Sequence[Host] = (),
                **settings: Any) -> list[Ended]:
        """Start the run, disturb it, and wait for its end."""
        ranks = self.start(layout or self.choose_layout(), handicaps, hosts, **settings)
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
