"""The entries of llama-like models: rotary positions, windows, norms and biases, in both directions."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ltd.checkpoint.convert.huggingface.families import DEFAULTS, ROTARY_BASE
from megatron_ltd.checkpoint.convert.huggingface.reader import Reader
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.rope_scaling import read_table, rope_scaling

BIASES = {"llama": ("attention_bias", "mlp_bias"), "smollm3": ("attention_bias", "mlp_bias"),
          "qwen3": ("attention_bias",), "olmo2": ("attention_bias",), "mistral": (), "qwen2": ()}
"""model_type -> its entries about biases; qwen2 has them in query, key and value, mistral has none."""
WINDOWED = ("mistral", "qwen2", "qwen3", "smollm3")
FULL, SLIDING = "full_attention", "sliding_attention"


def decoder_settings(reader: Reader, kind: str, read: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings for what is no plain size.

    Args:
        read: the sizes.
    """
    heads, groups, layers = read["num_attention_heads"], read["query_groups"], read["num_layers"]
    if heads % groups:
        reader.wrong("num_key_value_heads", groups, f"must divide num_attention_heads = {heads}")
    positions, head_dim = read["max_position_embeddings"], read["head_dim"]
    rotated = _rotated(reader, kind, layers)
    return {"kv_channels": head_dim if head_dim * heads != read["hidden_size"] else None,
            "group_query_attention": groups != heads, "num_query_groups": groups if groups != heads else None,
            "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
            "norm_placement": "after" if kind == "olmo2" else "before", "qk_layernorm": kind in ("qwen3", "olmo2"),
            "qk_layernorm_all_heads": kind == "olmo2", **_biases(reader, kind), **_rotary(reader, kind, positions),
            **_windows(reader, kind, rotated, positions), "no_rope_freq": _frequency([not r for r in rotated], 1)}


def _biases(reader: Reader, kind: str) -> dict[str, bool]:
    flags = {name: reader.flag(name, False) for name in BIASES[kind]}
    attention, mlp = flags.get("attention_bias", False), flags.get("mlp_bias", False)
    if attention and mlp:
        return {}
    return {"disable_bias_linear": True, "add_qkv_bias": attention or kind == "qwen2", "add_proj_bias": attention,
            "add_mlp_bias": mlp}


def _rotary(reader: Reader, kind: str, positions: int) -> dict[str, Any]:
    """The base and the scaling of the frequencies, from either of the ways in which they are written."""
    tables = {name: reader.any(name) for name in ("rope_scaling", "rope_parameters")}
    for name, table in tables.items():
        if table is not None and not isinstance(table, dict):
            reader.wrong(name, table, "must be a table")
    name, table = next(((name, table) for name, table in tables.items() if table and isinstance(table, dict)),
                       ("rope_parameters", {}))
    original = reader.any("original_max_position_embeddings")
    if original is not None:
        table = {**table, "original_max_position_embeddings": original}
    if any(isinstance(value, dict) for value in table.values()):
        reader.wrong(name, table, "tables for each kind of layer are not supported")
    scaling, problems = read_table(table, positions)
    for problem in problems:
        reader.wrong(name, table, problem)
    if table.get("partial_rotary_factor") not in (None, 1.0):
        reader.wrong(name, table, "only partial_rotary_factor = 1.0 is supported")
    base = reader.any("rope_theta", ROTARY_BASE.get(kind, 10_000))
    base = base if table.get("rope_theta") is None else table["rope_theta"]
    if type(base) not in (int, float) or base % 1 or base <= 1:
        base = reader.wrong("rope_theta", base, "must be a whole number above 1", 10_000)
    return {"rotary_base": int(base), **({} if scaling is None else scaling.settings())}


def _rotated(reader: Reader, kind: str, layers: int) -> list[bool]:
    """Which layers have rotary positions."""
    if kind != "smollm3":
        return [True] * layers
    interval = reader.any("no_rope_layer_interval", DEFAULTS[kind]["no_rope_layer_interval"])
    if type(interval) is not int or interval < 1:
        interval = reader.wrong("no_rope_layer_interval", interval, "must be a whole number of at least 1", 4)
    listed = reader.any("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(layers)])
    if not isinstance(listed, list) or len(listed) < layers or not all(mark in (0, 1) for mark in listed):
        listed = reader.wrong("no_rope_layers", listed, f"must be 0 or 1 for each of {layers} layers", [1] * layers)
    return [bool(mark) for mark in listed[:layers]]


def _windows(reader: Reader, kind: str, rotated: Sequence[bool], positions: int) -> dict[str, Any]:
    """The window and the layers that have it."""
    defaults, layers = DEFAULTS[kind], len(rotated)
    window = reader.any("sliding_window")
    if "sliding_window" not in reader.config:
        window = defaults.get("sliding_window")
    used = reader.flag("use_sliding_window", defaults.get("use_sliding_window", kind == "mistral"))
    first = reader.any("max_window_layers", defaults.get("max_window_layers"))
    types = reader.any("layer_types")
    if not used and (kind in ("qwen2", "qwen3") or (kind not in WINDOWED and "use_sliding_window" in reader.config)):
        window = None
    if window is not None and (type(window) is not int or window < 1):
        window = reader.wrong("sliding_window", window, "must be a whole number of at least 1")
    if kind == "mistral":
        sliding = [True] * layers
    elif kind == "smollm3":
        sliding = [used and not rotates for rotates in rotated]
    else:
        sliding = [layer >= (first if type(first) is int else 0) for layer in range(layers)]
    if types is not None:
        if not isinstance(types, list) or len(types) < layers or not all(name in (FULL, SLIDING) for name in types):
            reader.wrong("layer_types", types, f"must be {FULL} or {SLIDING} for each of {layers} layers")
        else:
            listed = [name == SLIDING for name in types[:layers]]
            if kind == "mistral" and window is not None and listed != sliding:
                reader.wrong("layer_types", types, "every layer of this model has the window")
            sliding = listed
    if window is None and types is not None and any(sliding):
        reader.wrong("layer_types", types, f"{SLIDING} needs a sliding_window")
    if window is None or not any(sliding) or (kind not in WINDOWED and window >= positions):
        return {}
    if kind not in WINDOWED:
        reader.wrong("sliding_window", window, f"the classes of {kind} have no windows, but caches of keys and values "
                                               "do; remove the entry, or use a model_type that has them")
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": _frequency([not s for s in sliding], 0)}


def _frequency(marks: Sequence[bool], mark: int) -> tuple[int, ...] | None:
    """Marked layers as --no-rope-freq and --window-attn-skip-freq write them; the latter lists the others as 1."""
    if not any(marks):
        return None
    every = next(layer + 1 for layer, marked in enumerate(marks) if marked)
    if list(marks) == [(layer + 1) % every == 0 for layer in range(len(marks))]:
        return (every,)
    return tuple(mark if marked else 1 - mark for marked in marks)


def decoder_kind(config: ModelConfig) -> tuple[str, dict[str, bool]]:
    """The nearest model_type, and what must hold for it to compute the same."""
    layers = range(config.num_layers)
    rotated, windows = all(map(config.is_rotated, layers)), [config.is_windowed(layer) for layer in layers]
    qkv, proj, mlp = config.qkv_bias, config.proj_bias, config.mlp_bias
    kind = "llama"
    if config.norm_placement == "after" or config.qk_layernorm_all_heads:
        kind = "olmo2"
    elif config.qk_layernorm:
        kind = "qwen3"
    elif not rotated:
        kind = "smollm3"
    elif qkv and not proj:
        kind = "qwen2"
    elif any(windows):
        kind = "mistral" if all(windows) and not (qkv or mlp) else "smollm3"
    return kind, {
        "--position-embedding-type must be rope": config.position_embedding_type == "rope",
        "--rotary-percent must be 1.0": config.rotary_percent == 1.0,
        "--normalization must be RMSNorm": config.normalization == "RMSNorm",
        "--swiglu must be on": config.swiglu,
        "--add-qkv-bias and --add-proj-bias must be equal": qkv == proj or kind == "qwen2",
        "--add-mlp-bias must be off": not mlp or "mlp_bias" in BIASES[kind],
        "--no-rope-freq must be left out": rotated or kind == "smollm3",
        "--window-size must be left out": not any(windows) or kind in WINDOWED,
        "--norm-placement after needs --qk-layernorm --qk-layernorm-all-heads, and they need it":
            kind != "olmo2" or (config.norm_placement == "after" and config.qk_layernorm
                                and config.qk_layernorm_all_heads),
        "--hidden-size must be divisible by --num-attention-heads":
            kind != "llama" or config.hidden_size % config.num_attention_heads == 0,
    }


def decoder_entries(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What is no size, for a model of this type."""
    scaling, layers = rope_scaling(config), range(config.num_layers)
    biases = {"attention_bias": config.proj_bias, "mlp_bias": config.mlp_bias}
    # Without an entry some classes take a padding token that the vocabulary may not have.
    entries: dict[str, Any] = {
        "hidden_act": "silu", "pad_token_id": None, "rope_theta": float(config.rotary_base),
        "attention_dropout": config.attention_dropout, **{name: biases[name] for name in BIASES[kind]}}
    if scaling is not None:
        entries["rope_scaling"] = scaling.table()
    if kind == "smollm3":
        entries["no_rope_layers"] = [int(config.is_rotated(layer)) for layer in layers]
    if kind not in WINDOWED:
        return entries
    windows = [config.is_windowed(layer) for layer in layers]
    entries["sliding_window"] = config.window_size[0] + 1 if config.window_size is not None and any(windows) else None
    if kind != "mistral":
        entries["use_sliding_window"] = any(windows)
        entries["layer_types"] = [SLIDING if windowed else FULL for windowed in windows]
    return entries
