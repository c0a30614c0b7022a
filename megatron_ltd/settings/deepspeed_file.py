"""DeepSpeed's JSON file: the block that configures random-LTD, as settings of this project.

    {"data_efficiency": {"data_routing": {"random_ltd": {"enabled": true, "total_layer_num": 24,
        "random_ltd_layer_num": 22, "random_ltd_layer_id": [1, ...], "random_ltd_schedule": {
        "min_value": 128, "max_value": 2048, "schedule_type": "fixed_linear",
        "schedule_config": {"require_steps": 200000, "seq_per_step": 16}}}}}}

Nothing else of the file is read, and it is said what. As in DeepSpeed the block's own `enabled` decides; the outer ones
do not. Megatron-DeepSpeed counts `--train-tokens`, and the tokens that drive its learning rate, in layer tokens when
random-LTD is on, so those settings follow too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ltd.settings.foreign_flags import nearest

BLOCK = ("data_efficiency", "data_routing", "random_ltd")
_BLOCK_KEYS = {"enabled", "total_layer_num", "random_ltd_layer_num", "random_ltd_layer_id", "model_mask_name",
               "model_type", "hidden_state_order", "random_ltd_schedule", "layer_token_lr_schedule",
               "global_batch_size", "micro_batch_size"}
_SCHEDULE_KEYS = {"min_value", "max_value", "schedule_type", "schedule_config"}
_SPEED_KEYS = {"require_steps", "seq_per_step"}
_TOKEN_LENGTHS = ("train_tokens", "lr_decay_tokens", "lr_warmup_tokens")


class DeepSpeedConfig:
    """What a file asks for.

    `settings` are fields of this project; `expected` are values that other settings must have; `problems` and `notes`
    are sentences for the user.
    """

    def __init__(self, path: str):
        self.path = path
        self.settings: dict[str, Any] = {}
        self.expected: dict[str, tuple[str, int]] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        content = self._read()
        if content is not None:
            block = self._block(content)
            self._other_keys(content)
            if block is not None:
                self._translate(block)

    def for_run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that the file adds to those given elsewhere, which come first.

        Args:
            given: values by field.
        """
        if not self.settings:
            return {}
        for field, (key, value) in self.expected.items():
            if field not in given:
                self.notes.append(f"{self._where(key)} = {value} is not compared with --{field.replace('_', '-')}, "
                                  "which is not given")
            elif given[field] != value:
                self.problems.append(f"{self._where(key)} = {value}: it contradicts --{field.replace('_', '-')} = "
                                     f"{given[field]}; make them equal")
        wanted = dict(self.settings)
        if given.get("train_tokens") is not None:
            wanted["token_budget"] = "layer"
        if any(given.get(field) for field in _TOKEN_LENGTHS):
            wanted["layer_token_lr"] = True
        for field in sorted(wanted.keys() & given.keys()):
            if wanted[field] != given[field]:
                self.notes.append(f"{self.path}: --{field.replace('_', '-')} = {given[field]} is given and counts, "
                                  f"rather than {wanted[field]} of the file")
        added = {field: value for field, value in wanted.items() if field not in given}
        if added:
            words = [_flag(field, value) for field, value in added.items()]
            self.notes.append(f"{self.path}: taken as {' '.join(words)}")
        return added

    def _read(self) -> dict[str, Any] | None:
        advice = "give the path of DeepSpeed's JSON file"
        try:
            content = json.loads(Path(self.path).read_text(encoding="utf-8"))
        except OSError as error:
            self.problems.append(f"--deepspeed-config = {self.path}: cannot be read ({error.strerror}); {advice}")
            return None
        except (ValueError, RecursionError) as error:
            self.problems.append(f"--deepspeed-config = {self.path}: not valid JSON: {error}; {advice}")
            return None
        if not isinstance(content, dict):
            self.problems.append(f"--deepspeed-config = {self.path}: not a JSON object; {advice}")
            return None
        return content

    def _block(self, content: dict[str, Any]) -> dict[str, Any] | None:
        """The block, if it is there and switched on."""
        found: Any = content
        for key in BLOCK:
            found = found.get(key, {})
            if not isinstance(found, dict):
                self.problems.append(f"{self.path}: {key} = {found!r}: must be an object; write it as DeepSpeed does")
                return None
        self._unknown(found, _BLOCK_KEYS, "")
        enabled = found.get("enabled", False)
        if not isinstance(enabled, bool):
            self.problems.append(f"{self._where('enabled')} = {enabled!r}: must be true or false; write one of them")
        if enabled is not True:
            self.notes.append(f"{self.path}: random_ltd is not enabled there; nothing is taken from the file")
            return None
        return found

    def _other_keys(self, content: dict[str, Any]) -> None:
        """Name what is not read."""
        others = sorted(key for key in content if key != BLOCK[0])
        efficiency = content.get(BLOCK[0])
        if isinstance(efficiency, dict):
            others += sorted(f"{BLOCK[0]}.{key}" for key in efficiency if key not in (BLOCK[1], "enabled", "seed"))
        if others:
            self.notes.append(f"{self.path}: only random_ltd is read; not read: {', '.join(others)}. Their "
                              "counterparts are flags")

    def _translate(self, block: dict[str, Any]) -> None:
        before = len(self.problems)
        schedule = self._part(block, "random_ltd_schedule", _SCHEDULE_KEYS)
        speed = self._part(schedule, "schedule_config", _SPEED_KEYS, "random_ltd_schedule.")
        kind = schedule.get("schedule_type", "fixed_linear")
        if kind != "fixed_linear":
            self.problems.append(f"{self._where('random_ltd_schedule.schedule_type')} = {kind!r}: only fixed_linear "
                                 "is defined; use it, or flags in place of the file: --random-ltd-root-degree or "
                                 "--random-ltd-length-list")
        layers = self._layers(block)
        inner = "random_ltd_schedule.schedule_config."
        numbers = {"random_ltd_start_length": self._number(schedule, "min_value", "random_ltd_schedule."),
                   "random_ltd_steps": self._number(speed, "require_steps", inner),
                   "random_ltd_length_step": self._number(speed, "seq_per_step", inner)}
        longest = self._number(schedule, "max_value", "random_ltd_schedule.")
        rate = self._part(block, "layer_token_lr_schedule", None, required=False)
        if len(self.problems) > before:
            return
        self.settings = {"random_ltd": True, **numbers, "random_ltd_layers": layer_text(layers)}
        if rate.get("enabled") is True:
            self.settings["layer_token_lr"] = True
        self.expected["seq_length"] = ("random_ltd_schedule.max_value", longest)
        if "total_layer_num" in block:
            self.expected["num_layers"] = ("total_layer_num", self._number(block, "total_layer_num", ""))

    def _layers(self, block: dict[str, Any]) -> list[int]:
        ids = block.get("random_ltd_layer_id")
        if not isinstance(ids, list) or not ids or not all(type(layer) is int and layer >= 0 for layer in ids):
            self.problems.append(f"{self._where('random_ltd_layer_id')} = {ids!r}: must be a list of layers, counted "
                                 "from 0; write for example [1, 2, 3]")
            return []
        count = block.get("random_ltd_layer_num", len(ids))
        if count != len(ids):
            self.problems.append(f"{self._where('random_ltd_layer_num')} = {count!r}: it contradicts "
                                 f"random_ltd_layer_id, which names {len(ids)} layers; make them equal")
        return ids

    def _part(self, holder: dict[str, Any], key: str, known: set[str] | None, prefix: str = "",
              required: bool = True) -> dict[str, Any]:
        part = holder.get(key, {} if not required else None)
        if not isinstance(part, dict):
            if not (prefix and not holder):  # the missing holder is a problem of its own
                self.problems.append(f"{self._where(prefix + key)} = {part!r}: must be an object; write it as "
                                     "DeepSpeed does")
            return {}
        if known is not None:
            self._unknown(part, known, prefix + key + ".")
        return part

    def _number(self, holder: dict[str, Any], key: str, prefix: str) -> int:
        value = holder.get(key)
        if type(value) is not int or not 1 <= value < 2**63:
            if holder:
                self.problems.append(f"{self._where(prefix + key)} = {value!r}: must be a whole number from 1 on; "
                                     "write one")
            return 0
        return value

    def _unknown(self, found: Mapping[str, Any], known: set[str], prefix: str) -> None:
        self.problems += [f"{self._where(prefix + key)}: no such key; nearest: {nearest(key, known)}"
                          for key in found if key not in known]

    def _where(self, key: str) -> str:
        return f"{self.path}: {BLOCK[-1]}.{key}"


def layer_text(layers: list[int]) -> str:
    """A list of layers as --random-ltd-layers takes it: `1-22`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ",".join("-".join(str(layer) for layer in part) for part in parts)


def _flag(field: str, value: Any) -> str:
    name = "--" + field.replace("_", "-")
    return name if value is True else f"{name} {value}"
