"""`--recipe NAME`: a named set of settings, below those of files and flags. Each is a TOML file in `recipes`, whose
comment says what it saves and where that was measured."""

from pathlib import Path
from typing import Any

from megatron_ltd.settings.flag_reference import flags_by_field
from megatron_ltd.settings.toml_file import read_config_file

FOLDER = Path(__file__).resolve().parent / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_recipe(name: str) -> tuple[dict[str, Any], list[str]]:
    """The settings of a recipe by field, and what is wrong with its name."""
    if name not in recipe_names():
        return {}, [f"--recipe = {name}: no such recipe; there is {', '.join(recipe_names())}"]
    return read_config_file(str(FOLDER / f"{name}.toml"))


def recipe_note(name: str, settings: dict[str, Any]) -> str:
    """The recipe in full, as flags.

    Args:
        settings: those of the recipe that nothing else sets.
    """
    words = (flags_by_field()[field].spoken(value).replace(" = ", " ") for field, value in settings.items())
    return f"--recipe {name}: taken as {' '.join(words) or 'nothing, since all its settings are given'}"
