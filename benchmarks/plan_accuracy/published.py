"""Predicted and published utilisation of accelerators."""

from dataclasses import dataclass, replace

from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.plan.layouts.cluster import known_cluster
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.roofline import Roofline
from megatron_ltd.settings.cli import parse_run_config


@dataclass(frozen=True)
class Published:
    """A row of somebody's table.

    Args:
        rate: TFLOP/s of an accelerator as they count it, or tokens a second of one.
    """

    name: str
    flags: str
    gpus: int
    gpu: str
    rate: float
    changes: dict[str, float]


UNFUSED = {"attention_efficiency": 0.08}
"""Megatron-LM of 2021 wrote and read the scores of attention: per score about 12 bytes at 1.6 TB/s for some 190 FLOPs
(heads of 96 to 128 channels, half of the scores needed), which is 8% of an A100's peak."""
SLOW_H100 = {"memory_gb": 96, "memory_gb_per_second": 2400, "product_efficiency": 0.55, "fused": 0.6}
"""torchtitan's H100s have HBM2e at 2.4 TB/s and a limit of 500 W instead of 700 W (their text); compiled layers."""
FLOAT8 = SLOW_H100 | {"product_efficiency": 2 * 0.55}
"""Products of 8 bits at twice the rate, casts for nothing: at the best."""


def _megatron(name: str, tp: int, pp: int, micro: int, batch: int, layers: int, hidden: int, heads: int, gpus: int,
              chunk: int, rate: float) -> Published:
    """Of table 1 in arXiv 2104.04473; layouts from examples/sc21/run_table_1.sh in NVIDIA/Megatron-LM."""
    schedule = f" --pipeline-schedule interleaved --num-layers-per-virtual-pipeline-stage {chunk}" if chunk else ""
    return Published(name, f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --seq-length "
                     f"2048 --vocab-size 51200 --micro-batch-size {micro} --global-batch-size {batch} "
                     f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --fp16 "
                     "--recompute-granularity full --lr 1e-4 --train-iters 10 --mock-data" + schedule, gpus, "a100",
                     rate, UNFUSED)


MEGATRON = (
    _megatron("1.7B", 1, 1, 16, 512, 24, 2304, 24, 32, 0, 137),
    _megatron("3.6B", 2, 1, 16, 512, 30, 3072, 32, 64, 0, 138),
    _megatron("7.5B", 4, 1, 16, 512, 36, 4096, 32, 128, 0, 142),
    _megatron("18.4B", 8, 1, 8, 1024, 40, 6144, 48, 256, 0, 135),
    _megatron("39.1B", 8, 2, 4, 1536, 48, 8192, 64, 512, 0, 138),
    _megatron("76.1B", 8, 4, 2, 1792, 60, 10240, 80, 1024, 5, 140),
    _megatron("145.6B", 8, 8, 2, 2304, 80, 12288, 96, 1536, 5, 148),
    _megatron("310.1B", 8, 16, 1, 2160, 96, 16384, 128, 1920, 3, 155),
    _megatron("529.6B", 8, 35, 1, 2520, 105, 20480, 128, 2520, 1, 163),
    _megatron("1008B", 8, 64, 1, 3072, 128, 25600, 160, 3072, 0, 163),
)

LLAMA_3 = ("--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear "
           "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --vocab-size 128256 "
           "--seq-length 8192 --bf16 --data-parallel-sharding-strategy optim_grads_params --lr 1e-4 --train-iters 10 "
           "--mock-data")
EIGHT = f"--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 14336 {LLAMA_3}"
SEVENTY = f"--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --ffn-hidden-size 28672 {LLAMA_3}"
TITAN = (
    Published("Llama 3.1 8B, 8 H100, compiled", f"{EIGHT} --micro-batch-size 2 --global-batch-size 16", 8, "h100", 6667,
              SLOW_H100),
    Published("Llama 3.1 8B, 8 H100", f"{EIGHT} --micro-batch-size 2 --global-batch-size 16", 8, "h100", 5762,
              SLOW_H100 | {"fused": 1.0}),
    Published("Llama 3.1 8B, 128 H100, compiled", f"{EIGHT} --micro-batch-size 2 --global-batch-size 256", 128, "h100",
              6514, SLOW_H100),
    Published("Llama 3.1 8B, 8 H100, compiled, Float8", f"{EIGHT} --micro-batch-size 2 --global-batch-size 16", 8,
              "h100", 8532, FLOAT8),
    Published("Llama 3.1 70B, 256 H100, tensor 8, full, compiled, Float8", f"{SEVENTY} --micro-batch-size 16 "
              "--global-batch-size 512 --tensor-model-parallel-size 8 --sequence-parallel "
              "--recompute-granularity full", 256, "h100", 829, FLOAT8),
    Published("Llama 3 8B, 64 A100", f"{EIGHT} --micro-batch-size 1 --global-batch-size 64", 64, "a100", 2904,
              {"fused": 0.6}),
    Published("Llama 3 70B, 64 A100, full", f"{SEVENTY} --micro-batch-size 1 --global-batch-size 64 "
              "--recompute-granularity full", 64, "a100", 331, {"fused": 0.6}),
)
"""github.com/pytorch/torchtitan: benchmarks/llama3_h100_202412_torchtitan.md, tables 1, 3 and 4; docs/performance.md at
commit 0413364."""


class _Repeating(Roofline):
    """Full recomputation as Megatron-LM does it, of all products."""

    _repeated = 1.0


def published_tables() -> str:
    """Predicted beside published model FLOPs utilisation; where others recompute a part, without recomputation and with
    all of it. Megatron-LM's TFLOP/s also as they count them, with two forward passes."""
    lines = ["| model | accelerators | predicted | published | predicted / published | TFLOP/s with recomputation, "
             "predicted and published |", "|---|--:|--:|--:|--:|--:|"]
    for row in (*MEGATRON, *TITAN):
        config, peak = parse_run_config(row.flags.split())[0], known_cluster(row.gpus, row.gpu).peak_tflops * 1e12
        cluster = replace(known_cluster(row.gpus, row.gpu), **row.changes)  # type: ignore[arg-type]
        layout = Layout.of(config, row.gpus)
        plan = policies(config).whole
        samples = layout.micro_samples * layout.microbatches * layout.dp
        flops = samples * step_flops(config, plan)
        kind = _Repeating if row in MEGATRON else Roofline
        predicted = [flops / kind(config, replace(layout, recompute=recompute), cluster, policies(config)).step(
            plan).seconds / row.gpus / peak for recompute in dict.fromkeys((layout.recompute, "full"))]
        if row in MEGATRON:  # their count includes recomputation
            theirs = samples * _counted_by_megatron(config) / flops
            published = row.rate * 1e12 / theirs / peak
            counted = f"{predicted[0] * theirs * peak / 1e12:.0f} and {row.rate:.0f}"
        else:
            published, counted = row.rate * step_flops(config, plan) / config.model.seq_length / peak, ""
        lines.append(f"| {row.name} | {row.gpus:,} {row.gpu.upper()} | "
                     f"{' to '.join(f'{guess:.1%}' for guess in predicted)} | {published:.1%} | "
                     f"{' to '.join(f'{guess / published:.2f}' for guess in predicted)} | {counted} |")
    return "\n".join(lines)


def _counted_by_megatron(config: RunConfig) -> float:
    """FLOPs of a sample by equation 3 of arXiv 2104.04473, with two forward passes."""
    s, h, layers = config.model.seq_length, config.model.hidden_size, config.model.num_layers
    return 96 * s * layers * h * h * (1 + s / (6 * h) + 51200 / (16 * layers * h))
