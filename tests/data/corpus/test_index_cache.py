"""An index that was damaged, is of another corpus or older code, or is built by many at once is never served wrong."""

import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ltd.data.corpus import index_cache
from megatron_ltd.data.corpus.index_cache import Arrays, cached_arrays
from megatron_ltd.errors import DataError
from tests.checkpoint.faults import count_operations, killed_at, refused_at

KEY: dict[str, Any] = {"corpus": "abc", "seed": 1}


def arrays(seed: int = 1, rows: int = 5) -> Arrays:
    numbers = np.random.default_rng(seed)
    return (numbers.integers(0, 99, (rows, 2), dtype=np.int32), numbers.integers(0, 9, rows).astype(np.uint64),
            np.empty(0, dtype=np.int16))


def same(found: Arrays, expected: Arrays) -> bool:
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and (a == b).all() for a, b in zip(found, expected, strict=True))


class Builder:
    """`build` that counts its calls."""

    def __init__(self, made: Arrays | None = None):
        self.calls, self.made = 0, made or arrays()

    def __call__(self) -> Arrays:
        self.calls += 1
        return self.made


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.index")
    return path


def test_arrays_come_from_the_folder_with_their_types_and_shapes(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(3):
        assert same(cached_arrays(str(tmp_path / "new" / "folder"), KEY, build), arrays())
    assert build.calls == 1
    assert same(cached_arrays(None, KEY, build), arrays()) and build.calls == 2


def test_every_flip_and_every_cut_means_building_again(tmp_path: Path) -> None:
    cached_arrays(str(tmp_path), KEY, Builder())
    path = only_file(tmp_path)
    whole = path.read_bytes()
    text = json.dumps({**KEY, "code_version": index_cache.CODE_VERSION}, sort_keys=True).encode()
    assert index_cache._read(str(path), b"another key") is None
    found = index_cache._read(str(path), text)
    assert found is not None and same(found, arrays())
    flipped = (whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1:]
               for at, change in itertools.product(range(len(whole)), (1, 0x80)))
    cut = (whole[:size] for size in range(0, len(whole), 3))
    for damaged in itertools.chain(flipped, cut, (whole + b"\0", bytes(len(whole)))):
        path.write_bytes(damaged)
        assert index_cache._read(str(path), text) is None
    build = Builder()
    assert same(cached_arrays(str(tmp_path), KEY, build), arrays()) and build.calls == 1
    assert path.read_bytes() == whole


def test_another_key_and_other_code_build_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_arrays(str(tmp_path), KEY, Builder())
    first = only_file(tmp_path)
    build = Builder(arrays(2))
    assert same(cached_arrays(str(tmp_path), {**KEY, "corpus": "abd"}, build), arrays(2)) and build.calls == 1
    second = next(path for path in tmp_path.glob("*.index") if path != first)
    second.write_bytes(first.read_bytes())
    assert same(cached_arrays(str(tmp_path), {**KEY, "corpus": "abd"}, build), arrays(2)) and build.calls == 2
    monkeypatch.setattr(index_cache, "CODE_VERSION", index_cache.CODE_VERSION + 1)
    newer = Builder(arrays(3))
    assert same(cached_arrays(str(tmp_path), KEY, newer), arrays(3)) and newer.calls == 1


def _build_slowly(folder: str, gate: Any, log: str, locks: bool) -> None:
    if not locks:
        def refuse(*_: object) -> None:
            raise OSError(95, "Operation not supported")
        fcntl.flock = refuse  # type: ignore[assignment]

    def build() -> Arrays:
        with open(log, "ab") as stream:
            stream.write(b"x")
        time.sleep(0.3)
        return arrays()

    gate.wait()
    if not same(cached_arrays(folder, KEY, build), arrays()):
        os._exit(1)


@pytest.mark.parametrize("locks", [True, False])
def test_many_processes_at_once_get_the_same_and_one_builds_where_there_are_locks(tmp_path: Path, locks: bool) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(6)
    processes = [context.Process(target=_build_slowly, args=(str(tmp_path / "cache"), gate, str(tmp_path / "log"),
                                                             locks)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1
    builds = (tmp_path / "log").stat().st_size
    assert builds == 1 if locks else 1 <= builds <= 6


def _build_for_ever(folder: str, log: str) -> None:
    def build() -> Arrays:
        Path(log).touch()
        time.sleep(600)
        return arrays()

    cached_arrays(folder, KEY, build)


def test_a_builder_that_is_killed_leaves_the_work_to_the_next(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_build_for_ever,
                                                          args=(str(tmp_path / "cache"), str(tmp_path / "log")))
    process.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    build = Builder()
    assert same(cached_arrays(str(tmp_path / "cache"), KEY, build), arrays()) and build.calls == 1


def test_a_process_killed_or_refused_at_any_file_operation_leaves_no_index_that_is_wrong(tmp_path: Path) -> None:
    def use(folder: Path) -> Arrays:
        return cached_arrays(str(folder), KEY, arrays)

    operations = count_operations(lambda: use(tmp_path / "count"))
    assert operations >= 4
    for n in range(1, operations + 1):
        killed_at(n, lambda: use(tmp_path / f"killed-{n}"))  # noqa: B023
        assert same(use(tmp_path / f"killed-{n}"), arrays())
        try:
            with refused_at(n):
                assert same(use(tmp_path / f"refused-{n}"), arrays()), "without a lock it is built all the same"
        except DataError as error:
            assert "--data-cache-path" in str(error) and "No space left" in str(error)
        assert same(use(tmp_path / f"refused-{n}"), arrays())
        assert len(list((tmp_path / f"refused-{n}").glob("*.index"))) == 1


def test_partial_files_of_killed_processes_are_removed_when_they_are_old(tmp_path: Path) -> None:
    for name, age in ((".old.partial", 7200), (".new.partial", 60), ("kept.partial", 7200)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cached_arrays(str(tmp_path), KEY, arrays)
    names = {path.name for path in tmp_path.iterdir() if path.suffix not in (".index", ".seal")}
    assert names == {".lock", ".new.partial", "kept.partial"}
