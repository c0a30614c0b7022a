"""The command line: flags and a TOML file in, a `RunConfig` out.

Precedence: the defaults of `megatron_ltd.config` < `--recipe NAME` < `--deepspeed-config file.json` <
`--config file.toml` < flags; of a flag given twice the last counts.
Flags are written out in full. Everything that is wrong is reported at once.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from megatron_ltd.config.model import Family, ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.settings.checks.all import refuse
from megatron_ltd.settings.checks.idle import idle_settings
from megatron_ltd.settings.checks.token_drop import token_drop_violations
from megatron_ltd.settings.checks.values import repaired, value_violations
from megatron_ltd.settings.deepspeed_file import deepspeed_settings
from megatron_ltd.settings.flag_reference import Flag, all_flags, flags_by_field, with_settings
from megatron_ltd.settings.foreign_flags import (
    RENAMED,
    TRANSLATED,
    VALUES,
    foreign_answer,
    has_own_answer,
    is_known,
    nearest,
)
from megatron_ltd.settings.help import usual_help, whole_help
from megatron_ltd.settings.recipe import read_recipe, recipe_note
from megatron_ltd.settings.toml_file import read_config_file
from megatron_ltd.settings.weighted_splits import weighted_split

FILE_FLAGS = {"--config": "FILE.toml", "--deepspeed-config": "FILE.json", "--deepspeed_config": "FILE.json",
              "--recipe": "NAME"}
"""Flags that name a file; two of them are one flag."""
IN_SEVERAL_UNITS = (
    "train_iters train_samples train_tokens train_epochs", "lr_decay_iters lr_decay_samples lr_decay_tokens",
    "lr_warmup_iters lr_warmup_samples lr_warmup_tokens lr_warmup_fraction",
    "lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_tokens")
"""Settings that say one thing in different units."""


def parse_run_config(argv: list[str], family: Family = "gpt", *,
                     finetuning: bool = False,
                     also: Callable[[RunConfig], Iterable[str]] = lambda config: ()) -> tuple[RunConfig, list[str]]:
    """The settings of a run, and what the user should be told about them once.

    Args:
        argv: the words after the program's name.
        family: the model that the program trains.
        finetuning: the program sets the schedule of dropping where it is not given.
        also: what is wrong with a configuration; told too where words or files are wrong.

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
        path = words.files["--config"]
        found, wrong = read_config_file(path)
        for field in _displaced(found, settings):
            notes.append(f"{path}: {field} = {found.pop(field)} gives way to the flag in another unit")
        found, said = _fitting(found, settings, family, path)
        notes += said
        settings = found | settings
        problems += wrong
    if "--deepspeed-config" in words.files:
        added, wrong, said = deepspeed_settings(words.files["--deepspeed-config"], settings)
        settings = added | settings
        problems += wrong
        notes += said
    if "--recipe" in words.files:
        name = words.files["--recipe"]
        found, wrong = read_recipe(name)
        for field in [*_displaced(found, settings), *(settings.keys() & found.keys())]:
            del found[field]
        settings = found | settings
        problems += wrong
        notes += [] if wrong else [recipe_note(name, found)]
    if (kind := _tokenizer_type(settings, family)) is not None:
        settings = {**settings, "tokenizer_type": kind}
        notes.append(f"--tokenizer-type is not given: taken as {kind}, as in Megatron-LM")
    config = with_settings(RunConfig(model=ModelConfig(family=family)), settings)
    if problems and not config.checkpoint.use_checkpoint_args:
        problems += [text for text in also(config) if not any(f"{name} " in f"{text} " for name in words.wrong)]
    refuse(problems)
    return config, notes + idle_settings(config, finetuning=finetuning)


def _displaced(of_file: dict[str, Any], of_flags: dict[str, Any]) -> list[str]:
    """Settings of a file that a flag says in another unit."""
    return [field for fields in IN_SEVERAL_UNITS if any(of_flags.get(field) is not None for field in fields.split())
            for field in fields.split() if field in of_file and field not in of_flags]


def _fitting(of_file: dict[str, Any], of_flags: dict[str, Any], family: Family, path: str
             ) -> tuple[dict[str, Any], list[str]]:
    """The settings of a file, without its token dropping if that does not fit the sizes that flags give; notes."""
    fields = [field for field in of_file if flags_by_field()[field].section == "token_drop" and field not in of_flags]
    if not fields or not {"num_layers", "seq_length"} & of_flags.keys():
        return of_file, []
    config = with_settings(RunConfig(model=ModelConfig(family=family)), of_file | of_flags)
    problems = list(token_drop_violations(repaired(config, dict(value_violations(config)))))
    if not problems:
        return of_file, []
    return ({field: value for field, value in of_file.items() if field not in fields},
            [f"{path}: its token dropping ({', '.join(fields)}) does not fit the sizes that the flags give and is left "
             f"out: {problems[0]}"])


def _tokenizer_type(settings: dict[str, Any], family: Family) -> str | None:
    """The kind that Megatron-LM assumes where none is given and its files are."""
    kind, files = {"gpt": ("GPT2BPETokenizer", ("vocab_file", "merge_file")),
                   "bert": ("BertWordPieceLowerCase", ("vocab_file",))}.get(family, (None, ()))
    is_open = settings.get("tokenizer_type") is None and not settings.get("use_checkpoint_args")
    return kind if is_open and all(settings.get(file) is not None for file in files) else None


def asks_for_help(argv: list[str]) -> bool:
    return not {"-h", "--help", "--help-all"}.isdisjoint(argv)


class _Words:
    """What the words of the command line say: values by field, paths by the flag of the file, problems and notes."""

    def __init__(self, argv: list[str]):
        self.values: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.wrong: list[str] = []
        """Flags whose values say nothing, so what is said of them as not given is not true."""
        self.flags = {name: flag for flag in all_flags() for name in (flag.name, flag.off_name) if name is not None}
        (_, *stray), *occurrences = _split_words(argv)
        self.problems += [f"{word!r}: a value without a flag before it; flags begin with --" for word in stray]
        # Megatron's --no-position-embedding leaves rotary positions alone, wherever they are asked for.
        occurrences.sort(key=lambda occurrence: occurrence[0].replace("_", "-") != "--no-position-embedding")
        for name, *words in occurrences:
            for ours, *values in self._translated(name, [_unquoted(word) for word in words]):
                if ours in FILE_FLAGS:
                    self._take_file(ours, values)
                elif ours in self.flags or self._unset(ours) is not None:
                    self._take_value(ours, values)
                else:
                    self._answer(ours, values)

    def _translated(self, name: str, words: list[str]) -> list[list[str]]:
        """The flags that a flag stands for, each with its values: none, itself, or others."""
        try:
            paths = weighted_split(name, words)
        except ValueError as error:
            self.problems.append(str(error))
            return []
        if paths is not None:
            self.notes.append(f"{name}: taken as {' '.join(paths)}")
            return [paths]
        with_dashes = name.replace("_", "-")
        is_ours = name in FILE_FLAGS or name in self.flags
        if not is_ours and not is_known(name) and (with_dashes in self.flags or is_known(with_dashes)):
            name = with_dashes
        given = " ".join((name, *words))
        meant = TRANSLATED.get(given)
        if meant is None and name in RENAMED:
            meant = " ".join((RENAMED[name], *words))
        if meant is None:
            return [[name, *words]]
        self.notes.append(f"{given}: taken as {meant or 'not given'}")
        return _split_words(meant.split())[1:]

    def _unset(self, name: str) -> Flag | None:
        """The flag that `--no-...` gives back its default, None."""
        flag = self.flags.get("--" + name.removeprefix("--no-")) if name.startswith("--no-") else None
        return flag if flag is not None and flag.default is None else None

    def _take_file(self, name: str, words: list[str]) -> None:
        if len(words) != 1:
            kind = "name" if name == "--recipe" else "path"
            self.problems.append(f"{name} needs one {kind}, but {' '.join(words)!r} follows it; "
                                 f"write {name} {FILE_FLAGS[name]}")
        known = name.replace("_", "-")
        if known in self.files:
            self.problems.append(f"{name} is given more than once; put the settings in one file")
        if words:
            self.files[known] = words[0]

    def _take_value(self, name: str, words: list[str]) -> None:
        unset = self._unset(name) if name not in self.flags else None
        flag = unset or self.flags[name]
        try:
            is_none = unset is not None or (words == ["none"] and flag.default is None)
            value = None if is_none else flag.from_words(name, words)
        except ValueError as error:
            advice = VALUES.get(" ".join((name, *words)))
            self.problems.append(str(error) if advice is None else f"{name} = {words[0]}: {advice}")
            self.wrong.append(flag.name)
            return
        if self.values.get(flag.field, value) != value:
            self.notes.append(f"{flag.name} is given more than once; the last counts: {flag.spoken(value)}")
        self.values[flag.field] = value

    def _answer(self, name: str, words: list[str]) -> None:
        # A pattern of flags answers names that nobody has seen, so one that is almost ours is a slip of the pen.
        slip = not has_own_answer(name) and nearest(name, [*self.flags, *FILE_FLAGS], alike=0.9)
        answer = None if slip else foreign_answer(name, words)
        if answer is None:
            close = nearest(name, [*self.flags, *FILE_FLAGS], alike=0.8)
            self.problems.append(f"{name}: no such flag" + (f"; nearest: {close}" if close else
                                                            "; leave it out, or see --help-all"))
        elif not answer.harmless:
            self.problems.append(answer.text)
        elif answer.text not in self.notes:
            self.notes.append(answer.text)


def _unquoted(word: str) -> str:
    """Without quotes around it, which stay where a script builds its arguments in a string."""
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"" else word


def _split_words(argv: list[str]) -> list[list[str]]:
    """Each flag with the words that follow it; first, after an empty name, the words before any flag."""
    found = [[""]]
    for word in argv:
        if word.startswith("--"):
            found.append(word.split("=", 1))
        else:
            found[-1].append(word)
    return found
