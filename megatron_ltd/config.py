"""Every setting of a run, as frozen dataclasses.

The literal under a field is its documentation: the command line, `docs/flags.md` and the error messages are
generated from it. A new setting of the model has as its default what the code computed before, since older checkpoints
do not name it. A field `num_layers` is the flag `--num-layers`, with Megatron-LM's name wherever the concept
exists there. Derived values are properties and are never written back. `None` means "not given".

Deliberately one long file: it is the only list of settings, and half of it is their documentation.

Precedence: the defaults here < `--config file.toml` < flags. `megatron_ltd.settings.cli` builds a `RunConfig`,
`megatron_ltd.settings.checks.all` reports everything wrong with it at once.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ltd.token_drop.registry import POLICIES

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
    """Kind of position embedding. `alibi`: none; attention scores fall with the distance between query and key in the
    sample, whether or not a layer keeps the tokens between (https://arxiv.org/abs/2108.12409)."""
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
    """Norms multiply by 1 + their weight, which starts at 0: with weight decay it is drawn to 1."""
    ngram_rows: int | None = None
    """Add to each token's embedding that of the pair of tokens that ends with it, which a hash looks up in a table of
    so many rows. The table costs memory and no FLOPs; 64 rows for each token of the vocabulary were measured
    (docs/results.md). For GPT."""
    ngram_length: int = 2
    """With --ngram-rows: the longest run of tokens that is looked up. With 3 triples have embeddings as well as pairs,
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
    router processes in training; the router learns which. Routers are weights of the model, which Hugging Face's models
    do not have."""
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
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding."""
        assert self.vocab_size is not None, "resolve the vocabulary size from the tokenizer first"
        return -(-self.vocab_size // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by


@dataclass(frozen=True, kw_only=True)
class TokenDropConfig(*dict.fromkeys(policy.Settings for policy in reversed(POLICIES))):  # type: ignore[misc]
    """Ways to compute less: token dropping, skipped layers, short samples first. Each policy in `token_drop/policies`
    declares its own settings; the flags --random-ltd-... hold for every policy that chooses tokens."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are distributed over processes. Affects speed and memory, not results."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Processes that share the stack of layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one model chunk under the interleaved schedules; a process holds several chunks."""
    pipeline_schedule: Literal["1f1b", "interleaved", "interleaved-zero-bubble", "zbv"] = "1f1b"
    """Order of forward and backward passes over microbatches."""
    pipeline_split: str = "uniform"
    """Layers of each stage in order of depth: `uniform`; a list such as `5,7,7,5`; or `auto`, which minimises the FLOPs
    of the busiest process, including the head and averaged over the run's kept lengths."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel regions along the sequence (https://arxiv.org/abs/2205.05198)."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and gradients over data-parallel processes; short for
    --data-parallel-sharding-strategy optim_grads."""
    data_parallel_sharding_strategy: Literal["no_shard", "optim_grads", "optim_grads_params"] = "no_shard"
    """What data-parallel processes shard: nothing (replication), optimizer state and gradients (ZeRO-2), or
    parameters too (ZeRO-3)."""
    recompute_activations: bool = False
    """Short for --recompute-granularity selective."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of storing: nothing, norms before a branch and activation
    functions, or whole layers."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Collective library. `auto`: nccl on GPUs, gloo on CPU."""
    distributed_timeout_minutes: float = 10.0
    """Time limit for one collective; the run ends when it is exceeded."""

    @property
    def sharding(self) -> str:
        return "optim_grads" if self.use_distributed_optimizer and self.data_parallel_sharding_strategy == "no_shard" \
            else self.data_parallel_sharding_strategy

    @property
    def recompute(self) -> str:
        return "selective" if self.recompute_activations and self.recompute_granularity == "none" \
            else self.recompute_granularity


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop: its length, batch size and precision."""

    micro_batch_size: int = 1
    """Samples a process handles at a time."""
    global_batch_size: int | None = None
    """Samples of one optimizer step. Default: --micro-batch-size x data-parallel size."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: begin with START samples a step and grow by INCREMENT to the global batch size over
    the first SAMPLES samples."""
    train_iters: int | None = None
    """Steps to train. One of --train-iters, --train-samples, --train-tokens is required."""
    train_samples: int | None = None
    """Samples to train on."""
    train_tokens: int | None = None
    """Tokens to train on, in the unit of --token-budget."""
    train_epochs: int | None = None
    """Finetuning: passes over the training set, each in a different order; the last batch is filled up from a further
    pass. The validation set is scored after each pass."""
    epoch_samples: int | None = field(default=None, metadata={"flag": False})
    """Set by the entry point: samples in one pass over the training set."""
    early_stopping_patience: int | None = None
    """Finetuning: stop after this many evaluations in a row without a lower validation loss."""
    token_budget: Literal["raw", "layer"] = "raw"
    """What --train-tokens counts: `raw` tokens, samples x sequence length; or `layer` tokens, the mean over layers of
    the tokens a layer processes, as Megatron-DeepSpeed counts with random-LTD."""
    exit_interval: int | None = None
    """Save and stop, with exit code 11, after a step divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and stop, with exit code 11, after this many minutes."""
    exit_signal_handler: bool = True
    """On SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) save and stop with exit code 10; a second Ctrl-C ends
    the run immediately."""
    iterations_to_skip: tuple[int, ...] | None = None
    """Steps whose samples are passed over without an update, each named by the steps before it: 0 is the first, and
    the one that the log calls 5 is 4. Learning rate and kept length go on as if it had been trained."""
    skip_nonfinite: int = 0
    """Go on without the update when the loss or the gradient norm is not finite, up to this many times in a row. With 0
    the first one ends the run with exit code 30."""
    on_loss_spike: Literal["warn", "skip"] | None = None
    """When the loss of a step jumps: say so; or go back to the newest checkpoint and skip the samples of that step and
    of those just before it."""
    loss_spike_threshold: float = 8.0
    """A loss jumps when it lies so many standard deviations above the median of the steps before it, both estimated
    robustly."""
    loss_spike_window: int = 128
    """Number of steps with which a loss is compared, those of the present kept length, bag size or stage; a quarter of
    them is enough."""
    z_loss_coeff: float | None = None
    """Add to GPT's loss this times the mean over tokens of the square of log Z, the logarithm of the softmax's
    denominator (PaLM, https://arxiv.org/abs/2204.02311, section 5). Published runs use 1e-4. Reported as z_loss, apart
    from the cross-entropy; validation has none."""
    seed: int = 1234
    """Random seed; determines initial weights, data order, dropout and kept tokens."""
    bf16: bool = False
    """Compute in bfloat16; weights, gradients and optimizer state stay fp32."""
    fp16: bool = False
    """Compute in float16 with loss scaling; weights, gradients and optimizer state stay fp32."""
    loss_scale: float | None = None
    """Fixed loss scale for fp16. Default: dynamic."""
    initial_loss_scale: float = 4294967296.0
    """Initial dynamic loss scale."""
    min_loss_scale: float = 1.0
    """The run stops with exit code 30 when gradients overflow at this scale."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the dynamic scale is doubled."""
    hysteresis: int = 2
    """Overflows before the dynamic scale is halved."""
    deterministic_mode: bool = False
    """Use torch's deterministic kernels; operations without one raise an error."""
    compile: bool = False
    """Compile each layer, and the arithmetic between the head's products, with torch.compile."""

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    """AdamW; SGD with momentum 0.9; or Muon for the layers' matrices and AdamW for all other parameters, both with the
    same learning rate and weight decay."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float = 0.0
    """The learning rate never decays below this."""
    decoupled_lr: float | None = None
    """Peak learning rate of the word embedding and the output head. Default: --lr. It warms up and decays as --lr
    does."""
    decoupled_min_lr: float | None = None
    """What the rate of --decoupled-lr never decays below. Default: --min-lr."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay after warm-up."""
    lr_decay_iters: int | None = None
    """Steps until --min-lr is reached, warm-up included. Default: the whole run."""
    lr_decay_samples: int | None = None
    """The same in samples."""
    lr_decay_tokens: int | None = None
    """The same in raw tokens, or in layer tokens with --layer-token-lr."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_samples: int = 0
    """The same in samples."""
    lr_warmup_tokens: int = 0
    """The same in raw tokens, or in layer tokens with --layer-token-lr."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay length."""
    lr_warmup_init: float = 0.0
    """Learning rate at which warm-up starts."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine"] = "exponential"
    """Shape of the final decay of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Length of the final decay of WSD, in steps."""
    lr_wsd_decay_samples: int | None = None
    """The same in samples."""
    lr_wsd_decay_tokens: int | None = None
    """The same in raw tokens, or in layer tokens with --layer-token-lr."""
    layer_token_lr: bool = False
    """Count warm-up and decay in layer tokens, so that they take more steps while tokens are dropped. Their lengths are
    given by the -tokens flags; by default the decay lasts the whole run."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and norm weights are not decayed."""
    do_layernorm_bias_weight_decay: bool = False
    """Decay biases and the weights of norms too."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are clipped; 0 turns clipping off."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.999
    """Decay rate of the second moment."""
    adam_eps: float = 1e-8
    """Added to the square root of the second moment."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    muon_nesterov: bool = True
    """Use Nesterov momentum in Muon."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz iterations in each Muon step."""
    muon_scale_mode: Literal["match_rms_adamw", "spectral", "shape_scaling", "unit_rms_norm"] = "match_rms_adamw"
    """Scale of Muon's update of a matrix [o, i]: 0.2 sqrt(max(o, i)), which makes updates as large as AdamW's, so that
    one learning rate suits both; sqrt(max(o, i)); sqrt(max(1, o/i)), called `original` in torch; or sqrt(o/i)."""
    muon_extra_scale_factor: float = 1.0
    """Additional factor on Muon's update."""
    muon_split_qkv: bool = True
    """Treat the query/key/value weight as three matrices in Muon rather than one."""
    muon_precision: Literal["fp32", "bf16"] | None = None
    """Precision of Muon's Newton-Schulz iterations. Default: fp32 in fp32 runs, so that all layouts give the same
    result; bf16, as in torch, with --bf16 or --fp16."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus and tokenizer."""

    data_path: tuple[str, ...] | None = None
    """Prefix of a .bin/.idx corpus, or several, or WEIGHT PREFIX pairs."""
    train_data_path: tuple[str, ...] | None = None
    """Like --data-path, for training only; --split is then ignored. PREFIX@0:0.9 reads that part of a corpus.
    For ViT: a folder with one subfolder of images per class (needs Pillow), or an idx file of images and one of labels,
    plain or .gz."""
    valid_data_path: tuple[str, ...] | None = None
    """Like --data-path, for validation only. NAME=PREFIX ...: several sets with a loss each; `validation_loss` is then
    their mean."""
    multiple_validation_sets: bool = False
    """The corpora of --valid-data-path, given without weights, are sets with a loss each, named 0, 1, ... in order."""
    validation_set_names: tuple[str, ...] | None = None
    """Names of the sets of --multiple-validation-sets."""
    test_data_path: tuple[str, ...] | None = None
    """Like --data-path, for a test set that is evaluated once, after the last step."""
    split: str = "969,30,1"
    """Shares of --data-path for training, validation and test."""
    data_cache_path: str | None = None
    """Folder that caches index files, and the fact that a corpus was checked. Default: none; at every start corpora are
    checked in full and indices are built in memory."""
    verify_corpus: bool = False
    """Read corpora and index files in full even if they were checked before and have not changed since, and compare
    corpora with the checksums in their manifests."""
    mock_data: bool = False
    """Random tokens in place of a corpus, for throughput runs."""
    train_jsonl: tuple[str, ...] | None = None
    """Finetuning on prompts and responses, or conversations: files or globs with one JSON object per line (.jsonl,
    .jsonl.gz, .jsonl.zst), instead of a corpus. The loss covers the responses only."""
    valid_jsonl: tuple[str, ...] | None = None
    """Like --train-jsonl, for validation. NAME=FILE ...: several sets with a loss each."""
    test_jsonl: tuple[str, ...] | None = None
    """Like --train-jsonl, for a test set that is evaluated once, after the last step."""
    image_augmentation: Literal["none", "crop", "crop-flip"] = "none"
    """Randomly shift ViT's training images by up to an eighth of their size; `crop-flip` also mirrors them at
    random."""
    prompt_key: str = "prompt"
    """Key of the prompt in a line of --train-jsonl."""
    response_key: str = "response"
    """Key of the response in a line of --train-jsonl."""
    messages_key: str = "messages"
    """Key of the messages in a line of --train-jsonl that is a conversation: a list of role (system, user or assistant)
    and content. The loss covers what the assistant says in each of its turns."""
    chat_template: str | None = None
    """Jinja template that makes a text of a conversation. Default: the tokenizer's, from the chat_template.jinja or
    tokenizer_config.json beside its files; otherwise a plain one (docs/finetuning.md)."""
    overlong_samples: Literal["refuse", "skip"] = "refuse"
    """What to do if a prompt and its response are longer than --seq-length: `refuse` stops with an error before
    training, `skip` leaves the example out and counts it. Examples are never truncated."""
    num_workers: int = 0
    """Background threads that read the next step's samples; with 0 they are read when needed."""
    tokenizer_type: Literal["GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer",
                            "BertWordPieceLowerCase", "BertWordPieceCase", "NullTokenizer"] | None = None
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """SentencePiece .model file, a Hugging Face tokenizer.json or its folder, or Llama 3's file of tokens and ranks."""
    vocab_file: str | None = None
    """vocab.json of GPT-2 BPE, or vocab.txt of BERT's WordPiece."""
    merge_file: str | None = None
    """merges.txt of GPT-2 BPE."""
    bos_token: str | None = None
    """The token with which documents, examples and scored texts begin: its text, or `auto` for the one that the
    tokenizer's files say to add, if any. Default: none."""
    eod_token: str | None = None
    """The token that ends documents, by its text. Default: the one that the tokenizer's files declare as the end of a
    text, or a widely used one."""
    tokenizer_control_symbols: bool = False
    """Read the name of a SentencePiece model's control symbol in a text, such as <s>, as that symbol rather than as
    letters."""
    eod_mask_loss: bool = False
    """No loss where the input token is the end of a document."""
    reset_position_ids: bool = False
    """Count positions from the start of each document."""
    reset_attention_mask: bool = False
    """No attention across document boundaries."""
    fim_data: bool = False
    """Fill-in-the-middle (https://arxiv.org/abs/2207.14255): move the middle of some documents of a GPT corpus behind
    their ends, between the tokens named below. The tokenizer must have these."""
    fim_rate: float = 0.5
    """Share of documents, of the part that a sample holds of them, that --fim-data rearranges."""
    fim_spm_rate: float = 0.5
    """Share of these in which the suffix comes first (SPM), then the prefix and the middle."""
    fim_split_sample: str | None = None
    """Token between the fragments of a document, such as the files of a repository, which are rearranged one by
    one."""
    fim_fragment_rate: float | None = None
    """Share of fragments, in a document that is rearranged, with --fim-split-sample. Default: --fim-rate."""
    fim_no_prefix: str | None = None
    """Leave texts alone that begin with this."""
    fim_prefix_token: str = "<fim_prefix>"
    """Token before the text before the middle."""
    fim_middle_token: str = "<fim_middle>"
    """Token before the middle."""
    fim_suffix_token: str = "<fim_suffix>"
    """Token before the text after the middle."""
    fim_pad_token: str = "<fim_pad>"
    """Token that fills up a sample which has become shorter; it has no loss."""
    fim_eod_token: str | None = None
    """Token between documents. Default: the tokenizer's end-of-document token."""
    mask_prob: float = 0.15
    """Share of BERT's tokens that are predicted."""
    mask_max_ngram: int = 3
    """Maximum number of consecutive words that BERT predicts; single words are most likely."""
    mask_whole_word: bool = True
    """Mask whole words for BERT rather than single word pieces."""
    mask_longer_ngrams: bool = False
    """Make longer spans of predicted words more likely than shorter ones."""
    mask_geometric: bool = False
    """Draw span lengths from a geometric distribution with p = 0.2 (https://arxiv.org/abs/1907.10529, section 3.1)."""
    short_seq_prob: float = 0.1
    """Share of BERT's samples that are deliberately shorter than --seq-length."""

    @property
    def validation_paths(self) -> tuple[str, ...]:
        """What names the validation sets, apart from --data-path with --split."""
        return (self.valid_data_path if self.train_jsonl is None else self.valid_jsonl) or ()


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and loading."""

    save: str | None = None
    """Folder for checkpoints."""
    load: str | None = None
    """Folder to resume from, or an fsspec URL from which its newest checkpoint is copied first. It is an error if it
    holds no checkpoint, unless it is also --save or --upload and empty."""
    save_interval: int | None = None
    """Save every this many steps; the last step is always saved."""
    save_retain_interval: int | None = None
    """Keep only the newest two checkpoints and those of steps divisible by this."""
    upload: str | None = None
    """Copy each finished checkpoint to this folder, behind training: an fsspec URL such as s3://bucket/run, or a
    path."""
    upload_retain: int | None = None
    """Keep only this many copies there, the newest."""
    async_save: bool = False
    """Write checkpoints in the background."""
    finetune: bool = False
    """Load weights only; the step, sample counter and optimizer start from scratch."""
    pretrained_checkpoint: str | None = None
    """Finetuning: folder of the model to start from. It is loaded like --load with --finetune as long as --load holds
    no checkpoint, so that one command both starts and resumes a run."""
    resize_vocabulary: bool = False
    """With --finetune or --pretrained-checkpoint: give the model rows for the tokens that this run's tokenizer has and
    that of the checkpoint does not. New rows start at the mean of the others."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_save_optim: bool = False
    """Do not save optimizer state."""
    use_checkpoint_args: bool = False
    """Take the model's settings from the checkpoint rather than from flags; the tokenizer, too, where no flag
    names one."""
    ckpt_step: int | None = None
    """Load this step rather than the newest."""
    load_fallback: bool = False
    """If the checkpoint to load is damaged, continue from the newest sound one of an earlier step, with a warning."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run logs, and how often it evaluates."""

    log_interval: int = 100
    """Print a training line every this many steps."""
    log_format: Literal["auto", "short", "megatron"] = "auto"
    """Form of the training line: one of at most 120 columns, with a progress bar on a terminal; or Megatron-LM's, which
    tools parse. `auto` is short on a terminal, and Megatron-LM's where the output is redirected."""
    eval_interval: int = 1000
    """Evaluate on the validation set every this many steps."""
    eval_iters: int = 100
    """Global batches per evaluation, of each validation set; 0 turns evaluation off."""
    full_validation: bool = False
    """Evaluate on the whole validation set, or sets, rather than on --eval-iters batches."""
    eval_tasks: str | None = None
    """Score the model on these tasks during the run: TASK or TASK=FILE, separated by commas, as in
    tools/evaluate_zeroshot.py; a name that is not one of its tasks is one of lm-evaluation-harness. A task that fails
    is reported and does not stop the run."""
    eval_tasks_interval: int | None = None
    """Score --eval-tasks every this many steps, and at the end. Default: at the end only."""
    eval_tasks_limit: int | None = None
    """Score only so many examples of each task."""
    task_data: str | None = None
    """Folder of the files of --eval-tasks, such as lambada/lambada_test.jsonl; nothing is downloaded for tasks that are
    built in."""
    metrics_file: str | None = None
    """Append one JSON object per logged step and per evaluation to this file."""
    tensorboard_dir: str | None = None
    """Write TensorBoard events here."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project (needs the wandb package)."""
    profile: bool = False
    """Write a torch profiler trace of steps 10 to 12 beside the metrics file, else into the current folder."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for MFU. Default: looked up by name for known GPUs; otherwise MFU is not printed."""

    @property
    def evaluates(self) -> bool:
        return self.eval_iters > 0 or self.full_validation


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    token_drop: TokenDropConfig = field(default_factory=TokenDropConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, Any]]) -> "RunConfig":
        """The inverse of `to_dict`; unknown names raise TypeError."""
        sections = {}
        for section in dataclasses.fields(cls):
            kind: Any = section.default_factory
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.get(section.name, {}).items()}
            sections[section.name] = kind(**given)
        return cls(**sections)

    def digest(self) -> str:
        """SHA-256 of the whole configuration; it must be equal on all ranks."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
