"""Streams that can no longer be written, and sizes in words."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ltd.log import Console, size_text

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


def test_a_name_that_is_no_text_is_printed_with_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    Console().line("file \udcff of é")
    assert capsys.readouterr().out == "file \\udcff of é\n"


@pytest.mark.parametrize(("size_bytes", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536 * 1024, "1.5 MiB"), (1023 * 1024**2, "1023 MiB"),
    (13 * 1024**3, "13 GiB"), (5000 * 1024**4, "5000 TiB"),
])
def test_a_size_is_written_in_the_unit_that_suits_it(size_bytes: int, text: str) -> None:
    assert size_text(size_bytes) == text
