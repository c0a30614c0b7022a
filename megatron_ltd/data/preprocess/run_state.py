"""`{output_prefix}.resume.json`: the progress of a preprocessing run, for `--resume` after it was killed or failed."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ltd.data.corpus.partial_files import remove, sync, writing
from megatron_ltd.data.corpus.writer import Mark
from megatron_ltd.data.preprocess.text_input import START, Place
from megatron_ltd.errors import ConfigError, DataError

FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """Everything before `place` of input file `file` is in the marked corpora, or among the rejected lines.

    Attributes:
        key: all that decides the bytes of the output; another run may continue only with the same.
        sources: SHA-256 of the files before `file`.
        rejected: rejected lines, and the bytes of the two files that hold them.
        complete: all partial files are finished, and only have to get their names.
    """

    key: dict[str, Any]
    file: int = 0
    place: Place = START
    documents: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    sources: tuple[str, ...] = ()
    rejected: tuple[int, int, int] = (0, 0, 0)
    marks: tuple[Mark, ...] = ()
    complete: bool = False


def state_path(output_prefix: str) -> str:
    return f"{output_prefix}.resume.json"


def save_state(output_prefix: str, state: RunState) -> None:
    """Replaces the state on disk."""
    path = state_path(output_prefix)
    with writing(path):
        try:
            with open(f"{path}.partial", "w", encoding="utf-8") as stream:
                json.dump({"format": FORMAT, **asdict(state)}, stream)
                sync(stream)
            os.replace(f"{path}.partial", path)
        except OSError:
            with suppress(OSError):
                remove(f"{path}.partial")
            raise


def remove_state(output_prefix: str) -> None:
    """Forgets an interrupted run."""
    path = state_path(output_prefix)
    with writing(path):
        remove(path, f"{path}.partial")


def load_state(output_prefix: str, key: dict[str, Any]) -> RunState | None:
    """The state of an interrupted run, None without one.

    Raises:
        ConfigError: that run had other settings or files.
        DataError: the file is not such a state.
    """
    path = state_path(output_prefix)
    if not os.path.exists(path):
        return None
    try:
        found = json.loads(Path(path).read_bytes())
        if found.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        state = RunState(**{**found, "place": Place(**found["place"]), "sources": tuple(found["sources"]),
                            "rejected": tuple(found["rejected"]), "marks": tuple(Mark(**m) for m in found["marks"])})
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not the state of an interrupted run: {error!r}. Run again without "
                        "--resume.") from error
    now = json.loads(json.dumps(key))
    for name in now:
        if state.key.get(name) != now[name]:
            raise ConfigError(f"--resume: the interrupted run had {name} = {state.key.get(name)}, and now it is "
                              f"{now[name]}. Give the same, or run without --resume to start again.")
    return state
