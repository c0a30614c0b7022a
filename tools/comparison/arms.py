"""Which metrics files belong to which arm of a comparison, and to which seed."""

import glob
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ltd.errors import ConfigError, DataError
from tools.comparison.curves import RunCurve, read_run

METRICS_NAME = "metrics.jsonl"
MANIFEST_NAMES = ("run.json", "manifest.json")
BUDGET_TOLERANCE = 0.01
"""Between seeds, where which layers or tokens are dropped is drawn: layer tokens and FLOPs may differ so much."""


@dataclass(frozen=True)
class Run:
    """One seed of an arm."""

    seed: int
    curve: RunCurve


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed.

    Args:
        seeds_known: seeds are those of the runs; otherwise they count the files in the order given.
    """

    name: str
    runs: tuple[Run, ...]
    seeds_known: bool

    @property
    def finite(self) -> tuple[Run, ...]:
        """The runs that did not diverge."""
        return tuple(run for run in self.runs if not run.curve.diverged)


def read_arms(arguments: list[str], allow_different_lengths: bool) -> list[Arm]:
    """The arms of NAME=FILE and NAME@SEED=FILE arguments, in the order in which they are first named.

    Raises:
        ConfigError: an argument that is not of that form, or seeds that are given for some runs of an arm only.
        DataError: a file that is missing, damaged or named twice, or runs of one arm of different length.
    """
    named: dict[str, list[tuple[Path, int | None]]] = {}
    for argument in arguments:
        name, seed, pattern = _parts(argument)
        files = _files(argument, pattern)
        if seed is not None and len(files) > 1:
            raise ConfigError(f"{argument} names one seed and {len(files)} files. Name one file for each seed.")
        named.setdefault(name, []).extend((path, seed) for path in files)
    _refuse_repeated([path for files in named.values() for path, _ in files])
    arms = [_arm(name, files) for name, files in named.items()]
    if not allow_different_lengths:
        for arm in arms:
            _check_lengths(arm)
    return arms


def _parts(argument: str) -> tuple[str, int | None, str]:
    """Name, seed and file of an argument."""
    name, sign, pattern = argument.partition("=")
    if not sign or not name.strip() or not pattern:
        raise ConfigError(f"{argument!r} must be NAME=FILE or NAME@SEED=FILE, with the name of an arm and the metrics "
                          "file of one of its runs.")
    seeded = re.fullmatch(r"(.*\S)@(\d+)", name.strip())
    return (seeded[1].strip(), int(seeded[2]), pattern) if seeded else (name.strip(), None, pattern)


def _files(argument: str, pattern: str) -> list[Path]:
    found = [Path(pattern)] if Path(pattern).exists() else [Path(name) for name in sorted(glob.glob(pattern))]
    files = [path / METRICS_NAME if path.is_dir() else path for path in found]
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        raise DataError(f"{argument}: there is no {missing[0] if missing else pattern}. Name a run's --metrics-file, "
                        f"or the folder that holds its {METRICS_NAME}.")
    return files


def _refuse_repeated(files: list[Path]) -> None:
    """A run that counts as two makes errors look smaller than they are."""
    seen: dict[str, Path] = {}
    for path in files:
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. Name a run's --metrics-file.") from error
        first = seen.setdefault(content, path)
        if first is not path:
            copies = "the same file" if first.resolve() == path.resolve() else "a copy of it"
            raise DataError(f"{first} and {path}: {copies}; the run would be counted twice. Name each run once.")


def _arm(name: str, files: list[tuple[Path, int | None]]) -> Arm:
    given = [seed for _, seed in files if seed is not None]
    if given and len(given) < len(files):
        raise ConfigError(f"{name}: {len(given)} of {len(files)} runs have a seed in NAME@SEED=FILE. Give it for all "
                          "runs of an arm or for none.")
    if len(set(given)) < len(given):
        raise ConfigError(f"{name}: seeds {', '.join(map(str, given))} name a seed twice. Runs of an arm must differ "
                          "in their seed.")
    found = given or [seed for path, _ in files if (seed := _seed_beside(path)) is not None]
    known = len(set(found)) == len(files)
    seeds = found if known else range(1, len(files) + 1)
    runs = tuple(Run(seed, read_run(path)) for (path, _), seed in zip(files, seeds, strict=True))
    return Arm(name, runs, known)


def _seed_beside(path: Path) -> int | None:
    """The seed in a file of settings beside a metrics file, where there is one."""
    for name in MANIFEST_NAMES:
        beside = path.with_name(name)
        if not beside.is_file():
            continue
        try:
            value = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{beside}, beside {path}, cannot be read: {error}. Remove it, or give seeds as "
                            "NAME@SEED=FILE.") from error
        for keys in (("seed",), ("training", "seed"), ("config", "seed"), ("config", "training", "seed")):
            found = value
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, int) and not isinstance(found, bool):
                return found
    return None


def _check_lengths(arm: Arm) -> None:
    """A mean over runs of different length is the loss of no run; those that diverged are not in it."""
    for run in arm.finite[1:]:
        first, other = arm.finite[0].curve, run.curve
        wrong = []
        if first.final.step != other.final.step:
            wrong.append(f"last validations at steps {first.final.step} and {other.final.step}")
        if first.last_step != other.last_step:
            wrong.append(f"last steps {first.last_step} and {other.last_step}")
        for cost, tolerance in (("raw_tokens", 0.0), ("layer_tokens", BUDGET_TOLERANCE), ("flops", BUDGET_TOLERANCE)):
            one, two = first.final.costs[cost], other.final.costs[cost]
            if abs(one - two) > tolerance * max(one, two):
                wrong.append(f"{one:.6g} and {two:.6g} {cost.replace('_', ' ')}")
        if wrong:
            raise DataError(f"{arm.name}: {first.path} and {other.path} have {'; '.join(wrong)}. Runs of one arm must "
                            "have the same length; give others a name of their own, or --allow-different-lengths.")
