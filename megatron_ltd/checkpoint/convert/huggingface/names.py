"""Which of our tensors holds which of theirs, family by family, as views into ours.

    gpt2            GPT-2: learned positions, LayerNorm, GELU, biases
    llama           Llama, Mistral, Qwen2, Qwen3, SmolLM3: rotary positions, RMSNorm, SwiGLU, grouped queries, and what
                    the settings say of biases, windows and norms of queries and keys
    olmo2           the same with norms after attention and MLP
    bloom           BLOOM: ALiBi, a norm of the embeddings, LayerNorm, GELU, biases
    megatron-bert   pre-norm BERT with masked-token and sentence-order heads
    vit             images as patches, a classifier on the class token

Theirs are copied into the views on the way in and out of them on the way out, so that one description serves both
directions and neither needs a second copy of a tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.shapes import VOCABULARY, parameter_shapes

Names = dict[str, str | tuple[str, ...]]
"""Our module, or one of our tensors -> theirs, or the several that ours holds together."""

Part = tuple[torch.Tensor, tuple[int, ...]]
"""A view into our tensor, and the shape in which its numbers are stored on the other side."""


@dataclass(frozen=True)
class Family:
    """The names of a family, in the order of a model's tensors.

    Args:
        layer: a layer, without its number.
        before, inside, after: the layers; names inside a layer are relative to it.
    """

    layer: str
    before: Names
    inside: Names
    after: Names

    @property
    def base(self) -> str:
        """What a file without heads leaves out of its names."""
        return self.layer.split(".")[0] + "."


_GPT2 = Family(
    layer="transformer.h",
    before={"embedding.word": "transformer.wte", "embedding.position": "transformer.wpe"},
    inside={
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.proj": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    after={"final_norm": "transformer.ln_f", "head": "lm_head"},
)
_LLAMA = Family(
    layer="model.layers",
    before={"embedding.word": "model.embed_tokens"},
    inside={
        "attention_norm": "input_layernorm",
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.proj": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
    after={"final_norm": "model.norm", "head": "lm_head"},
)
_OLMO2 = replace(_LLAMA, inside={**_LLAMA.inside, "attention_norm": "post_attention_layernorm",
                                 "mlp_norm": "post_feedforward_layernorm"})
_BLOOM = Family(
    layer="transformer.h",
    before={"embedding.word": "transformer.word_embeddings",
            "embedding.norm": "transformer.word_embeddings_layernorm"},
    inside={
        "attention_norm": "input_layernorm",
        "attention.qkv": "self_attention.query_key_value",
        "attention.proj": "self_attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.fc1": "mlp.dense_h_to_4h",
        "mlp.fc2": "mlp.dense_4h_to_h",
    },
    after={"final_norm": "transformer.ln_f", "head": "lm_head"},
)
_MEGATRON_BERT = Family(
    layer="bert.encoder.layer",
    before={
        "embedding.word": "bert.embeddings.word_embeddings",
        "embedding.position": "bert.embeddings.position_embeddings",
        "embedding.token_type": "bert.embeddings.token_type_embeddings",
    },
    inside={
        "attention_norm": "attention.ln",
        "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.proj": "attention.output.dense",
        "mlp_norm": "ln",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    after={
        "final_norm": "bert.encoder.ln",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.norm": "cls.predictions.transform.LayerNorm",
        "lm_head": "cls.predictions",
        "head": "cls.predictions.decoder",
        "pooler": "bert.pooler.dense",
        "binary_head": "cls.seq_relationship",
    },
)
_VIT = Family(
    layer="vit.encoder.layer",
    before={
        "embedding.class_token": "vit.embeddings.cls_token",
        "embedding.position.weight": "vit.embeddings.position_embeddings",
        "embedding.patch": "vit.embeddings.patch_embeddings.projection",
    },
    inside={
        "attention_norm": "layernorm_before",
        "attention.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.proj": "attention.output.dense",
        "mlp_norm": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    after={"final_norm": "vit.layernorm", "classifier": "classifier"},
)
FAMILIES = {"gpt2": _GPT2, "llama": _LLAMA, "olmo2": _OLMO2, "bloom": _BLOOM, "megatron-bert": _MEGATRON_BERT,
            "vit": _VIT}


@dataclass(frozen=True)
class Mapped:
    """One of our tensors and what it is made of.

    Args:
        ours: global name, without the checkpoint's prefix.
        shape: of the whole tensor.
        theirs: names of the parts, as `transformers` saves them.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    family: str
    config: ModelConfig

    def parts(self, whole: torch.Tensor) -> dict[str, Part]:
        """The parts of our tensor by their names."""
        return dict(zip(self.theirs, _views(whole, self.ours, self.family, self.config), strict=True))

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self.parts(torch.empty(self.shape, device="meta")).items()}


def mapping(family: str, config: ModelConfig) -> list[Mapped]:
    """Every tensor of a model."""
    shapes = parameter_shapes(config)
    found = [Mapped(ours + kind, shapes[ours + kind], tuple(name + kind for name in theirs), family, config)
             for ours, theirs in _modules(FAMILIES[family], config.num_layers)
             for kind in ("", ".weight", ".bias") if ours + kind in shapes]
    assert len(found) == len(shapes), shapes.keys() - {entry.ours for entry in found}
    return found


def _modules(family: Family, num_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    places = [("", "", family.before), *((f"layers.{i}.", f"{family.layer}.{i}.", family.inside)
                                         for i in range(num_layers)), ("", "", family.after)]
    for our_prefix, their_prefix, names in places:
        for ours, theirs in names.items():
            several = (theirs,) if isinstance(theirs, str) else theirs
            yield our_prefix + ours, tuple(their_prefix + name for name in several)


def _views(whole: torch.Tensor, name: str, family: str, config: ModelConfig) -> list[Part]:
    """How theirs lie in a tensor of ours."""
    shape = tuple(whole.shape)
    if name in VOCABULARY:  # with padding in ours
        assert config.vocab_size is not None
        return [(whole[:config.vocab_size], (config.vocab_size, *shape[1:]))]
    if ".attention.qkv." in name and family != "bloom":  # which keeps the three of a head together, as we do
        return _fused_transposed_qkv(whole, config) if family == "gpt2" else _separate_qkv(whole, config)
    if family == "gpt2" and (".attention.proj." in name or ".mlp." in name):
        return [(whole.t(), shape[::-1])]  # GPT-2 keeps its matrices as [in, out]
    if name == "embedding.patch.weight":
        assert config.num_channels is not None and config.patch_dim is not None
        return [(whole, (shape[0], config.num_channels, config.patch_dim, config.patch_dim))]
    if family == "vit" and name.startswith(("embedding.class_token", "embedding.position")):
        return [(whole, (1,) * (3 - len(shape)) + shape)]
    return [(whole, shape)]


def _separate_qkv(whole: torch.Tensor, config: ModelConfig) -> list[Part]:
    """Query, key and value apart, where ours are together for each key/value head: [g, (n/g + 2), d]."""
    groups, d = config.query_groups, config.head_dim
    queries = config.num_attention_heads // groups
    heads = whole.unflatten(0, (groups, queries + 2, d))
    return [(part, (groups * part.shape[1] * d, *whole.shape[1:])) for part in heads.split((queries, 1, 1), dim=1)]


def _fused_transposed_qkv(whole: torch.Tensor, config: ModelConfig) -> list[Part]:
    """[in, 3 n d] with all queries first, as GPT-2's c_attn; a bias is [3 n d]."""
    by_kind = whole.unflatten(0, (config.num_attention_heads, 3, config.head_dim)).transpose(0, 1)  # [3, n, d, ...]
    if whole.ndim == 1:
        return [(by_kind, tuple(whole.shape))]
    return [(by_kind.permute(3, 0, 1, 2), tuple(whole.shape)[::-1])]


def tied_copies(family: str, config: ModelConfig) -> dict[str, str]:
    """Their names that may stand in a file a second time: copy -> what it must equal."""
    copies: dict[str, str] = {}
    if family == "megatron-bert":
        copies["cls.predictions.decoder.bias"] = "cls.predictions.bias"
    if family != "vit" and config.tied:
        copies[f"{FAMILIES[family].after['head']}.weight"] = f"{FAMILIES[family].before['embedding.word']}.weight"
    return copies


def is_constant(name: str) -> bool:
    """Masks, positions and frequencies that some files hold besides the weights, and that follow from the settings."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "embeddings.position_ids"))
