"""The command line: flags and a TOML file in, a `RunConfig` out.

Precedence: the defaults of `megatron_ltd.config` < `--deepspeed-config file.json` < `--config file.toml` < flags; of a
flag given twice the last counts.
Flags are written out in full. Everything that is wrong is reported at once.
"""

import sys
from typing import Any

from megatron_ltd.config import Family, ModelConfig, RunConfig
from megatron_ltd.settings.checks.all import refuse
from megatron_ltd.settings.checks.idle import idle_settings
from megatron_ltd.settings.deepspeed_file import deepspeed_settings
from megatron_ltd.settings.flag_reference import all_flags, with_settings
from megatron_ltd.settings.foreign_flags import TRANSLATED, VALUES, foreign_answer, nearest
from megatron_ltd.settings.help import usual_help, whole_help
from megatron_ltd.settings.toml_file import read_config_file

FILE_FLAGS = {"--config": "FILE.toml", "--deepspeed-config": "FILE.json", "--deepspeed_config": "FILE.json"}
"""Flags that name a file; the last two are one flag."""


def parse_run_config(argv: list[str], family: Family = "gpt", *,
                     finetuning: bool = False) -> tuple[RunConfig, list[str]]:
    """The settings of a run, and what the user should be told about them once.

    Args:
        argv: the words after the program's name.
        family: the model that the program trains.
        finetuning: the program sets the schedule of dropping where it is not given.

    Raises:
        ConfigError: everything that is wrong with the words and the files, in one message.
        SystemExit: after --help or --help-all.
    """
    if asks_for_help(argv):
        answer = whole_help if "--help-all" in argv else usual_help
        sys.stdout.write(answer(family, finetuning=finetuning))
        raise SystemExit(0)
    words = _Words(argv)
    problems, notes = words.problems, words.notes
    settings = words.values
    if "--config" in words.files:
        found, wrong = read_config_file(words.files["--config"])
        settings = found | settings
        problems += wrong
    if "--deepspeed-config" in words.files:
        added, wrong, said = deepspeed_settings(words.files["--deepspeed-config"], settings)
        settings = added | settings
        problems += wrong
        notes += said
    refuse(problems)
    config = with_settings(RunConfig(model=ModelConfig(family=family)), settings)
    return config, notes + idle_settings(config, finetuning=finetuning)


def asks_for_help(argv: list[str]) -> bool:
    return not {"-h", "--help", "--help-all"}.isdisjoint(argv)


class _Words:
    """What the words of the command line say: values by field, paths by the flag of the file, problems and notes."""

    def __init__(self, argv: list[str]):
        self.values: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.flags = {name: flag for flag in all_flags() for name in (flag.name, flag.off_name) if name is not None}
        (_, *stray), *occurrences = _split_words(argv)
        self.problems += [f"{word!r}: a value without a flag before it; flags begin with --" for word in stray]
        for name, *words in occurrences:
            given = " ".join((name, *words))
            if given in TRANSLATED:
                self.notes.append(f"{given}: taken as {TRANSLATED[given]}")
                name, *words = TRANSLATED[given].split()
            if name in FILE_FLAGS:
                self._take_file(name, words)
            elif name in self.flags:
                self._take_value(name, words)
            else:
                self._answer(name, words)

    def _take_file(self, name: str, words: list[str]) -> None:
        if len(words) != 1:
            self.problems.append(f"{name} needs one path, but {' '.join(words)!r} follows it; "
                                 f"write {name} {FILE_FLAGS[name]}")
        known = name.replace("_", "-")
        if known in self.files:
            self.problems.append(f"{name} is given more than once; put the settings in one file")
        if words:
            self.files[known] = words[0]

    def _take_value(self, name: str, words: list[str]) -> None:
        flag = self.flags[name]
        try:
            value = flag.from_words(name, words)
        except ValueError as error:
            advice = VALUES.get(" ".join((name, *words)))
            self.problems.append(str(error) if advice is None else f"{name} = {words[0]}: {advice}")
            return
        if self.values.get(flag.field, value) != value:
            self.notes.append(f"{flag.name} is given more than once; the last counts: {flag.spoken(value)}")
        self.values[flag.field] = value

    def _answer(self, name: str, words: list[str]) -> None:
        answer = foreign_answer(name, words, self.flags)
        if answer is None:
            close = nearest(name, [*self.flags, *FILE_FLAGS])
            self.problems.append(f"{name}: no such flag; nearest: {close}")
        elif not answer.harmless:
            self.problems.append(answer.text)
        elif answer.text not in self.notes:
            self.notes.append(answer.text)


def _split_words(argv: list[str]) -> list[list[str]]:
    """Each flag with the words that follow it; first, after an empty name, the words before any flag."""
    found = [[""]]
    for word in argv:
        if word.startswith("--"):
            found.append(word.split("=", 1))
        else:
            found[-1].append(word)
    return found
