"""How much memory a process will need, by arithmetic: an estimate to see before the first step."""

from math import prod

from megatron_ltd.config import RunConfig
from megatron_ltd.model.arithmetic.shapes import parameter_shapes
from megatron_ltd.plan.derived import global_batch_size

ACTIVATION_VALUES = {"none": 17, "selective": 17, "full": 1}
"""Values of the hidden size that a layer keeps of each token for its backward pass, with a fused attention kernel: 34
bytes in half precision without recomputation (https://arxiv.org/abs/2205.05198, section 4.1, without dropout), the
input alone with full recomputation."""


def parameter_count(config: RunConfig) -> int:
    """Parameters of the model, those of a tied head counted once."""
    return sum(map(prod, parameter_shapes(config.model).values()))


def predicted_bytes(config: RunConfig, dp: int) -> tuple[int, int]:
    """Bytes of a process for weights, gradients and optimizer state, and for activations.

    The layers are taken to be spread evenly; buffers of libraries and of the allocator are not counted.

    Args:
        dp: data-parallel size.
    """
    parallel, half = config.parallel, config.training.precision != "fp32"
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    mine = parameter_count(config) / (tp * pp)
    moments = {"adam": 8, "sgd": 4, "muon": 4}[config.optimizer.optimizer]
    shards = 1 if parallel.sharding == "no_shard" else dp
    gathered = 0 if not half and shards == 1 else 2 if half else 4
    if parallel.sharding == "optim_grads_params":
        gathered = 0  # one layer at a time
    state = mine * ((4 + 4 + moments) / shards + gathered)
    micro, model = config.training.micro_batch_size, config.model
    in_flight = min(pp, max(1, global_batch_size(config, dp) // (micro * dp)))
    values = ACTIVATION_VALUES[parallel.recompute] * model.hidden_size / (tp if parallel.sequence_parallel else 1)
    activations = values * (2 if half else 4) * micro * model.seq_length * model.num_layers / pp * in_flight
    return int(state), int(activations)
