"""What a microbatch leaves in memory for its backward pass, as the layers here save it.

For n tokens of a microbatch, in values of the compute dtype; t tensor-parallel processes; n' = n, or n/t between the
regions under sequence parallelism; d_q the channels of all query heads, d_k those of all key heads; f the MLP's width:

    norms       2 n' h inputs, 2 n' h outputs, and fp32 statistics
    attention   n (d_q + 2 d_k) / t      query, key and value; rotary positions add n (d_q + d_k) / t;
                                         3 n d_q / t with grouped queries and a mask, for which keys are repeated
                n d_q / t                result, and fp32 statistics without dropout
    masks       k c for a run of layers that process the same k of each sample's tokens and attend to c: of windows,
                and with ALiBi n_heads k c / t biases; for each sample where tokens are dropped
    MLP         2 n f / t                or 4 with SwiGLU

Selective recomputation spares half of the MLP's, and outputs and statistics of norms before attention or the MLP.

(https://arxiv.org/abs/2205.05198, section 4.1, without scores.)
"""

from dataclasses import dataclass, field
from itertools import accumulate

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.token_drop.plan import LayerPlan, StepPlan

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Activations:
    """Bytes of one microbatch on one tensor-parallel process.

    Args:
        value_bytes: of a number of the compute dtype.
        fused_norm: RMSNorm is one kernel, as on GPUs, and saves its input alone.
    """

    model: ModelConfig
    layout: Layout
    value_bytes: int
    fused_norm: bool = True
    _sums: dict[int, tuple[StepPlan, list[int]]] = field(default_factory=dict, repr=False, compare=False)

    def stream(self, tokens: int) -> int:
        """The residual stream of so many tokens of each sample."""
        between = tokens * self.layout.micro_samples // self.layout.slices
        return between * self.model.hidden_size * self.value_bytes

    def saved(self, plan: StepPlan, number: int) -> int:
        """What a layer saves without full recomputation, its input included."""
        layer = plan.layers[number]
        model, layout, size = self.model, self.layout, self.value_bytes
        tokens = layer.tokens * layout.micro_samples
        keys = (plan.read_tokens if layer.attends_to_all else layer.tokens) * layout.micro_samples
        between = tokens // layout.slices
        outputs = 0 if self._selective and model.norm_placement == "before" else 2
        norms = 2 * self.stream(layer.tokens) + outputs * (self.stream(layer.tokens) + self._norm_extras(between))
        width = model.ffn // layout.tp * size
        mlp = (4 if model.swiglu else 2) * tokens * width // (2 if self._selective else 1)
        attention = self._attention(tokens, keys, self._masked(plan, number))
        return norms + mlp + attention + self._dropout(between) \
            + (16 * between if layer.token_set is not None else 0)

    def transient(self, layer: LayerPlan) -> int:
        """Gradients that exist at once while a layer's backward pass runs."""
        tokens = layer.tokens * self.layout.micro_samples
        width = self.model.ffn // self.layout.tp * self.value_bytes
        return (3 if self.model.swiglu else 2) * tokens * width + 2 * self.stream(layer.tokens)

    def layer(self, plan: StepPlan, number: int) -> int:
        """What a layer keeps until its backward pass."""
        layer = plan.layers[number]
        if layer.skipped or not layer.backward:
            return 0
        if self.layout.recompute == "full":
            return self.stream(layer.tokens) + (16 * layer.tokens if layer.token_set is not None else 0)
        return self.saved(plan, number)

    def stage(self, plan: StepPlan, first: int, stop: int) -> int:
        """What the layers of a stage keep, its output, and its input if dropped layers work on a copy of it."""
        if id(plan) not in self._sums:  # a plan of many layers takes long to hash
            kinds = [(layer, self._masked(plan, number)) for number, layer in enumerate(plan.layers)]
            of_kind = {kind: self.layer(plan, kinds.index(kind)) for kind in set(kinds)}
            self._sums[id(plan)] = plan, [0, *accumulate(of_kind[kind] for kind in kinds)]
        sums = self._sums[id(plan)][1]
        copied = first > 0 and plan.layers[first].token_set is not None
        return sums[stop] - sums[first] + self._masks(plan, first, stop) + \
            self.stream(plan.read_tokens) * ((stop < len(plan.layers)) + copied)

    def output_gradients(self, plan: StepPlan, first: int, stop: int) -> int:
        """The gradients from which a split backward pass computes those of a stage's weights later."""
        model, tp = self.model, self.layout.tp
        sharded = (model.num_attention_heads + 2 * model.query_groups) * model.head_dim + \
            model.ffn * (2 if model.swiglu else 1)
        a_token = (sharded // tp + 2 * model.hidden_size) * self.value_bytes
        tokens = sum(layer.tokens for layer in plan.layers[first:stop] if layer.learns)
        return tokens * self.layout.micro_samples * a_token

    def _windowed(self, plan: StepPlan, number: int) -> bool:
        window = self.model.window_size
        return window is not None and self.model.is_windowed(number) and window[0] < plan.read_tokens - 1

    def _masked(self, plan: StepPlan, number: int) -> bool:
        """Whether attention takes a mask, for which grouped keys and values are repeated."""
        return plan.layers[number].attends_to_all or self.model.position_embedding_type == "alibi" or \
            self._windowed(plan, number)

    def _masks(self, plan: StepPlan, first: int, stop: int) -> int:
        """Masks of windows and ALiBi's biases, which the layers of a run share."""
        alibi = self.model.position_embedding_type == "alibi"
        if not alibi and self.model.window_size is None:
            return 0
        found: dict[tuple[object, int], int] = {}
        heads = self.model.num_attention_heads // self.layout.tp if alibi else 1
        run = 0
        for number in range(first, stop):
            layer = plan.layers[number]
            run += number > first and layer.token_set != plan.layers[number - 1].token_set
            if layer.skipped or not layer.backward or not self._masked(plan, number):
                continue
            samples = 1 if layer.token_set is None else self.layout.micro_samples
            keys = plan.read_tokens if layer.attends_to_all else layer.tokens
            of_run = None if layer.token_set is None else (run, layer.attends_to_all)
            found[of_run, self._windowed(plan, number)] = samples * heads * layer.tokens * keys
        return self.value_bytes * sum(found.values())

    @property
    def _selective(self) -> bool:
        return self.layout.recompute == "selective"

    def _attention(self, tokens: int, keys: int, masked: bool) -> int:
        model, tp, size = self.model, self.layout.tp, self.value_bytes
        queries = model.num_attention_heads * model.head_dim // tp * size
        groups = max(1, model.query_groups // tp) * model.head_dim * size  # more processes than groups share them
        rotary = model.position_embedding_type == "rope"
        if model.query_groups != model.num_attention_heads and (masked or model.attention_dropout):
            inputs = tokens * queries + 2 * keys * queries
        else:
            inputs = tokens * queries + 2 * keys * groups + (tokens * queries + keys * groups if rotary else 0)
        if model.qkv_conv_kernel is not None:
            inputs += tokens * queries + 2 * keys * groups
        if model.qk_layernorm:
            inputs += tokens * queries + keys * groups
        statistics = 4 * tokens * model.num_attention_heads // tp
        return inputs + tokens * queries + (0 if model.attention_dropout else statistics)

    def _norm_extras(self, between: int) -> int:
        """Statistics of a norm; an RMSNorm of several kernels also saves what it computes on the way."""
        if self.model.normalization == "LayerNorm":
            return 8 * between
        extra = 0 if self.fused_norm else between * self.model.hidden_size * self.value_bytes
        return 4 * between + extra

    def _dropout(self, between: int) -> int:
        """Masks of hidden states; those of attention are computed again."""
        return 2 * between * self.model.hidden_size if self.model.hidden_dropout else 0
