"""Reads the command of a launch script without running it: what its variables stand for, by a subset of the shell.

Understood are comments, continued lines, `NAME=value`, arrays, `NAME+=`, `$NAME`, `${NAME}`, `${NAME:-default}`,
`${NAME[@]}` and `$((...))`. Assignments count in the order of the file, whatever conditions they stand under. What
cannot be known, such as `$1`, stays as it is written. A file without a command holds the arguments themselves.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_ltd.errors import ConfigError

ARRAY = re.compile(r"(?ms)^[ \t]*(?:export[ \t]+|local[ \t]+|declare -a[ \t]+)?(\w+)(\+?)=\((.*?)\)[ \t;]*"
                   r"(?:#[^\n]*)?$")
SCALAR = re.compile(r"(?:export\s+|local\s+|readonly\s+)?(\w+)(\+?)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$\(\(([^()]*)\)\)|\$\{(\w+)(?:\[[@*]\]|:?-([^}]*))?\}|\$(\w+)")
QUOTED_ARRAY = re.compile(r'"(\$\{\w+\[@\]\})"')
PROGRAM = re.compile(r"(?:^|[/.])((?:pretrain|finetune)_\w+?)(?:\.py)?$")
SUM = re.compile(r"[\d\s+*/-]+")
PROCESSES = ("nproc_per_node", "nnodes")


@dataclass(frozen=True)
class Script:
    """Args:
        program: such as `pretrain_gpt`; None if the file names none.
        arguments: of the program.
        processes: that its launcher starts; None if it does not say.
    """

    program: str | None
    arguments: list[str]
    processes: int | None


def read_script(path: Path) -> Script:
    """Raises:
        ConfigError: the file cannot be read, has quotes that do not close, or holds no command.
    """
    try:
        text = path.read_text(encoding="utf-8")
        script = _read(QUOTED_ARRAY.sub(r"\1", text.replace("\\\n", " ")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--script = {path}: cannot be read as a launch script: {error}; give a shell script, or a "
                          "file of arguments") from error
    if script.program is None and not (script.arguments and script.arguments[0].startswith("--")):
        raise ConfigError(f"--script = {path}: neither starts a program named pretrain_... or finetune_... nor holds "
                          "its arguments, which begin with --; give such a file")
    return script


def _read(text: str) -> Script:
    values: dict[str, str] = {}
    command: list[str] = []

    def assign(found: re.Match[str], value: str) -> None:
        name, adds = found.group(1), found.group(2)
        values[name] = f"{values.get(name, '')} {value}" if adds else value

    for line in _lines(text):
        if found := ARRAY.fullmatch(line):
            assign(found, _expanded(" ".join(shlex.split(found.group(3), comments=True)), values))
        elif (found := SCALAR.fullmatch(line)) and (quoted := shlex.split(found.group(3), comments=True)):
            if len(quoted) == 1:
                assign(found, _expanded(quoted[0], values))
        else:
            words = _expanded(line, values)
            if any(PROGRAM.search(word) for word in words.split()):
                command = shlex.split(words, comments=True)
    place = next((number for number, word in enumerate(command) if PROGRAM.search(word)), None)
    if place is None:
        return Script(None, shlex.split(text, comments=True), None)
    program = PROGRAM.search(command[place])
    assert program is not None
    return Script(program.group(1), _arguments(command[place + 1:]), _processes(command[:place]))


def _lines(text: str) -> list[str]:
    """Arrays, and lines outside of them; a value in quotes may be of several lines."""
    found, rest = [], text
    while match := ARRAY.search(rest):
        found += [*_closed(rest[:match.start()]), match.group(0)]
        rest = rest[match.end():]
    return [*found, *_closed(rest)]


def _closed(text: str) -> list[str]:
    lines: list[str] = []
    for line in text.splitlines():
        if lines and _is_open(lines[-1]):
            lines[-1] += "\n" + line
        elif line.strip() and not line.lstrip().startswith("#"):
            lines.append(line.strip())
    return lines


def _is_open(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def _expanded(text: str, values: dict[str, str]) -> str:
    """The text with what is known of its variables in their place."""
    def value(found: re.Match[str]) -> str:
        total, braced, default, plain = found.groups()
        if total is not None:
            numbers = re.sub(r"[A-Za-z_]\w*", lambda name: values.get(name.group(0), name.group(0)),
                             _expanded(total, values))
            return str(_total(numbers)) if SUM.fullmatch(numbers) else found.group(0)
        known = values.get(braced or plain)
        return known or default if default is not None and not known else found.group(0) if known is None else known
    return VARIABLE.sub(value, text)


def _total(text: str) -> int:
    """A sum of products of whole numbers."""
    def product(term: str) -> int:
        factors = re.findall(r"([*/]?)\s*(\d+)", term)
        number = 1
        for sign, factor in factors:
            number = number // max(1, int(factor)) if sign == "/" else number * int(factor)
        return number
    return sum((-1 if sign == "-" else 1) * product(term) for sign, term in re.findall(r"([+-]?)([^+-]+)", text))


def _arguments(words: list[str]) -> list[str]:
    """Up to what redirects the output or follows the command."""
    stop = next((place for place, word in enumerate(words) if re.match(r"\d?>|&|\||;", word)), len(words))
    return [word for word in words[:stop] if word != "--"]


def _processes(launcher: list[str]) -> int | None:
    words = " ".join(launcher).replace("-", "_").replace("=", " ")
    counts = [re.search(rf"__{name} (\d+)(?!\S)", words) for name in PROCESSES]
    each, nodes = (int(found.group(1)) if found else None for found in counts)
    return None if each is None else each * (nodes or 1)
