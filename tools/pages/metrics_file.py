"""Reads the --metrics-file of a run, as the tools that draw and compare runs need it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError


def read_metrics(path: Path, training_numbers: Sequence[str]) -> tuple[list[dict[str, Any]], bool]:
    """The records, and whether an incomplete last line was left out: still being written, or cut by a kill.

    Args:
        training_numbers: that the record of a step must hold; `a|b` stands for the first of two that there is.

    Raises:
        DataError: the file cannot be read, or a line is not the record of a run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Name a run's --metrics-file, or the folder that holds its "
                        "metrics.jsonl.") from error
    *lines, rest = text.split("\n")
    records = [_record(line, f"{path}:{number}", training_numbers)
               for number, line in enumerate(lines, start=1) if line.strip()]
    return records, bool(rest.strip())


def _record(line: str, place: str, training_numbers: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}. Remove the line or name another file.") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} is no record of a run but {line[:40]!r}. Name a run's --metrics-file.")
    wanted = ["step"]
    if "lm_loss" in record:
        alternatives = [names.split("|") for names in training_numbers]
        wanted = [next((name for name in names if name in record), names[-1]) for names in alternatives]
    elif "validation_loss" in record:
        wanted = ["step", "validation_loss"]
    missing = [name for name in wanted if not is_number(record.get(name))]
    if missing or not float(record["step"]).is_integer() or record["step"] < 0:
        raise DataError(f"{place} is no record of a run: it needs {', '.join(missing or ['step'])} as a number. "
                        "Name a run's --metrics-file.")
    return record


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
