"""Settings from a TOML file: the flags' names with underscores, flat or under the names of the sections.

    seq_length = 2048             # a setting of any section

    [parallel]
    tensor_model_parallel_size = 4
"""

import tomllib
from pathlib import Path
from typing import Any

from megatron_ltd.settings.flag_reference import Flag, all_flags, section_classes
from megatron_ltd.settings.foreign_flags import foreign_answer, nearest


def read_config_file(path: str) -> tuple[dict[Flag, Any], list[str]]:
    """The settings of the file, and everything that is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        return {}, [f"--config = {path}: cannot be read ({error.strerror}); give the path of a TOML file"]
    except UnicodeDecodeError:
        return {}, [f"--config = {path}: not UTF-8 text; give the path of a TOML file"]
    except tomllib.TOMLDecodeError as error:
        return {}, [f"--config = {path}: not valid TOML: {error}; correct it there"]
    return _settings(path, content)


def _settings(path: str, content: dict[str, Any]) -> tuple[dict[Flag, Any], list[str]]:
    flags = {flag.field: flag for flag in all_flags()}
    settings: dict[Flag, Any] = {}
    problems = []
    for section, key, value in _entries(content):
        where = f"{path}: [{section}] {key}" if section else f"{path}: {key}"
        flag = flags.get(key)
        if section is not None and section not in section_classes():
            problems.append(f"{path}: [{section}] is no section; nearest: {nearest(section, section_classes())}")
        elif flag is None:
            problems.append(f"{where}: {_unknown(key, flags)}")
        elif section not in (None, flag.section):
            problems.append(f"{where}: this setting belongs under [{flag.section}]; move it there")
        elif flag in settings:
            problems.append(f"{where}: given twice, also at the top of the file; keep one")
        else:
            try:
                settings[flag] = flag.from_toml(value)
            except ValueError as error:
                problems.append(f"{where}: {error}")
    return settings, problems


def _entries(content: dict[str, Any]) -> list[tuple[str | None, str, Any]]:
    """(section or None, key, value) of everything in the file; of an unknown section only its name."""
    entries: list[tuple[str | None, str, Any]] = []
    for key, value in content.items():
        if not isinstance(value, dict):
            entries.append((None, key, value))
        elif key in section_classes():
            entries.extend((key, name, item) for name, item in value.items())
        else:
            entries.append((key, "", None))
    return entries


def _unknown(key: str, known: dict[str, Flag]) -> str:
    answer = foreign_answer("--" + key.replace("_", "-"), (), known)
    if answer is not None:
        return answer.text
    return f"no setting has this name; nearest: {nearest(key, known)}"
