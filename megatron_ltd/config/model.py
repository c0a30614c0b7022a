"""The model's settings."""

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["gpt", "bert", "vit"]


def _is_marked(numbers: tuple[int, ...], layer: int, mark: int) -> bool:
    """Whether one number stands for the layer, every N-th, or its own among one for each layer is the mark."""
    return (layer + 1) % numbers[0] == 0 if len(numbers) == 1 else numbers[layer] == mark


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer: what a checkpoint's weights mean."""

    family: Family = field(default="gpt", metadata={"flag": False})
    """Set by the entry point: a causal model that predicts the next token, a bidirectional one with BERT's heads, or an
    image classifier."""
    num_layers: int = 0
    """Transformer layers."""
    hidden_size: int = 0
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the MLP. Default: 4 x hidden, or with --swiglu 8/3 x hidden rounded down to a multiple of 64."""
    num_attention_heads: int = 0
    """Query heads."""
    kv_channels: int | None = None
    """Size of one head. Default: hidden / heads."""
    group_query_attention: bool = False
    """Grouped-query attention with --num-query-groups key/value heads."""
    num_query_groups: int | None = None
    """Key/value heads, with --group-query-attention. Default: as many as query heads. With fewer than
    --tensor-model-parallel-size, several processes compute the same key/value head."""
    seq_length: int = 0
    """Tokens in one sample."""
    max_position_embeddings: int | None = None
    """Positions the model can represent. Default: --seq-length."""
    position_embedding_type: Literal["learned_absolute", "rope", "alibi", "none"] = "learned_absolute"
    """Kind of position embedding. `alibi`: no embedding; attention scores fall with the distance between query and key
    in the sample, whether or not a layer keeps the tokens between them (https://arxiv.org/abs/2108.12409)."""
    rotary_base: int = 10000
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of a head's channels that are rotated."""
    use_rope_scaling: bool = False
    """Scale the rotary frequencies as Llama 3.1 does, by --rope-scaling-factor."""
    rope_scaling_factor: float = 8.0
    """How many times longer --use-rope-scaling makes the context."""
    rotary_seq_len_interpolation_factor: int | None = None
    """Divide the positions of rotary embeddings by this, so that a longer context has the angles of a shorter one."""
    rope_scaling: str | None = None
    """Any other scaling of the rotary frequencies, as the JSON table that a Hugging Face config.json holds under
    rope_scaling or rope_parameters. Its rope_type is linear, dynamic, llama3, yarn or longrope."""
    no_rope_freq: tuple[int, ...] | None = None
    """One number N: no rotary positions in every N-th layer. One number for each layer: 1 for a layer without, 0 for
    one with."""
    qkv_conv_kernel: int | None = None
    """Add to a token's query, key and value those of the N - 1 tokens before it, by a causal convolution of each
    channel whose weights start at 0. It costs hardly any FLOPs; with Muon and a table of n-grams, 4 saved most of all
    that was measured (docs/results.md). On GPUs use it with --compile, without which a step takes a quarter longer, by
    estimate. For GPT."""
    window_size: tuple[int, int] | None = None
    """BEFORE AFTER: sliding-window attention, in which a token attends to itself and the BEFORE tokens before it in the
    sample, whether or not a layer keeps those between. AFTER is 0."""
    window_attn_skip_freq: tuple[int, ...] | None = None
    """With --window-size. One number N: every N-th layer attends to everything. One number for each layer: 1 for a
    layer with the window, 0 for one without."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Normalisation before attention, before the MLP, and before the head."""
    norm_epsilon: float = 1e-5
    """Added to the variance in normalisation."""
    apply_layernorm_1p: bool = False
    """Norms multiply by 1 + their weight, which starts at 0, so that weight decay pulls the factor towards 1."""
    ngram_rows: int | None = None
    """Add to each token's embedding that of the pair of tokens that ends with it, which a hash looks up in a table of
    this many rows. The table costs memory and no FLOPs; 64 rows for each token of the vocabulary were measured
    (docs/results.md). For GPT."""
    ngram_length: int = 2
    """With --ngram-rows: the longest run of tokens that is looked up. With 3, triples have embeddings as well as pairs,
    in as many rows again."""
    embed_layernorm: bool = False
    """Normalise the word embeddings, before positions are added, as in BLOOM."""
    norm_placement: Literal["before", "after"] = "before"
    """Where a layer's norms stand: before attention and MLP, or after them and before the residual sum, as in OLMo
    2."""
    qk_layernorm: bool = False
    """Normalise queries and keys, each head by itself, as in Qwen 3."""
    qk_layernorm_all_heads: bool = False
    """With --qk-layernorm, normalise all heads together, as in OLMo 2."""
    swiglu: bool = False
    """SwiGLU in place of GELU in the MLP."""
    openai_gelu: bool = False
    """The tanh approximation of GELU (GPT-2's) in place of the exact one."""
    disable_bias_linear: bool = False
    """No biases in the linear layers of attention and MLP."""
    add_qkv_bias: bool = False
    """Biases in the query/key/value projection even with --disable-bias-linear."""
    add_proj_bias: bool = False
    """Biases in attention's output projection even with --disable-bias-linear."""
    add_mlp_bias: bool = False
    """Biases in the MLP even with --disable-bias-linear."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output head its own weights instead of sharing the word embedding's."""
    bert_no_binary_head: bool = False
    """BERT without the sentence-order head, its pooler and token types; each sample is then a single segment of
    text."""
    img_h: int | None = None
    """Height of ViT's images in pixels. Default: 224."""
    img_w: int | None = None
    """Width of ViT's images in pixels. Default: 224."""
    patch_dim: int | None = None
    """Height and width of ViT's patches in pixels; each patch is a token, and the class token is one more. Default:
    16."""
    num_channels: int | None = None
    """Channels of ViT's images. Default: 3."""
    num_classes: int | None = None
    """Number of classes of ViT. Default: 1000."""
    vocab_size: int | None = None
    """Size of the vocabulary. Default: the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """The embedding has rows for the vocabulary rounded up to a multiple of this. Unlike in Megatron-LM the
    rounding does not depend on the tensor-parallel size, and the extra rows do not affect the loss."""
    hidden_dropout: float = 0.0
    """Dropout on the embeddings and on the outputs of attention and MLP. Megatron-LM's default is 0.1;
    pretraining today uses none."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities; above 0 the fused attention kernels cannot be used, and the backward pass
    computes the scores again. Megatron-LM's default is 0.1."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; projections into the residual stream use std / sqrt(2 x layers)."""
    scaled_init: bool = True
    """With --no-scaled-init, projections into the residual stream use the same standard deviation as the others."""
    parametrization: Literal["standard", "completep"] = "standard"
    """How initial weights, learning rates and multipliers follow from the model's size. With `completep`
    (https://arxiv.org/abs/2505.01618) the settings that are best for a small base model stay best for wider and deeper
    ones."""
    base_hidden_size: int | None = None
    """Width of the base model of --parametrization completep."""
    base_num_layers: int | None = None
    """Layers of the base model of --parametrization completep."""
    mixture_of_depths_capacity: float | None = None
    """Mixture-of-Depths (https://arxiv.org/abs/2404.02258), for GPT: share of a sample's tokens that a layer with a
    router processes in training; the router learns which. Routers are weights of the model, so it cannot be exported to
    Hugging Face."""
    mixture_of_depths_every: int = 2
    """With --mixture-of-depths-capacity: every N-th layer has a router; the others process all tokens."""
    mixture_of_depths_strata: int = 1
    """With --mixture-of-depths-capacity: number of equal spans of the sequence, each of which keeps the same number of
    tokens in training. With --sequence-parallel it must be a multiple of --tensor-model-parallel-size."""

    @property
    def width_multiplier(self) -> float:
        """Width relative to the base model; 1 in the standard parametrization."""
        return 1.0 if self.base_hidden_size is None else self.hidden_size / self.base_hidden_size

    @property
    def depth_multiplier(self) -> float:
        """Layers relative to the base model; 1 in the standard parametrization."""
        return 1.0 if self.base_num_layers is None else self.num_layers / self.base_num_layers

    @property
    def ffn(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return (8 * self.hidden_size // 3) // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def head_dim(self) -> int:
        return self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return (self.group_query_attention and self.num_query_groups) or self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def proj_bias(self) -> bool:
        return self.add_proj_bias or not self.disable_bias_linear

    @property
    def mlp_bias(self) -> bool:
        return self.add_mlp_bias or not self.disable_bias_linear

    def is_windowed(self, layer: int) -> bool:
        """Whether the layer has a sliding window."""
        frequency = self.window_attn_skip_freq
        return self.window_size is not None and (frequency is None or not _is_marked(frequency, layer, 0))

    def is_rotated(self, layer: int) -> bool:
        """Whether the layer has rotary positions, if the model has them."""
        return self.no_rope_freq is None or not _is_marked(self.no_rope_freq, layer, 1)

    def is_routed(self, layer: int) -> bool:
        """Whether the layer has a router of Mixture-of-Depths."""
        return self.mixture_of_depths_capacity is not None and (layer + 1) % self.mixture_of_depths_every == 0

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings if self.max_position_embeddings is not None else self.seq_length

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        assert self.img_h is not None and self.img_w is not None and self.patch_dim is not None
        return self.img_h // self.patch_dim, self.img_w // self.patch_dim

    @property
    def patch_values(self) -> int:
        """Values in a patch."""
        assert self.num_channels is not None and self.patch_dim is not None
        return self.num_channels * self.patch_dim**2

    @property
    def tied(self) -> bool:
        return not self.untie_embeddings_and_output_weights

    @property
    def has_binary_head(self) -> bool:
        """Whether the model is BERT with the loss on the order of two sentences, whose tokens then have types."""
        return self.family == "bert" and not self.bert_no_binary_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding."""
        assert self.vocab_size is not None, "resolve the vocabulary size from the tokenizer first"
        return -(-self.vocab_size // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by
