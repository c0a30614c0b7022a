"""How a run is distributed over processes, and how it learns."""

from dataclasses import dataclass, field
from typing import Literal


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
    """Finetuning: passes over the training set, each in a different order; the last batch is filled up with samples of
    one more pass. The validation set is scored after each pass."""
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
    """Steps whose samples are skipped without an update, counted from 0: the step that the log calls 5 is 4. Learning
    rate and kept length go on as if they had been trained."""
    skip_nonfinite: int = 0
    """Go on without the update when the loss or the gradient norm is not finite, up to this many times in a row. With 0
    the first one ends the run with exit code 30."""
    on_loss_spike: Literal["warn", "skip"] | None = None
    """What to do when the loss of a step jumps. `warn`: log a warning. `skip`: go back to the newest checkpoint and
    skip the samples of that step and of those just before it."""
    loss_spike_threshold: float = 8.0
    """A loss jumps when it lies more than this many robust standard deviations above the median of the steps before
    it."""
    loss_spike_window: int = 128
    """Number of earlier steps with which a loss is compared. Only steps with the present kept length, bag size and
    stage count, and a quarter of the number is enough."""
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
    """Compile each layer, and the arithmetic between the output head's matrix products, with torch.compile."""

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
    """The learning rate of --decoupled-lr never decays below this. Default: --min-lr."""
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
    """Scale of Muon's update of a matrix [o, i]. `match_rms_adamw`: 0.2 sqrt(max(o, i)), which makes updates as large
    as AdamW's, so that one learning rate suits both. `spectral`: sqrt(max(o, i)). `shape_scaling`: sqrt(max(1, o/i)),
    called `original` in torch. `unit_rms_norm`: sqrt(o/i)."""
    muon_extra_scale_factor: float = 1.0
    """Additional factor on Muon's update."""
    muon_split_qkv: bool = True
    """Treat the query/key/value weight as three matrices in Muon rather than one."""
    muon_precision: Literal["fp32", "bf16"] | None = None
    """Precision of Muon's Newton-Schulz iterations. Default: fp32 in fp32 runs, so that all layouts give the same
    result; bf16, as in torch, with --bf16 or --fp16."""
