"""Processor time of gloo's collectives alone, and what their implementation makes of it.

torch gathers by gloo's ring into a buffer that it copies to the result, and reduces and scatters by copying the input,
reducing it everywhere and copying a share of that (`ProcessGroupGloo.cpp`; `allreduce.cc` and `allgather.cc` of gloo).
Of n bytes that d processes gather or reduce, each of them

                sends and receives      copies and adds, in bytes read and written      in messages
    gather      (d - 1) / d n           2 n / d + 2 n                                   2 (d - 1) or more
    reduce      2 (d - 1) / d n         3 (d - 1) / d n                                 4 (d - 1) or more
    scatter     2 (d - 1) / d n         2 n + 3 (d - 1) / d n + 2 n / d                 4 (d - 1) or more

where to reduce leaves the sum everywhere, and to scatter leaves a share of it on each. A message costs time of its own,
for the threads that it wakes.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from benchmarks.together import run_together

SIZES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)
PROCESSES = (2, 4)
_CALLS = 20


class Moved(NamedTuple):
    """What a process moves for each byte that is gathered or reduced.

    Args:
        link: sent, and as many received.
        memory: read and written by copies and sums.
        messages: sent in a call, at least.
    """

    link: float
    memory: float
    messages: int


def gathered(members: int) -> Moved:
    """For each byte of the result, to which every member gives a share."""
    return Moved((members - 1) / members, 2 / members + 2, 2 * (members - 1))


def reduced(members: int) -> Moved:
    """For each byte of what is summed, where the sum is left everywhere."""
    return Moved(2 * (members - 1) / members, 3 * (members - 1) / members, 4 * (members - 1))


def scattered(members: int) -> Moved:
    """For each byte of what is summed, where a share of the sum is left on each."""
    link, memory, messages = reduced(members)
    return Moved(link, memory + 2 + 2 / members, messages)


KINDS = {"gather": gathered, "reduce": reduced, "scatter": scattered}


def _process(rank: int, members: int, folder: str) -> None:
    """Write down the processor time of each collective and size."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    from megatron_ltd.parallel import collectives

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/rendezvous", members)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=members, timeout=timedelta(minutes=5))
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, float] = {}
    for size in SIZES:
        whole, share = torch.ones(size // 4), torch.ones(size // 4 // members)
        calls = {"gather": lambda share=share: collectives.all_gather(share, group),
                 "reduce": lambda whole=whole: dist.all_reduce(whole, group=group),
                 "scatter": lambda whole=whole: collectives.reduce_scatter(whole, group)}
        for kind, call in calls.items():
            times = []
            for _ in range(_CALLS):
                dist.barrier()
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            found[f"{kind}/{size}"] = statistics.median(times[2:])
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured_seconds() -> dict[tuple[str, int, int], float]:
    """Processor time of a call on one process, by kind, processes and bytes."""
    context, found = multiprocessing.get_context("spawn"), {}
    for members in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            processes = [context.Process(target=_process, args=(rank, members, folder)) for rank in range(members)]
            run_together(processes, f"collectives of {members} processes")
            ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(members)]
        for kind in KINDS:
            for size in SIZES:
                found[kind, members, size] = statistics.mean(times[f"{kind}/{size}"] for times in ranks)
    return found


def collectives_table() -> str:
    """Measured beside what bytes and messages mean at the three costs that fit best, and how far each is off."""
    import numpy as np

    found = measured_seconds()
    kinds = [(kind, members) for kind in KINDS for members in PROCESSES]
    moved = {(kind, members): KINDS[kind](members) for kind, members in kinds}

    def costs(kind: str, members: int, size: int) -> list[float]:
        each = moved[kind, members]
        return [each.link * size, each.memory * size, each.messages]

    rows = [[cost / seconds for cost in costs(*key)] for key, seconds in found.items()]  # relative errors are minimised
    link, memory, message = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    lines = ["| collective | processes | sent, and received | copied and added | messages | "
             + " | ".join(f"{size / 2**20:g} MiB, ms" for size in SIZES) + " |",
             "|---|--:|--:|--:|--:|" + "--:|" * len(SIZES)]
    for kind, members in kinds:
        cells = []
        for size in SIZES:
            seconds = found[kind, members, size]
            guess = float(np.dot(costs(kind, members, size), (link, memory, message)))
            cells.append(f"{1e3 * seconds:.2f} ({guess / seconds - 1:+.0%})")
        each = moved[kind, members]
        lines.append(f"| {kind} | {members} | {each.link:.2f} n | {each.memory:.2f} n | {each.messages} | "
                     f"{' | '.join(cells)} |")
    return "\n".join([*lines, "", f"in brackets by arithmetic, with {1e-9 / link:.2f} GB/s sent and received, "
                                  f"{1e-9 / memory:.1f} GB/s read and written, and {1e6 * message:.0f} us a message"])
