"""The command line: flags and a TOML file in, a `RunConfig` out.

Precedence: the defaults of `megatron_ltd.config` < `--deepspeed-config file.json` < `--config file.toml` < flags; of a
flag given twice the last counts.
Flags are written out in full. Everything that is wrong is reported at once.
"""

import sys
import textwrap
from dataclasses import replace
from typing import Any

from megatron_ltd.config import Family, RunConfig
from megatron_ltd.settings.checks.all import config_error
from megatron_ltd.settings.checks.idle import idle_settings
from megatron_ltd.settings.deepspeed_file import DeepSpeedConfig
from megatron_ltd.settings.flag_reference import Flag, all_flags, section_classes
from megatron_ltd.settings.foreign_flags import TRANSLATED, VALUES, foreign_answer, nearest
from megatron_ltd.settings.toml_file import read_config_file

CONFIG_FLAG = "--config"
DEEPSPEED_FLAG = "--deepspeed-config"
FILE_FLAGS = {CONFIG_FLAG: CONFIG_FLAG, DEEPSPEED_FLAG: DEEPSPEED_FLAG, "--deepspeed_config": DEEPSPEED_FLAG}
"""Flags that name a file, and the name by which they are known here."""
_FILE_KINDS = {CONFIG_FLAG: "FILE.toml", DEEPSPEED_FLAG: "FILE.json"}


def parse_run_config(argv: list[str], family: Family = "gpt", *,
                     finetuning: bool = False) -> tuple[RunConfig, list[str]]:
    """The settings of a run, and what the user should be told about them once.

    Args:
        argv: the words after the program's name.
        family: the model that the program trains.
        finetuning: the program sets the schedule of dropping where it is not given.

    Raises:
        ConfigError: everything that is wrong with the words and the file, in one message.
        SystemExit: after --help.
    """
    if asks_for_help(argv):
        sys.stdout.write(help_text())
        raise SystemExit(0)
    flags, problems, notes = _read_words(argv)
    settings: dict[Flag, Any] = {}
    for path in flags.pop(CONFIG_FLAG, []):
        found, wrong = read_config_file(path)
        settings.update(found)
        problems.extend(wrong)
    deepspeed = [DeepSpeedConfig(path) for path in flags.pop(DEEPSPEED_FLAG, [])]
    by_name = {flag.name: flag for flag in all_flags()}
    settings.update({by_name[name]: value for name, value in flags.items()})
    for file in deepspeed:
        added = file.for_run({flag.field: value for flag, value in settings.items()})
        settings.update({flag: added[flag.field] for flag in all_flags() if flag.field in added})
        problems.extend(file.problems)
        notes.extend(file.notes)
    if problems:
        raise config_error(problems)
    config = _assemble(settings)
    config = replace(config, model=replace(config.model, family=family))
    return config, notes + idle_settings(config, finetuning=finetuning)


def asks_for_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def help_text() -> str:
    """Every flag with its default and its documentation, by section."""
    lines = ["Every setting is a flag, or a key of --config FILE.toml (with underscores, flat or under [section]).",
             "Flags override the file. A switch that the file turns on is turned off by --no-<name>.", "",
             f"  {CONFIG_FLAG} FILE.toml", "      Settings that flags may override.",
             f"  {DEEPSPEED_FLAG} FILE.json", "      DeepSpeed's file, of which the block random_ltd is taken."]
    for section, kind in section_classes().items():
        lines += ["", f"[{section}]  {' '.join((kind.__doc__ or '').split())}"]
        for flag in all_flags():
            if flag.section == section:
                default = f" [{flag.default_text}]" if flag.default_text else ""
                lines += [f"  {flag.usage}{default}", textwrap.indent(textwrap.fill(flag.text, 100), "      ")]
    return "\n".join(lines) + "\n"


def _read_words(argv: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Values by flag name (of a file: a list of at most one path), problems, and notes."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    notes: list[str] = []
    by_name = {name: flag for flag in all_flags() for name in (flag.name, flag.off_name) if name is not None}
    occurrences, stray = _split_words(argv)
    problems += [f"{word!r}: a value without a flag before it; flags begin with --" for word in stray]
    for name, words in occurrences:
        given = " ".join((name, *words))
        if given in TRANSLATED:
            notes.append(f"{given}: taken as {TRANSLATED[given]}")
            name, *words = TRANSLATED[given].split()
        if name in FILE_FLAGS:
            known = FILE_FLAGS[name]
            problems += _file_problems(name, words, known in values)
            values[known] = words[:1]
        elif name in by_name:
            flag = by_name[name]
            try:
                value = flag.from_words(words)
            except ValueError as error:
                problems.append(_value_problem(flag, name, words, str(error)))
                continue
            value = value if name == flag.name else False
            if flag.name in values and values[flag.name] != value:
                notes.append(f"{flag.name} is given more than once: {_spoken(flag, value)} counts, the last")
            values[flag.name] = value
        else:
            _answer_foreign(name, words, list(by_name), problems, notes)
    return values, problems, notes


def _split_words(argv: list[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Each flag with the words that follow it, and the words before the first flag."""
    occurrences: list[tuple[str, list[str]]] = []
    stray: list[str] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            occurrences.append((name, [value] if equals else []))
        elif occurrences:
            occurrences[-1][1].append(word)
        else:
            stray.append(word)
    return occurrences, stray


def _file_problems(name: str, words: list[str], again: bool) -> list[str]:
    problems = [] if len(words) == 1 else [f"{name} needs one path, but {' '.join(words)!r} follows it; "
                                           f"write {name} {_FILE_KINDS[FILE_FLAGS[name]]}"]
    return problems + ([f"{name} is given more than once; put the settings in one file"] if again else [])


def _value_problem(flag: Flag, name: str, words: list[str], error: str) -> str:
    advice = VALUES.get(f"{flag.name} {words[0]}") if len(words) == 1 else None
    if advice is not None:
        return f"{flag.name} = {words[0]}: {advice}"
    if flag.kind is bool or len(words) != flag.count and flag.count is not None or not words:
        return f"{name} {error}"
    return f"{name} = {' '.join(words)}: {error}"


def _answer_foreign(name: str, words: list[str], known: list[str], problems: list[str], notes: list[str]) -> None:
    answer = foreign_answer(name, words, known)
    if answer is not None and answer.harmless:
        if answer.text not in notes:
            notes.append(answer.text)
    elif answer is not None:
        problems.append(answer.text)
    else:
        problems.append(f"{name}: no such flag; nearest: {nearest(name, [*known, *FILE_FLAGS])}")


def _spoken(flag: Flag, value: Any) -> str:
    if flag.kind is bool:
        return "on" if value else "off"
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)


def _assemble(settings: dict[Flag, Any]) -> RunConfig:
    sections = {}
    for section, kind in section_classes().items():
        sections[section] = kind(**{flag.field: value for flag, value in settings.items() if flag.section == section})
    return RunConfig(**sections)
