"""Streams that can no longer be written."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from megatron_ltd.log import Console
console = Console()
for number in range(3):
    console.line(f"line {number}")
    console.error(f"error {number}")
"""


def test_standard_output_on_a_full_disk_is_given_up_with_one_warning() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", PROGRAM], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0
    assert ended.stderr.splitlines() == [
        "WARNING: standard output is given up for this run: [Errno 28] No space left on device",
        "error 0", "error 1", "error 2"]


@pytest.mark.parametrize("both", [False, True])
def test_standard_error_on_a_full_disk_is_given_up_too(both: bool, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, open(tmp_path / "out", "w") as out:
        ended = subprocess.run([sys.executable, "-c", PROGRAM], stdout=full if both else out, stderr=full)
    assert ended.returncode == 0
    assert (tmp_path / "out").read_text() == ("" if both else "line 0\nline 1\nline 2\n")
