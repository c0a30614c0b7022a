"""A run of many processes has many connections."""

import resource
from typing import Any

from tests.gloo import launch_ranks
from tests.train.refusals import RUN
from tests.train.runs import Corpus, pretrain


def pretrain_with_room_for_few_files(rank: int, world_size: int, init_method: str, settings: dict[str, Any]
                                     ) -> tuple[int, tuple[int, int]]:
    """The exit code, and the limits on open files at the end."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    code = pretrain(rank, world_size, init_method, settings).code
    return code, resource.getrlimit(resource.RLIMIT_NOFILE)


def test_a_run_may_open_as_many_files_as_the_system_permits(corpus: Corpus) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = launch_ranks(pretrain_with_room_for_few_files, 2, {**RUN, **corpus.settings, "train_iters": 1}, timeout=60)
    assert found == [(0, (hard, hard))] * 2
