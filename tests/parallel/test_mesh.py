"""The rank grid of eight processes, against the documented formula."""

from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_ltd.parallel.mesh import Mesh, build_mesh
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.gloo import run_ranks

TIMEOUT = timedelta(seconds=47)


def members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def grid(rank: int, world_size: int, pp: int, dp: int, tp: int, shard_parameters: bool) -> dict[str, object]:
    mesh: Mesh = build_mesh("cpu", pp=pp, dp=dp, tp=tp, shard_parameters=shard_parameters, timeout=TIMEOUT)
    groups = [mesh.world[axis].get_group() for axis in ("tp", "pp", "dp_replicate", "dp_shard")]
    return {
        "place": (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank), "sizes": (mesh.pp_size, mesh.dp_size, mesh.tp_size),
        "tp": members(mesh.tp.get_group()), "pp": members(mesh.pp_group), "data": tuple(mesh.data.mesh.shape),
        "dp": mesh.data.mesh.flatten().tolist(),
        "timeouts": {timeout_of(group) for group in groups},
    }


@pytest.mark.parametrize(("pp", "dp", "tp", "shard"), [(2, 2, 2, False), (2, 2, 2, True), (4, 1, 2, False),
                                                        (1, 4, 2, True)])
def test_every_rank_has_its_place(pp: int, dp: int, tp: int, shard: bool) -> None:
    def rank_at(p: int, d: int, t: int) -> int:
        return (p * dp + d) * tp + t

    for rank, found in enumerate(run_ranks(grid, pp * dp * tp, pp, dp, tp, shard)):
        p, d, t = rank // (dp * tp), rank // tp % dp, rank % tp
        assert found == {
            "place": (p, d, t), "sizes": (pp, dp, tp), "tp": [rank_at(p, d, i) for i in range(tp)],
            "pp": [rank_at(i, d, t) for i in range(pp)], "dp": [rank_at(p, i, t) for i in range(dp)],
            "data": (dp,) if shard or dp == 1 else (dp, 1),
            "timeouts": {TIMEOUT},
        }


def groups_made(rank: int, world_size: int) -> int:
    """How many groups a run makes, which all its processes wait for, besides the axes of its mesh."""
    config, _ = parse_run_config(["--num-layers", "4", "--hidden-size", "8", "--num-attention-heads", "2",
                                  "--pipeline-model-parallel-size", "2"], "gpt")
    place = Launch(rank, rank, world_size, None)
    with mock.patch.object(launch, "attempt_store"), mock.patch.object(dist, "init_process_group"), \
            mock.patch.object(dist, "new_group", wraps=dist.new_group) as new:
        launch.start(config, place)
    return sum(len(call.args) == 1 for call in new.call_args_list)


def test_the_number_of_groups_does_not_grow_with_that_of_processes() -> None:
    assert run_ranks(groups_made, 4) == [0] * 4


def unanswered(rank: int, world_size: int, axis: str) -> list[str]:
    """What a rank is told that sends to, and receives from, a rank of its axis that does neither."""
    sizes = {"pp": 1, "dp": 1, "tp": 1, axis: 2, "tp" if axis == "pp" else "pp": 2}
    mesh = build_mesh("cpu", **sizes, shard_parameters=axis == "dp", timeout=timedelta(seconds=1))
    group = mesh.world["dp_shard" if axis == "dp" else axis].get_group()
    dist.barrier()  # over the default group, whose timeout is another
    errors = []
    if rank == 0:
        for transfer in (dist.isend, dist.irecv):
            try:
                transfer(torch.zeros(1 << 20), members(group)[1], group=group).wait()
            except RuntimeError as error:
                errors.append(str(error))
    dist.barrier()
    return errors


@pytest.mark.parametrize("axis", ["pp", "dp", "tp"])
def test_a_message_that_nobody_takes_or_sends_fails_at_the_timeout(axis: str) -> None:
    told, *_ = run_ranks(unanswered, 4, axis, timeout=15)
    sending, receiving = told
    assert "Timed out" in sending and "timeout" in receiving  # the second one finds what the first one has closed
