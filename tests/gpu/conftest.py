"""Tests that need a GPU skip themselves without one; all of them carry the marker `gpu`."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron_ltd.parallel.mesh import Mesh, build_mesh
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.launch import Runtime
from tests.gpu.small import settings

DEVICE = "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def gpu() -> Iterator[Runtime]:
    """This process on the first GPU, with a process group that serves CPU tensors too."""
    runtime = launch.start(settings(), Launch())
    assert runtime.device.type == DEVICE
    yield runtime
    launch.stop()


@pytest.fixture(scope="session")
def cpu_mesh(gpu: Runtime) -> Mesh:
    """The same process on its CPU, the reference."""
    return build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(minutes=1))
