"""torch.compile for layers whose input length changes over the run.

torch compiles a layer for its first length and, at the second, for any length; guards such as divisibility may need
more graphs. After too many recompilations torch falls back to eager mode with at most one warning. So the limits are
set high enough for one graph per length, and beyond them torch raises an error.
"""

import torch

from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import policies

GRAPHS_OF_A_LENGTH = 4
"""Training and evaluation, each with and without the context of a cross layer."""


def prepare_compilation(config: RunConfig) -> None:
    """Allow one graph per length of the run, and make exceeding that limit an error."""
    if not config.training.compile:
        return
    graphs = GRAPHS_OF_A_LENGTH * (len(policies(config).lengths()) + 1)
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, graphs)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, graphs * config.model.num_layers)
    limits.fail_on_recompile_limit_hit = True
