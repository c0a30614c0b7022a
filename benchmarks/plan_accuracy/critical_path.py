"""The time of a step as if every process had a core of its own, from processor time alone.

On a machine with fewer cores than processes, or with other work, the time on the wall says little. Here each process
notes its processor time wherever it starts or finishes communicating. Afterwards the notes are replayed: a collective
ends once its last member has come to it, what is received was sent before, and between notes a process's clock advances
by the processor time it used.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

COLLECTIVES = ("allreduce", "allreduce_coalesced", "all_gather_single", "all_gather_single_coalesced",
               "_allgather_base", "allgather_into_tensor_coalesced", "allgather", "reduce_scatter_single",
               "_reduce_scatter_base", "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced",
               "reduce_scatter", "broadcast", "all_to_all_single", "alltoall_base", "gather", "scatter")
"""Methods of torch's process groups, old names and new."""


class Note(NamedTuple):
    """Args:
        kind: `start` of a communication, `finish` of one that was started, or `end` of the step.
        key: which one, the same on all its processes: the group, for a message also sender and receiver, and a number.
        receives: whether to finish means that others have started.
        members: processes that take part, or the sender of a message.
        seconds: processor time of the process so far.
    """

    kind: str
    key: tuple[Any, ...]
    receives: bool
    members: tuple[int, ...]
    seconds: float


class Notebook:
    """Notes of this process, while `kept()`."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self._counts: defaultdict[tuple[Any, ...], int] = defaultdict(int)
        self._waiting: dict[int, tuple[Any, Note]] = {}

    def begin(self) -> None:
        """A new step."""
        self.notes = [Note("begin", (), False, (), time.process_time())]
        self._counts.clear()
        self._waiting.clear()

    def end(self) -> list[Note]:
        return [*self.notes, Note("end", (), False, (), time.process_time())]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Notes whatever is communicated meanwhile."""
        import torch.distributed as dist

        group, work = dist.ProcessGroup, dist.Work
        names = [name for name in (*COLLECTIVES, "send", "recv") if hasattr(group, name)]
        patches = [patch.object(group, name, self._starting(getattr(group, name), name, dist)) for name in names]
        patches.append(patch.object(work, "wait", self._finishing(work.wait)))
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()

    def _starting(self, original: Any, name: str, dist: Any) -> Any:
        def start(group: Any, *args: Any, **kwargs: Any) -> Any:
            members = tuple(dist.get_process_group_ranks(group))
            me, key = members[group.rank()], (group.group_name,)
            if name in ("send", "recv"):
                other = members[args[1]]
                key, members = (*key, *((me, other) if name == "send" else (other, me))), (other,)
            count = self._counts[name == "recv", key]
            self._counts[name == "recv", key] += 1
            note = Note("start", (*key, count), name != "send", members, time.process_time())
            self.notes.append(note)
            found = original(group, *args, **kwargs)
            self._waiting[id(found)] = found, note  # held, so that its id stays its own
            return found
        return start

    def _finishing(self, original: Any) -> Any:
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(work, *args, **kwargs)
            if id(work) in self._waiting:
                note = self._waiting.pop(id(work))[1]
                self.notes.append(note._replace(kind="finish", seconds=time.process_time()))
            return found
        return wait


def critical_seconds(notes: Sequence[Sequence[Note]]) -> float:
    """The time of a step from the notes of all its processes."""
    clocks, places = [0.0] * len(notes), [1] * len(notes)
    started: dict[tuple[int, tuple[Any, ...]], float] = {}
    while any(place < len(mine) for place, mine in zip(places, notes, strict=True)):
        before = list(places)
        for rank, mine in enumerate(notes):
            while places[rank] < len(mine):
                note = mine[places[rank]]
                if note.kind == "finish" and note.receives:
                    needs = [(member, note.key) for member in note.members]
                    if not all(need in started for need in needs):
                        break
                    clocks[rank] = max(clocks[rank], *(started[need] for need in needs))
                clocks[rank] += note.seconds - mine[places[rank] - 1].seconds
                if note.kind == "start" and not (note.receives and len(note.members) == 1 and note.members[0] != rank):
                    started[rank, note.key] = clocks[rank]
                places[rank] += 1
        assert places != before, "a process waits for what nobody starts"
    return max(clocks)


def communication_seconds(notes: Sequence[Note]) -> float:
    """Processor time of one process in communication that it waits for at once."""
    return sum(after.seconds - note.seconds for note, after in zip(notes, notes[1:], strict=False)
               if note.kind == "start" and after.kind == "finish" and note.key == after.key)
