"""Lists the names of Megatron-LM's flags, from the sources of megatron-core that are installed, and of others.

    python tools/upkeep/megatron_flags.py
    python tools/upkeep/megatron_flags.py --input Megatron-LM --output names.txt

Sources are parsed and never imported. A name is what `add_argument` adds, a field of a dataclass `...Config`, from
which Megatron-LM makes its arguments, or what a text of the sources calls `--name`. Without --output the package's list
is written, megatron_ltd/settings/megatron_flags.txt: a flag in it is answered as Megatron's, not as a misspelling.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run from a checkout that is not installed

from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.settings import foreign_flags
from tools.commands.command_line import add_output, exit_code_of, parser_of

PLAIN_TYPES = {"bool", "int", "float", "str", "None", "Optional", "List", "list", "Literal", "Union", "Tuple", "tuple",
               "signal"}
"""Types of fields that can be arguments."""
MENTIONED = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:[-_][a-z0-9]+)+)(?![\w*-])")


def flag_names(source: str) -> Iterator[str]:
    """The names in one file, without their dashes in front and with dashes in place of underscores."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (name.replace("_", "-") for name in MENTIONED.findall(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            words = [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
            yield from (word[2:].replace("_", "-") for word in words if word.startswith("--"))
        elif isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            yield from _fields(node)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """The fields of a dataclass; one that is on by default is turned off by `no-`."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id[0] != "_" \
                and {name.id for name in ast.walk(field.annotation) if isinstance(name, ast.Name)} <= PLAIN_TYPES:
            name = field.target.id.replace("_", "-")
            yield name
            if isinstance(field.value, ast.Constant) and field.value.value is True:
                yield f"no-{name}"


def sources(folders: list[str]) -> list[Path]:
    """The Python files in folders.

    Raises:
        DataError: there is none.
    """
    found = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    if not found:
        raise DataError(f"--input = {' '.join(folders)}: no Python file. Name folders of sources.")
    return found


def installed() -> tuple[list[str], str]:
    """Where megatron-core is installed, and what it is.

    Raises:
        ConfigError: it is not.
    """
    found = importlib.util.find_spec("megatron")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("megatron-core is not installed; install it (pip install megatron-core), or name sources by "
                          "--input.")
    return list(found.submodule_search_locations), f"megatron-core {importlib.metadata.version('megatron-core')}"


def listing(folders: list[str], origin: str) -> str:
    """The text of the list: what it was made from, and a name a line."""
    names = {name for path in sources(folders) for name in flag_names(path.read_text(encoding="utf-8"))}
    return "\n".join([f"# Made by tools/upkeep/megatron_flags.py from {origin}.", *sorted(names), ""])


def run(options: argparse.Namespace) -> None:
    folders, origin = installed()
    text = listing([*folders, *options.input], " and ".join([origin, *(Path(name).name for name in options.input)]))
    output = Path(options.output or foreign_flags.MEGATRON_LIST)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output = {output} cannot be written: {error}.") from error
    print(f"Wrote {output}: {text.count(chr(10)) - 1} names.")


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--input", nargs="+", default=[], metavar="DIR", help="folders of further sources")
    add_output(parser, metavar="FILE", help="the list (default: the package's)")
    return exit_code_of(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
