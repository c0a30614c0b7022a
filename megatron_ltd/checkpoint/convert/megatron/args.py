"""The `args` of Megatron-LM, which describe a model, as our settings and back."""

from collections.abc import Mapping
from typing import Any

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.errors import CheckpointError, flag_name

State = Mapping[str, Any]

_REFUSED = {
    "apply_residual_connection_post_layernorm": "post-norm residual connections",
    "num_experts": "experts",
    "squared_relu": "squared ReLU",
    "quick_geglu": "gated quick GELU",
    "multi_latent_attention": "multi-latent attention",
    "qk_l2_norm": "queries and keys of length 1",
    "attention_output_gate": "gated attention outputs",
    "rotary_interleaved": "rotary positions that pair neighbouring channels",
    "mtp_num_layers": "multi-token prediction",
}
"""What is not supported, if it is set."""
_ONLY = {"softmax_type": ("vanilla",), "normalization": ("LayerNorm", "RMSNorm"),
         "position_embedding_type": ("learned_absolute", "rope", "none")}
"""Settings of which only these values are supported."""
_NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
_SAME_NAME = ("kv_channels", "max_position_embeddings", "rotary_base", "rotary_percent", "use_rope_scaling",
              "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "normalization", "swiglu", "add_qkv_bias",
              "untie_embeddings_and_output_weights", "qk_layernorm", "apply_layernorm_1p")
"""Settings whose name and default are ours."""


def model_config(state: State, vocab_size: int | None) -> ModelConfig:
    """The model that the `args` and the heads in a file of the last stage describe.

    Raises:
        CheckpointError: it is unsupported, or its vocabulary is not known.
    """
    raise_problems("the model is not supported", [
        *(f"{flag_name(name)} ({what})" for name, what in _REFUSED.items() if argument(state, name, None)),
        *(f"{flag_name(name)} {argument(state, name, allowed[0])}: must be one of {', '.join(allowed)}"
          for name, allowed in _ONLY.items() if argument(state, name, allowed[0]) not in allowed)])
    heads = {name.partition(".")[0] for name in state.get("model", state.get("model0", {}))}
    real = vocab_size if vocab_size is not None else argument(state, "vocab_size", None)
    padded = argument(state, "padded_vocab_size", None)
    if real is None or (padded is not None and real > padded):
        raise CheckpointError(f"--vocab-size = {real}: the files tell only the padded size, {padded}; give the number "
                              "of tokens of the tokenizer, at most that")
    settings = {name: argument(state, name, getattr(ModelConfig, name)) for name in _SAME_NAME}
    settings |= {name: _needed(state, name) for name in _NEEDED}
    settings["rotary_base"] = int(settings["rotary_base"])
    settings["norm_epsilon"] = argument(state, "norm_epsilon", argument(state, "layernorm_epsilon", 1e-5))
    rope = argument(state, "use_rotary_position_embeddings", False)
    groups = argument(state, "num_query_groups", None) if argument(state, "group_query_attention", False) else None
    # Megatron-LM's fused GELU, its default, is the tanh approximation; without biases nothing is fused.
    biases = argument(state, "add_bias_linear", True)
    tanh_gelu = argument(state, "openai_gelu", False) or (biases and argument(state, "bias_gelu_fusion", True))
    bert = bool({"binary_head", "lm_head"} & heads)
    return ModelConfig(
        **settings, **_windows(state, bert), family="bert" if bert else "gpt", vocab_size=int(real),
        position_embedding_type="rope" if rope else argument(state, "position_embedding_type", "learned_absolute"),
        group_query_attention=groups is not None, num_query_groups=groups,
        no_rope_freq=_of_layers(state, "no_rope_freq"),
        openai_gelu=bool(tanh_gelu and not settings["swiglu"]),
        disable_bias_linear=not biases,
        bert_no_binary_head=bert and "binary_head" not in heads)


def argument(state: State, name: str, default: Any) -> Any:
    value = getattr(state.get("args"), name, None)
    return default if value is None else value


def _needed(state: State, name: str) -> int:
    value = argument(state, name, None)
    if not isinstance(value, int):
        raise CheckpointError(f"the file's args have no {name}, without which its model is not known")
    return value


def _windows(state: State, bert: bool) -> dict[str, Any]:
    """The sliding window; -1 tokens before, as there, are all of them."""
    window = argument(state, "window_size", None)
    if window is None or (isinstance(window, (tuple, list)) and tuple(window[:1]) == (-1,)):
        return {}
    is_pair = isinstance(window, (tuple, list)) and len(window) == 2 and all(type(size) is int for size in window)
    if bert or not is_pair or window[1] not in (0, -1) or window[0] < 0:
        raise CheckpointError(f"--window-size {window}: only a GPT's windows of earlier tokens are supported")
    return {"window_size": (int(window[0]), 0), "window_attn_skip_freq": _of_layers(state, "window_attn_skip_freq")}


def _of_layers(state: State, name: str) -> tuple[int, ...] | None:
    """A frequency, or a mark for each layer."""
    value = argument(state, name, None)
    if not value:
        return None
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    layers = _needed(state, "num_layers")
    if isinstance(value, int) or (len(numbers) == layers and set(numbers) <= {0, 1}):
        return numbers
    raise CheckpointError(f"{flag_name(name)} {value}: must be 0 or 1 for each of {layers} layers")


def megatron_settings(config: ModelConfig) -> dict[str, Any]:
    """The `args` of Megatron-LM that make the same model there.

    Raises:
        CheckpointError: no model there computes the same.
    """
    foreign = {
        "--norm-placement after": config.norm_placement == "after", "--rope-scaling": config.rope_scaling is not None,
        "--qk-layernorm-all-heads": config.qk_layernorm_all_heads, "a ViT": config.family == "vit",
        "--qk-layernorm of a BERT": config.family == "bert" and config.qk_layernorm,
        "--position-embedding-type alibi": config.position_embedding_type == "alibi",
        "--embed-layernorm": config.embed_layernorm, "--ngram-rows": config.ngram_rows is not None,
        "--qkv-conv-kernel": config.qkv_conv_kernel is not None,
        "a router": config.mixture_of_depths_capacity is not None,
        "--openai-gelu with --disable-bias-linear": config.openai_gelu and not config.swiglu and not config.mlp_bias,
        "--parametrization completep": config.parametrization != "standard",
        "--add-proj-bias, --add-mlp-bias": config.disable_bias_linear and (config.add_proj_bias or config.add_mlp_bias)}
    raise_problems("the model cannot be written for megatron-core",
                   [f"{what} is not supported there" for what, used in foreign.items() if used])
    same = (*_SAME_NAME, "num_layers", "hidden_size", "num_attention_heads", "group_query_attention",
            "num_query_groups", "seq_length", "position_embedding_type", "norm_epsilon", "vocab_size", "window_size")
    layers = range(config.num_layers)
    return {name: getattr(config, name) for name in same} | {
        "ffn_hidden_size": config.ffn, "max_position_embeddings": config.max_positions,
        "window_attn_skip_freq": config.window_attn_skip_freq and [int(config.is_windowed(layer)) for layer in layers],
        "no_rope_freq": config.no_rope_freq and [int(not config.is_rotated(layer)) for layer in layers],
        "padded_vocab_size": config.padded_vocab_size, "add_bias_linear": not config.disable_bias_linear,
        # Megatron-LM's fused GELU, its default, is the tanh approximation.
        "openai_gelu": config.openai_gelu, "bias_gelu_fusion": config.openai_gelu}


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """The command line of such `args`."""
    negative = {"add_bias_linear": "--disable-bias-linear", "bias_gelu_fusion": "--no-bias-gelu-fusion"}
    left_out = {"padded_vocab_size", "openai_gelu", *negative}
    if not settings["use_rope_scaling"]:
        left_out.add("rope_scaling_factor")
    if settings["position_embedding_type"] != "rope":
        left_out |= {"rotary_base", "rotary_percent"}
    words = [flag for name, flag in negative.items() if not settings[name]]
    for name, value in settings.items():
        flag = flag_name(name)
        if name in left_out or value is None or value is False:
            continue
        listed = str(value).replace(" ", "").strip("()") if isinstance(value, (tuple, list)) else value
        words.append(flag if value is True else f"{flag} {listed}")
    return words
