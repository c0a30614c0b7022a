"""Settings from a TOML file: the flags' names with underscores, flat or under the names of the sections.

    seq_length = 2048             # a setting of any section

    [parallel]
    tensor_model_parallel_size = 4
"""

import tomllib
from collections.abc import Callable
from typing import Any

from megatron_ltd.errors import flag_name
from megatron_ltd.settings.flag_reference import flags_by_field, section_classes
from megatron_ltd.settings.foreign_flags import foreign_answer, nearest

_LARGEST = 2**24


def parsed_file(flag: str, path: str, kind: str, parse: Callable[[str], Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of a settings file, and what is wrong with it.

    Args:
        flag: that names the file.
        kind: its format.
        parse: the format's reader, which raises ValueError.
    """
    try:
        with open(path, "rb") as file:
            read = file.read(_LARGEST + 1)
        if len(read) > _LARGEST:
            return {}, [f"{flag} = {path}: longer than {_LARGEST} bytes; give the path of a {kind} file"]
        content = parse(read.decode("utf-8"))
    except OSError as error:
        return {}, [f"{flag} = {path}: cannot be read ({error.strerror}); give the path of a {kind} file"]
    except (ValueError, RecursionError) as error:
        return {}, [f"{flag} = {path}: not valid {kind}: {error}; correct the file"]
    if not isinstance(content, dict):
        return {}, [f"{flag} = {path}: not a {kind} object; correct the file"]
    return content, []


def read_config_file(path: str) -> tuple[dict[str, Any], list[str]]:
    """The settings of the file by field, and everything that is wrong with it."""
    content, problems = parsed_file("--config", path, "TOML", tomllib.loads)
    settings: dict[str, Any] = {}
    sections = {name: values for name, values in content.items() if isinstance(values, dict)}
    problems += [f"{path}: [{name}] is no section; nearest: {nearest(name, section_classes())}"
                 for name in sections if name not in section_classes()]
    flat = [("", key, value) for key, value in content.items() if key not in sections]
    grouped = [(name, key, value) for name in section_classes() for key, value in sections.get(name, {}).items()]
    for section, key, value in flat + grouped:
        where = f"{path}: [{section}] {key}" if section else f"{path}: {key}"
        flag = flags_by_field().get(key)
        if flag is None:
            problems.append(f"{where}: {_unknown(key)}")
        elif section not in ("", flag.section):
            problems.append(f"{where}: this setting belongs under [{flag.section}]; move it there")
        elif key in settings:
            problems.append(f"{where}: given twice, also at the top of the file; keep one")
        else:
            try:
                settings[key] = flag.from_toml(value)
            except ValueError as error:
                problems.append(f"{where}: {error}")
    return settings, problems


def _unknown(key: str) -> str:
    answer = foreign_answer(flag_name(key), ())
    if answer is not None:
        return answer.text
    return f"no setting has this name; nearest: {nearest(key, flags_by_field())}"
