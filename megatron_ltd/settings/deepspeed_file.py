"""DeepSpeed's JSON file as settings of this project: random-LTD, progressive layer dropping, and of the engine's blocks
what has a counterpart: batch sizes, precision, clipping and the stage of ZeRO.

    {"data_efficiency": {"data_routing": {"random_ltd": {"enabled": true, "total_layer_num": 24,
        "random_ltd_layer_num": 22, "random_ltd_layer_id": [1, ...], "random_ltd_schedule": {
        "min_value": 128, "max_value": 2048, "schedule_type": "fixed_linear",
        "schedule_config": {"require_steps": 200000, "seq_per_step": 16}}}}},
     "progressive_layer_drop": {"enabled": true, "theta": 0.5, "gamma": 0.001}}

A note names what is not read. As in DeepSpeed the block's own `enabled` decides; the outer ones do not.
Megatron-DeepSpeed counts `--train-tokens`, and the tokens that drive its learning rate, in layer tokens when random-LTD
is on, so those settings follow too.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron_ltd.errors import flag_name
from megatron_ltd.settings.foreign_flags import nearest
from megatron_ltd.settings.toml_file import parsed_file

BLOCK = ("data_efficiency", "data_routing", "random_ltd")
PLD = "progressive_layer_drop"


class Kind(NamedTuple):
    """What a value of the block must be: a test, and the rest of the sentence that says so."""

    holds: Callable[[Any], bool]
    wanted: str


_ANY = Kind(lambda value: True, "")
_SWITCH = Kind(lambda value: isinstance(value, bool), "true or false; write one of them")
_OBJECT = Kind(lambda value: isinstance(value, dict), "an object; write it as DeepSpeed does")
_NUMBER = Kind(lambda value: type(value) is int and 1 <= value < 2**63, "a whole number from 1 on; write one")
_LAYERS = Kind(lambda value: isinstance(value, list) and bool(value) and
               all(type(layer) is int and layer >= 0 for layer in value),
               "a list of layers, counted from 0; write for example [1, 2, 3]")
_LINEAR = Kind(lambda value: value == "fixed_linear", "fixed_linear, since only that is defined; use it, or flags in "
               "place of the file: --random-ltd-root-degree or --random-ltd-length-list")

_AMOUNT = Kind(lambda value: type(value) in (int, float) and value >= 0, "a number of at least 0; write one")
_STAGE = Kind(lambda value: type(value) is int and 0 <= value <= 3, "0, 1, 2 or 3; write one of them")
ENGINE = {"train_batch_size": ("global_batch_size", _NUMBER),
          "train_micro_batch_size_per_gpu": ("micro_batch_size", _NUMBER), "gradient_clipping": ("clip_grad", _AMOUNT)}
"""Entries of the engine: the setting here, and what the value must be."""

_REQUIRED = {
    "random_ltd_layer_id": _LAYERS,
    "random_ltd_schedule": _OBJECT,
    "random_ltd_schedule.min_value": _NUMBER,
    "random_ltd_schedule.max_value": _NUMBER,
    "random_ltd_schedule.schedule_config": _OBJECT,
    "random_ltd_schedule.schedule_config.require_steps": _NUMBER,
    "random_ltd_schedule.schedule_config.seq_per_step": _NUMBER,
}
"""Values of an enabled block; those of an inner object with a dot."""
_OF_PLD = {"enabled": _SWITCH, "theta": Kind(lambda value: type(value) in (int, float), "a number; write one"),
           "gamma": Kind(lambda value: type(value) in (int, float), "a number; write one")}
_OPTIONAL = {
    "enabled": _SWITCH, "total_layer_num": _NUMBER, "random_ltd_layer_num": _ANY, "model_mask_name": _ANY,
    "model_type": _ANY, "hidden_state_order": _ANY, "layer_token_lr_schedule": _OBJECT, "global_batch_size": _ANY,
    "micro_batch_size": _ANY, "random_ltd_schedule.schedule_type": _LINEAR,
}


def deepspeed_settings(path: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The settings that the file adds to those given elsewhere, which take precedence, by field; problems; notes.

    Args:
        given: values by field.
    """
    content, problems = parsed_file("--deepspeed-config", path, "JSON", json.loads)
    if problems:
        return {}, problems, []
    block: Any = content
    for key in BLOCK:
        block = block.get(key, {})
        if not isinstance(block, dict):
            return {}, [f"{path}: {key} = {block!r}: must be an object; write it as DeepSpeed does"], []
    values, problems = _values(block, f"{path}: {BLOCK[-1]}")
    wanted, of_pld = _progressive_layer_dropping(content.get(PLD, {}), f"{path}: {PLD}")
    problems += of_pld
    of_engine, wrong = _engine(content, path)
    wanted |= of_engine
    problems += wrong
    enabled = values.get("enabled", False) is True
    notes = [] if enabled or wanted else [f"{path}: nothing is taken from the file"]
    notes += _not_read(path, content)
    for field, key in (("seq_length", "random_ltd_schedule.max_value"), ("num_layers", "total_layer_num")):
        value = values.get(key)
        if enabled and _NUMBER.holds(value) and field not in given:
            notes.append(f"{path}: {BLOCK[-1]}.{key} = {value} is not compared with {flag_name(field)}, which is not "
                         "given")
        elif enabled and _NUMBER.holds(value) and given[field] != value:
            problems.append(f"{path}: {BLOCK[-1]}.{key} = {value}: it contradicts {flag_name(field)} = {given[field]}; "
                            "make them equal")
    if problems:
        return {}, problems, notes
    if enabled:
        wanted |= _wanted(values, given)
    notes += [f"{path}: {flag_name(field)} = {given[field]} is given and counts, rather than {wanted[field]} of the "
              "file" for field in sorted(wanted.keys() & given.keys()) if wanted[field] != given[field]]
    added = {field: value for field, value in wanted.items() if field not in given}
    if added:
        words = [flag_name(field) if value is True else f"{flag_name(field)} {value}" for field, value in added.items()]
        notes.append(f"{path}: taken as {' '.join(words)}")
    return added, problems, notes


def _values(block: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The values of the block by key, and everything that is wrong with them."""
    kinds = _REQUIRED | _OPTIONAL
    values: dict[str, Any] = {"": block}
    problems = []
    for holder in ("", "random_ltd_schedule", "random_ltd_schedule.schedule_config"):
        prefix = f"{holder}." if holder else ""
        known = [key.removeprefix(prefix) for key in kinds if key.rpartition(".")[0] == holder]
        found = values.get(holder)
        for key, value in found.items() if isinstance(found, dict) else ():
            if key in known:
                values[prefix + key] = value
            else:
                problems.append(f"{where}.{prefix}{key}: no such key; nearest: {nearest(key, known)}")
    if block.get("enabled") is False or "enabled" not in block:
        return values, problems
    problems += [f"{where}.{key} = {values.get(key)!r}: must be {kind.wanted}" for key, kind in kinds.items()
                 if (key in _REQUIRED or key in values) and isinstance(values.get(key.rpartition(".")[0]), dict)
                 and not kind.holds(values.get(key))]
    layers = values.get("random_ltd_layer_id")
    count = values.get("random_ltd_layer_num")
    if isinstance(layers, list) and _LAYERS.holds(layers) and count not in (None, len(layers)):
        problems.append(f"{where}.random_ltd_layer_num = {count!r}: it contradicts random_ltd_layer_id, which names "
                        f"{len(layers)} layers; make them equal")
    return values, problems


def _progressive_layer_dropping(block: Any, where: str) -> tuple[dict[str, Any], list[str]]:
    """The settings that its block stands for, with DeepSpeed's defaults; and everything that is wrong with it."""
    if not isinstance(block, dict):
        return {}, [f"{where} = {block!r}: must be an object; write it as DeepSpeed does"]
    problems = [f"{where}.{key} = {value!r}: must be {_OF_PLD[key].wanted}" if key in _OF_PLD else
                f"{where}.{key}: no such key; nearest: {nearest(key, list(_OF_PLD))}"
                for key, value in block.items() if key not in _OF_PLD or not _OF_PLD[key].holds(value)]
    if problems or not block.get("enabled", False):
        return {}, problems
    return {"pld_theta": block.get("theta", 1.0), "pld_gamma": block.get("gamma", 0.001)}, []


def _engine(content: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    """The settings that the engine's entries stand for, and everything that is wrong with them. DeepSpeed fills in
    entries that are "auto" from its caller's flags, so they say nothing."""
    wanted: dict[str, Any] = {}
    problems = []
    for key, (field, kind) in ENGINE.items():
        value = content.get(key, "auto")
        if value != "auto" and not kind.holds(value):
            problems.append(f"{path}: {key} = {value!r}: must be {kind.wanted}")
        elif value not in ("auto", 0):
            wanted[field] = float(value) if field == "clip_grad" else value
    for block, entry, kind in (("fp16", "enabled", _SWITCH), ("bf16", "enabled", _SWITCH),
                               ("zero_optimization", "stage", _STAGE)):
        found = content.get(block, {})
        value = found.get(entry, "auto") if isinstance(found, dict) else found
        if value != "auto" and not kind.holds(value):
            problems.append(f"{path}: {block}.{entry} = {value!r}: must be {kind.wanted}")
        elif block != "zero_optimization" and value is True:
            wanted[block] = True
        elif block == "zero_optimization" and value in (1, 2, 3):
            wanted["data_parallel_sharding_strategy"] = "optim_grads_params" if value == 3 else "optim_grads"
    return wanted, problems


def _not_read(path: str, content: dict[str, Any]) -> list[str]:
    """A note that names what is not read."""
    efficiency = content.get(BLOCK[0], {})
    others = sorted(content.keys() - {BLOCK[0], PLD, *ENGINE, "fp16", "bf16", "zero_optimization"})
    others += sorted(f"{BLOCK[0]}.{key}" for key in efficiency.keys() - {BLOCK[1], "enabled", "seed"})
    if not others:
        return []
    return [f"{path}: not read: {', '.join(others)}. Their counterparts are flags"]


def _wanted(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an enabled block stands for."""
    schedule = values["random_ltd_schedule"]
    wanted = {"random_ltd": True, "random_ltd_start_length": schedule["min_value"],
              "random_ltd_steps": schedule["schedule_config"]["require_steps"],
              "random_ltd_length_step": schedule["schedule_config"]["seq_per_step"],
              "random_ltd_layers": layer_text(values["random_ltd_layer_id"])}
    if given.get("train_tokens") is not None:
        wanted["token_budget"] = "layer"
    in_layer_tokens = values.get("layer_token_lr_schedule", {}).get("enabled") is True
    if in_layer_tokens or any(given.get(field) for field in ("train_tokens", "lr_decay_tokens", "lr_warmup_tokens")):
        wanted["layer_token_lr"] = True
    return wanted


def layer_text(layers: list[int]) -> str:
    """A list of layers as --random-ltd-layers takes it: `1-22`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ",".join("-".join(str(layer) for layer in part) for part in parts)
