"""Scaled rotary frequencies as plain values: which kind, with which factors; read from settings and from tables of
Hugging Face (`rope_scaling`, `rope_parameters`).

    linear     all frequencies divided by the factor
    dynamic    a larger base for sequences beyond the model's positions (NTK)
    llama3     low frequencies divided by the factor, high ones kept, a ramp between
    yarn       the same with a ramp over channels, and scaled cosines and sines (https://arxiv.org/abs/2309.00071)
    longrope   a factor for each frequency, other ones beyond the original positions, and scaled cosines and sines
               (https://arxiv.org/abs/2402.13753)
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_ltd.config.model import ModelConfig

_ENTRIES = {
    "linear": "factor",
    "dynamic": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": "factor original_max_position_embeddings attention_factor beta_fast beta_slow truncate mscale "
            "mscale_all_dim",
    "longrope": "short_factor long_factor factor original_max_position_embeddings attention_factor",
}
"""Kind -> the entries of its table that are read."""
_REQUIRED = {"linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
             "yarn": (), "longrope": ("short_factor", "long_factor")}
_LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
"""What Megatron-LM's --use-rope-scaling stands for, besides the factor."""


@dataclass(frozen=True)
class RopeScaling:
    """Args:
        kind: one of the table above.
        original_positions: those of the model before its context was extended.
        attention_factor: on cosines and sines.
        beta_fast, beta_slow: rotations within the original positions between which yarn's ramp lies; rounded to whole
            channels with `truncate`.
        short_factor, long_factor: of longrope for each frequency, up to and beyond the original positions.
    """

    kind: str
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def table(self) -> dict[str, Any]:
        """As Hugging Face writes it."""
        values = {"factor": self.factor, "original_max_position_embeddings": self.original_positions,
                  "low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor,
                  "beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate,
                  "attention_factor": self.attention_factor, "short_factor": list(self.short_factor),
                  "long_factor": list(self.long_factor)}
        return {"rope_type": self.kind, **{name: values[name] for name in _ENTRIES[self.kind].split()
                                           if name in values}}

    def settings(self) -> dict[str, Any]:
        """Our flags for it: Megatron-LM's where they say the same."""
        if self.table() == {**_LLAMA_3, "factor": self.factor}:
            return {"use_rope_scaling": True, "rope_scaling_factor": self.factor}
        if self.kind == "linear" and self.factor % 1 == 0:
            return {"rotary_seq_len_interpolation_factor": int(self.factor)}
        return {"rope_scaling": json.dumps(self.table())}


def read_table(table: Mapping[str, Any], max_positions: int) -> tuple[RopeScaling | None, list[str]]:
    """The scaling of a table, None for plain frequencies, and what is wrong with it.

    Args:
        max_positions: of the model, the default of the original ones.
    """
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return None, []
    if not isinstance(kind, str) or kind not in _ENTRIES:
        return None, [f"rope_type = {kind!r}: must be default, {', '.join(_ENTRIES)}"]
    given = {name: table[name] for name in _ENTRIES[kind].split() if table.get(name) is not None}
    problems = [f"{kind} needs {name}" for name in _REQUIRED[kind] if name not in given]
    problems += [f"{name} = {value!r}"[:120] + f": must be {wanted}" for name, value in given.items()
                 if (wanted := _violation(name, value)) is not None]
    if problems:
        return None, problems
    original = given.pop("original_max_position_embeddings", 0 if kind in ("linear", "dynamic") else max_positions)
    factor = float(given.pop("factor", max_positions / original if original else 1.0))
    attention = given.pop("attention_factor", None)
    if attention is None:
        attention = _attention_factor(kind, factor, original, given)
    for name in ("mscale", "mscale_all_dim"):
        given.pop(name, None)
    values: dict[str, Any] = {
        name: tuple(map(float, value)) if isinstance(value, list) else value if name == "truncate" else float(value)
        for name, value in given.items() if value or name == "truncate"}
    return RopeScaling(kind, factor, original, attention_factor=float(attention), **values), []


def _violation(name: str, value: Any) -> str | None:
    if name == "truncate":
        return None if isinstance(value, bool) else "true or false"
    if name == "original_max_position_embeddings":
        return None if type(value) is int and value >= 1 else "a whole number of at least 1"
    numbers = value if name in ("short_factor", "long_factor") else [value]
    positive = isinstance(numbers, list) and all(type(x) in (int, float) and 0 < x < math.inf for x in numbers)
    if numbers is value:
        return None if positive and numbers else "a list of numbers above 0"
    zero_means_default = name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") and value == 0
    return None if positive or zero_means_default else "a number above 0"


def _attention_factor(kind: str, factor: float, original: int, given: Mapping[str, Any]) -> float:
    if kind == "longrope" and factor > 1.0:
        return math.sqrt(1.0 + math.log(factor) / math.log(original))
    if kind != "yarn" or factor <= 1.0:
        return 1.0
    over, under = given.get("mscale"), given.get("mscale_all_dim")
    if not over or not under:
        over, under = 1.0, 0.0
    return float((0.1 * over * math.log(factor) + 1.0) / (0.1 * under * math.log(factor) + 1.0))


def rope_scaling(config: ModelConfig) -> RopeScaling | None:
    """The scaling that the settings describe; for settings without problems."""
    return _read(config)[0]


def _read(config: ModelConfig) -> tuple[RopeScaling | None, list[str]]:
    if config.position_embedding_type != "rope":
        return None, []
    if config.use_rope_scaling:
        return read_table({**_LLAMA_3, "factor": config.rope_scaling_factor}, config.max_positions)
    if config.rotary_seq_len_interpolation_factor is not None:
        return read_table({"rope_type": "linear", "factor": config.rotary_seq_len_interpolation_factor},
                          config.max_positions)
    if config.rope_scaling is None:
        return None, []
    try:
        table = json.loads(config.rope_scaling)
    except (ValueError, RecursionError) as error:
        return None, [f"no JSON: {error}"]
    return read_table(table, config.max_positions) if isinstance(table, dict) else (None, ["no table of JSON"])


def scaling_problems(config: ModelConfig) -> list[str]:
    """What is wrong with the settings' scaling."""
    scaling, problems = _read(config)
    if scaling is None:
        return problems
    pairs = rotated_channels(config) // 2
    if scaling.kind == "dynamic" and pairs < 2:
        problems.append("dynamic needs at least four rotated channels of a head")
    if config.max_position_embeddings is None and (
            scaling.kind == "dynamic" or scaling != _read(replace(config, seq_length=config.seq_length + 1))[0]):
        problems.append("it would change with --seq-length; give --max-position-embeddings, the model's positions")
    return problems + [f"{name} has {len(values)} numbers: must have {pairs}, one for each pair of rotated channels"
                       for name, values in (("short_factor", scaling.short_factor),
                                            ("long_factor", scaling.long_factor))
                       if scaling.kind == "longrope" and len(values) != pairs]


def rotated_channels(config: ModelConfig) -> int:
    """Channels of a head that are rotated."""
    return int(config.head_dim * config.rotary_percent) // 2 * 2
