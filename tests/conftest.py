"""What all tests share: repeatable property tests, and the one way to the public test data."""

import gc
import os
import random
import signal
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=50, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow])  # a busy machine is no fault of the code
hypothesis.settings.load_profile("repeatable")


LONG = ("tests/train/", "tests/examples/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first, so that at the end no core waits for another."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(autouse=True, scope="session")
def interrupts_are_heard() -> None:
    """A shell starts what runs in its background with SIGINT ignored, nohup starts anything with SIGHUP ignored, and
    processes of tests would inherit that. Of a handler they inherit the default; this process goes on after SIGHUP."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_", "MASTER_", "TORCHELASTIC_", "NNODES", "NODE_RANK",
                "GPUS_PER_NODE", "RDZV_HOSTS", "CONFIG", "MEGATRON_LTD_MOST_PROCESSES", "SLURM_", "PET_", "SKYPILOT_",
                "KUBEFLOW_")
"""Beginnings of variables by which launchers and clusters tell a process its place, and of the launch scripts."""


@pytest.fixture(autouse=True, scope="session")
def nobody_tells_a_place() -> None:
    """The tests may be a job of a cluster themselves; what they start would take its place for their own."""
    for name in [name for name in os.environ if name.startswith(OF_LAUNCHERS)]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def generators_start_anew() -> None:
    """What a test draws without a seed of its own is the same whichever tests this process has run before."""
    random.seed(1)
    np.random.seed(1)
    torch.default_generator.manual_seed(1)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums in a fixed order, and no competition between the processes of a distributed test."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def earlier_objects_are_passed_over() -> None:
    """Half a million objects of imported libraries make every full collection slow: it leaves them out from here on."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public test data; tests that use it are skipped where MEGATRON_LTD_DATA is not set."""
    folder = os.environ.get("MEGATRON_LTD_DATA")
    if not folder:
        pytest.skip("MEGATRON_LTD_DATA is not set")
    path = Path(folder)
    assert path.is_dir(), f"MEGATRON_LTD_DATA = {folder} is not a folder"
    return path
