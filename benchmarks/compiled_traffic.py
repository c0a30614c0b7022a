"""What a layer's functions other than products read and write, each by itself and compiled.

    python -m benchmarks.compiled_traffic

The first is the planner's arithmetic (plan/layouts/traffic.py), which a test holds against torch's calls. The second is
Inductor's own count of the buffers that its kernels read and write, which is made when it compiles for a CPU as well;
kernels that it does not generate, products and attention, are left out of both. Numbers for each token, in widths of
the stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering

from benchmarks.ours import OurModel
from benchmarks.shapes import Shape, run_config
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layouts.traffic import backward_traffic, forward_traffic
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch

SHAPE = Shape(1, 256, 4, 256, 512, 4)
KINDS: dict[str, dict[str, Any]] = {
    "GPT": {},
    "Llama": {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
              "disable_bias_linear": True, "group_query_attention": True, "num_query_groups": 2,
              "ffn_hidden_size": 704},
}


@contextmanager
def generated_bytes() -> Iterator[list[int]]:
    """Those that the generated kernels of each graph read and write, while graphs are compiled."""
    found: list[int] = []
    generate = GraphLowering.codegen

    def counted(graph: GraphLowering) -> object:
        code = generate(graph)
        found.append(sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes
                         if not node.is_extern()))
        return code

    with inductor.patch(force_disable_caches=True), mock.patch.object(GraphLowering, "codegen", counted):
        yield found


def row(name: str, config: RunConfig, runtime: launch.Runtime) -> str:
    model = config.model
    apart = [sum(way(model, 1, dropped=False)) for way in (forward_traffic, backward_traffic)]
    ours = OurModel(config, runtime)
    block = ours.model.stages[0].stack.blocks["0"]
    block.forward = torch.compile(block.forward)
    with generated_bytes() as found:
        ours.step_of(policies(config).plan(0))
    forward, backward = (size / 4 / (SHAPE.samples * SHAPE.sequence_tokens) for size in found)
    numbers = (*apart, forward, backward)
    return f"| {name} | " + " | ".join(f"{number / model.hidden_size:.1f}" for number in numbers) + " |"


def main() -> None:
    plain = replace(run_config(SHAPE, precision="fp32", device="cpu"), token_drop=TokenDropConfig())
    runtime = launch.start(plain, Launch())
    print("| layer | forward, each by itself | backward | forward, compiled | backward |\n|---|--:|--:|--:|--:|")
    for name, settings in KINDS.items():
        for kernel, more in ((None, ""), (4, ", convolutions")):
            model = replace(plain.model, **settings, qkv_conv_kernel=kernel)
            print(row(name + more, replace(plain, model=model), runtime), flush=True)
    launch.stop()


if __name__ == "__main__":
    main()
