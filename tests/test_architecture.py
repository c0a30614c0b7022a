"""The shape of the code: import directions, sizes, and what may not be said where."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_ltd"

FILE_LINES = 320
FUNCTION_LINES = 70

LEVELS = {
    "base": 0,
    "token_drop": 1, "parallel": 1,
    "config": 2,
    "model": 3, "data": 3,
    "plan": 4, "checkpoint": 4,
    "settings": 5, "optim": 5,
    "train": 6,
    "lm_eval": 7,
    "recipe": 8,
}
"""A part of the package imports itself and parts of a lower level; parts of one level do not import each other. The
plan of a run follows from schedules, FLOPs and stages, so it stands above those; plan and settings are arithmetic."""

BASE = {"__init__", "__version__", "errors", "log"}
RECIPES = ("pretrain_", "finetune_")

DEBTS = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
OPENS_PICKLES = "tools/import_megatron_checkpoint.py"
"""The one command that reads what others pickled, by torch's restricted reader."""
PROCESS_WORDS = re.compile(r"(?<![a-z])(ranks?|world[_ ]size|all[_-]reduce)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One Python file of the project."""

    name: str
    text: str
    tree: ast.Module

    @property
    def part(self) -> str:
        return part_of(self.name.removesuffix(".py").split("/")[1])

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 1)}: {what}"


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    found = []
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text)))
    return tuple(found)


def product() -> tuple[Source, ...]:
    """What users run."""
    return sources(PACKAGE, "tools", "examples")


def everything() -> tuple[Source, ...]:
    return sources(PACKAGE, "tools", "examples", "tests", "benchmarks")


def imported(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(statement, dotted name) of every import, also those inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"relative import on line {node.lineno}"
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def dotted(node: ast.AST) -> str:
    """`torch.load` for that expression, empty for what is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(source: Source) -> set[int]:
    """Line numbers that hold code, rather than documentation, comments or nothing."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(source.tree):
        if is_text(node):
            assert isinstance(node, ast.Expr) and node.end_lineno is not None
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def part_of(name: str) -> str:
    """The level that `megatron_ltd.name` belongs to."""
    if name in BASE:
        return "base"
    return "recipe" if name.startswith(RECIPES) else name


def may_import(importer: str, target: str) -> bool:
    return importer == target != "recipe" or LEVELS[target] < LEVELS[importer]


def test_the_package_is_found() -> None:
    assert {source.part for source in sources(PACKAGE)} == set(LEVELS)


def test_imports_point_one_way() -> None:
    wrong = []
    for source in sources(PACKAGE):
        for node, name in imported(source.tree):
            words = [*name.split("."), "__version__"]
            if words[0] == PACKAGE and not may_import(source.part, part_of(words[1])):
                wrong.append(source.at(node, f"{source.part} imports {name}"))
            if words[0] in {"tools", "tests", "examples", "benchmarks"}:
                wrong.append(source.at(node, f"the package imports {words[0]}"))
    assert not wrong, "\n".join(wrong)


def test_benchmarks_import_the_package_alone() -> None:
    """`tools/benchmark.py` and the examples take their steps from `benchmarks`, so nothing may point back."""
    wrong = [source.at(node, f"benchmarks import {name}") for source in sources("benchmarks")
             for node, name in imported(source.tree) if name.split(".")[0] in {"tools", "tests", "examples"}]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("importer", "target"), [
    ("model", "data"), ("data", "model"), ("base", "settings"), ("model", "settings"), ("token_drop", "parallel"),
    ("parallel", "model"), ("optim", "train"), ("checkpoint", "optim"), ("train", "lm_eval"), ("train", "recipe"),
    ("recipe", "recipe"),
])
def test_the_import_rule_refuses_what_it_should(importer: str, target: str) -> None:
    assert not may_import(importer, target)


def test_settings_are_read_without_torch() -> None:
    """A mistake in a command is reported at once, and tools that only calculate start at once."""
    settings = sorted(source.name.removesuffix(".py").replace("/", ".") for source in sources(PACKAGE)
                      if source.part in ("base", "plan", "settings") and not source.name.endswith("__init__.py"))
    assert f"{PACKAGE}.settings.checks.all" in settings
    lines = [f"import {name}" for name in settings] + ["import sys", "sys.exit('torch' in sys.modules)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr or "torch was imported"


def test_package_files_import_nothing_for_others() -> None:
    wrong = [source.at(node, f"re-exports {name}") for source in everything() if source.name.endswith("__init__.py")
             for node, name in imported(source.tree)]
    assert not wrong, "\n".join(wrong)


def test_data_does_not_know_processes() -> None:
    wrong = [source.at(node, f"imports {name}") for source in sources(f"{PACKAGE}/data")
             for node, name in imported(source.tree)
             if name.startswith(("torch.distributed", f"{PACKAGE}.parallel"))]
    wrong += [source.at(node, "uses torch.distributed") for source in sources(f"{PACKAGE}/data")
              for node in ast.walk(source.tree) if dotted(node).startswith("torch.distributed")]
    assert not wrong, "\n".join(wrong)


def test_model_does_not_know_processes() -> None:
    wrong = [f"{source.name}:{number}: {line.strip()}" for source in sources(f"{PACKAGE}/model")
             for number, line in enumerate(source.text.splitlines(), start=1) if PROCESS_WORDS.search(line)]
    assert not wrong, "\n".join(wrong)


def test_only_the_launcher_reads_the_environment() -> None:
    wrong = []
    for source in sources(PACKAGE, "tools"):
        if source.name == f"{PACKAGE}/train/process/environment.py":
            continue
        wrong += [source.at(node, dotted(node)) for node in ast.walk(source.tree)
                  if dotted(node) in {"os.environ", "os.getenv"}]
        wrong += [source.at(node, name) for node, name in imported(source.tree)
                  if name in {"os.environ", "os.getenv"}]
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    sizes = {source.name: len(code_lines(source)) for source in sources(PACKAGE, "tools")}
    assert not {name: size for name, size in sizes.items() if size > FILE_LINES}


def test_functions_are_short() -> None:
    long = []
    for source in sources(PACKAGE, "tools"):
        lines = code_lines(source)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
                if size > FUNCTION_LINES:
                    long.append(source.at(node, f"{node.name} has {size} lines of code"))
    assert not long, "\n".join(long)


def test_nothing_that_users_run_can_execute_a_file_it_reads() -> None:
    wrong = []
    for source in product():
        if source.name == OPENS_PICKLES:
            loads = [node for node, name in calls(source.tree) if name == "torch.load"]
            assert len(loads) == 1 and any(
                keyword.arg == "weights_only" and getattr(keyword.value, "value", False) is True
                for keyword in loads[0].keywords)
            continue
        wrong += [source.at(node, f"imports {name}") for node, name in imported(source.tree)
                  if name.split(".")[0] in UNSAFE_MODULES]
        for node, name in calls(source.tree):
            unpickles = any(keyword.arg == "allow_pickle" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False) for keyword in node.keywords)
            if name in {"torch.load", "torch.save", "eval", "exec"} or unpickles:
                wrong.append(source.at(node, f"calls {name}"))
    assert not wrong, "\n".join(wrong)


def test_process_groups_always_have_a_timeout() -> None:
    makers = {"new_group", "new_subgroups", "init_process_group"}
    wrong = [source.at(node, f"{name} without timeout") for source in sources(PACKAGE, "tools")
             for node, name in calls(source.tree)
             if name.split(".")[-1] in makers and "timeout" not in {keyword.arg for keyword in node.keywords}]
    assert not wrong, "\n".join(wrong)


def test_nothing_reads_global_arguments() -> None:
    wrong = [source.at(node, name) for source in everything() for node, name in calls(source.tree)
             if name.split(".")[-1] == "get_args" and name != "typing.get_args"]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert not [source.name for source in everything() if source.name.split("/")[-1] in vague]


def test_exceptions_are_not_swallowed() -> None:
    wrong = []
    for source in everything():
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                wrong.append(source.at(node, "except without a type"))
            elif (dotted(node.type) in {"Exception", "BaseException"}
                  and isinstance(node.body[0], ast.Pass | ast.Continue)):
                wrong.append(source.at(node, f"except {dotted(node.type)} that does nothing"))
    assert not wrong, "\n".join(wrong)


def test_no_assertion_holds_by_itself() -> None:
    asserts = [(source, node) for source in everything() for node in ast.walk(source.tree)
               if isinstance(node, ast.Assert)]
    wrong = [source.at(node, "assert of a constant or a tuple") for source, node in asserts
             if isinstance(node.test, ast.Tuple) or (isinstance(node.test, ast.Constant) and bool(node.test.value))]
    assert not wrong, "\n".join(wrong)


def test_no_debts_are_left_in_the_text() -> None:
    wrong = [f"{source.name}:{number}: {line.strip()}" for source in everything()
             for number, line in enumerate(source.text.splitlines(), start=1) if DEBTS.search(line)]
    assert not wrong, "\n".join(wrong)
