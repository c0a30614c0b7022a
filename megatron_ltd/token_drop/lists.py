"""Lists of layers and of lengths as users write them, such as `1-22` and `0:128,1000:256`."""

import re
from collections.abc import Iterator

from megatron_ltd.errors import ConfigError

MAX_LISTED_LAYER = 9999
_RANGE = re.compile(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?")
_STEP_LENGTH = re.compile(r"\s*([0-9]{1,18})\s*:\s*([0-9]{1,9})\s*")


def parse_layer_list(text: str, flag: str = "--random-ltd-layers") -> tuple[int, ...]:
    """Layer numbers in a text such as `1-22` or `1,3,5-9`, in the order given.

    Args:
        flag: the setting's name, for the message.

    Raises:
        ConfigError: the text cannot be parsed; duplicates are reported by `layer_list_problems`.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or last < first or last > MAX_LISTED_LAYER:
            raise ConfigError(f"{flag} = {text!r}: {part.strip()!r} is neither a layer nor an ascending "
                              f"range up to layer {MAX_LISTED_LAYER}; write for example 1-22 or 1,3,5-9")
        layers.extend(range(first, last + 1))
    return tuple(layers)


def layer_list_problems(flag: str, text: str | None, layers: int) -> Iterator[str]:
    """Messages about listed layers that do not exist or are listed twice.

    Args:
        layers: number of layers in the model.
    """
    if text is None:
        return
    try:
        listed = parse_layer_list(text, flag)
    except ConfigError as error:
        yield str(error)
        return
    outside = sorted({layer for layer in listed if layer >= layers})
    if outside:
        yield (f"{flag} = {text}: layer {outside[0]} does not exist, --num-layers = {layers} are counted "
               f"from 0; name layers up to {layers - 1}")
    doubled = sorted({layer for layer in listed if listed.count(layer) > 1})
    if doubled:
        yield f"{flag} = {text}: layer {doubled[0]} is listed twice; list every layer once"


def parse_length_list(text: str, flag: str = "--random-ltd-length-list") -> tuple[tuple[int, int], ...]:
    """(step, kept tokens) pairs in a text such as `0:128,1000:256`.

    Raises:
        ConfigError: the text cannot be parsed, steps do not ascend from 0, or a length decreases.
    """
    matches = [_STEP_LENGTH.fullmatch(part) for part in text.split(",")]
    entries = tuple((int(match[1]), int(match[2])) for match in matches if match)
    steps, lengths = [step for step, _ in entries], [length for _, length in entries]
    if len(entries) < len(matches) or steps != sorted(set(steps)) or steps[0] != 0 or lengths != sorted(lengths) \
            or lengths[0] < 1:
        raise ConfigError(f"{flag} = {text!r}: it must be STEP:LENGTH pairs between commas, steps "
                          "ascending from 0, lengths from 1 and never falling; write for example 0:128,1000:256")
    return entries
