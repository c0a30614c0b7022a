"""Validation sets with a loss each, as the settings name them. Without numpy, so that settings are checked at once."""

import re

from megatron_ltd.config.files import DataConfig

NAMED_PATH = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
"""NAME=PATH: a validation set with a loss of its own."""


def validation_sets(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """The paths of each validation set that has a loss of its own, by name; empty if there is one loss."""
    values = data.validation_paths
    named = [NAMED_PATH.fullmatch(value) for value in values]
    if any(named):
        return {found[1]: (found[2],) for found in named if found is not None}
    if not data.multiple_validation_sets:
        return {}
    names = data.validation_set_names or tuple(map(str, range(len(values))))
    return {name: (value,) for name, value in zip(names, values, strict=False)}
