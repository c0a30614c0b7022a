"""The runs that are predicted and measured."""

from dataclasses import dataclass
from functools import cached_property

from megatron_ltd.config.run import RunConfig
from megatron_ltd.settings.cli import parse_run_config

GPT = ("--num-layers 8 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --vocab-size 1024 "
       "--micro-batch-size 2 --lr 1e-3 --train-iters 100 --mock-data")
LLAMA = (GPT + " --normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear "
         "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2")
LTD = " --random-ltd --random-ltd-start-length 32 --random-ltd-steps 1000"
LONG = GPT.replace("--seq-length 128", "--seq-length 512").replace("--micro-batch-size 2", "--micro-batch-size 1")
WIDE = GPT.replace("--hidden-size 128", "--hidden-size 512").replace("--num-layers 8", "--num-layers 4")


@dataclass(frozen=True)
class Case:
    """One run: flags and the number of processes."""

    name: str
    flags: str
    processes: int = 1

    @cached_property
    def config(self) -> RunConfig:
        return parse_run_config(self.flags.split())[0]


def _cases() -> tuple[Case, ...]:
    tp, pp = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
    zero3 = "--data-parallel-sharding-strategy optim_grads_params"
    return (
        Case("GPT", f"{GPT} --global-batch-size 8"),
        Case("GPT, one microbatch", f"{GPT} --global-batch-size 2"),
        Case("GPT, selective", f"{GPT} --global-batch-size 8 --recompute-granularity selective"),
        Case("GPT, full", f"{GPT} --global-batch-size 8 --recompute-granularity full"),
        Case("GPT, 32 of 128 kept", f"{GPT} --global-batch-size 8" + LTD),
        Case("GPT, 32 of 128 kept, full", f"{GPT} --global-batch-size 8 --recompute-granularity full" + LTD),
        Case("GPT, 512 tokens", f"{LONG} --global-batch-size 4"),
        Case("GPT, 512 tokens, full", f"{LONG} --global-batch-size 4 --recompute-granularity full"),
        Case("GPT, 512 tokens, ALiBi", f"{LONG} --global-batch-size 4 --position-embedding-type alibi"),
        Case("GPT, 512 tokens, ALiBi, 32 kept, bf16", f"{LONG} --global-batch-size 4 --bf16 --position-embedding-type "
             "alibi" + LTD),
        Case("GPT, 512 tokens, window", f"{LONG} --global-batch-size 4 --window-size 63 0"),
        Case("GPT, 512 wide", f"{WIDE} --global-batch-size 4"),
        Case("GPT, bf16", f"{GPT} --global-batch-size 8 --bf16"),
        Case("GPT, tp 2", f"{GPT} --global-batch-size 8 {tp} 2", 2),
        Case("GPT, tp 2, sequence parallel, kept 32", f"{GPT} --global-batch-size 8 {tp} 2 --sequence-parallel "
             "--random-ltd-strata 2" + LTD, 2),
        Case("GPT, pp 2", f"{GPT} --global-batch-size 8 {pp} 2", 2),
        Case("GPT, pp 4, 8 microbatches", f"{GPT} --global-batch-size 16 {pp} 4", 4),
        Case("GPT, pp 2, interleaved", f"{GPT} --global-batch-size 8 {pp} 2 --pipeline-schedule interleaved "
             "--num-layers-per-virtual-pipeline-stage 2", 2),
        Case("GPT, pp 2, zbv", f"{GPT} --global-batch-size 8 {pp} 2 --pipeline-schedule zbv", 2),
        Case("GPT, pp 2, interleaved zero bubble", f"{GPT} --global-batch-size 8 {pp} 2 --pipeline-schedule "
             "interleaved-zero-bubble --num-layers-per-virtual-pipeline-stage 2", 2),
        Case("GPT, dp 2", f"{GPT} --global-batch-size 8", 2),
        Case("GPT, dp 2, ZeRO-2", f"{GPT} --global-batch-size 8 --use-distributed-optimizer", 2),
        Case("GPT, 512 wide, dp 4, ZeRO-3", f"{WIDE} --global-batch-size 16 {zero3}", 4),
        Case("GPT, bf16, dp 2, ZeRO-2", f"{GPT} --global-batch-size 8 --use-distributed-optimizer --bf16", 2),
        Case("Llama", f"{LLAMA} --global-batch-size 8"),
        Case("Llama, full", f"{LLAMA} --global-batch-size 8 --recompute-granularity full"),
        Case("Llama, tp 2, sequence parallel", f"{LLAMA} --global-batch-size 8 {tp} 2 --sequence-parallel", 2),
        Case("Llama, dp 2, ZeRO-3, full", f"{LLAMA} --global-batch-size 8 {zero3} --recompute-granularity full", 2),
        Case("Llama, tp 2 x pp 2 x dp 2, ZeRO-2, 32 kept", f"{LLAMA} --global-batch-size 16 {tp} 2 {pp} 2 "
             "--use-distributed-optimizer" + LTD, 8),
        # Chosen after the arithmetic was complete, to see whether it holds for what it was not written with.
        Case("GPT, rotary positions *", f"{GPT} --global-batch-size 8 --position-embedding-type rope"),
        Case("Llama, norms of queries and keys *", f"{LLAMA} --global-batch-size 8 --qk-layernorm"),
        Case("GPT, SGD, pp 2 x dp 2, ZeRO-2, zbv *", f"{GPT} --global-batch-size 16 {pp} 2 --optimizer sgd "
             "--pipeline-schedule zbv --use-distributed-optimizer", 4),
        Case("Llama, pp 2, interleaved, full, 32 kept *", f"{LLAMA} --global-batch-size 8 {pp} 2 --pipeline-schedule "
             "interleaved --num-layers-per-virtual-pipeline-stage 2 --recompute-granularity full" + LTD, 2),
        Case("GPT, 512 tokens, bf16, tp 2 x dp 2, ZeRO-3 *", f"{LONG} --global-batch-size 4 {tp} 2 {zero3} --bf16", 4),
    )


CASES = _cases()

BIG = ("--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 256 --vocab-size 2048 --lr 1e-3 "
       "--train-iters 100 --mock-data --global-batch-size 8")


def _timed_cases() -> tuple[Case, ...]:
    """Layouts of one step of eight samples, of which times were seen while the arithmetic was written."""
    tp, pp = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
    long = BIG.replace("--train-iters", "--random-ltd --random-ltd-start-length 64 --random-ltd-steps 1000 "
                                        "--train-iters")
    llama = BIG + LLAMA.removeprefix(GPT)
    return (
        Case("1 process", f"{BIG} --micro-batch-size 4"),
        Case("pp 2, 1f1b, 4 microbatches", f"{BIG} --micro-batch-size 2 {pp}", 2),
        Case("1 process, full recomputation", f"{BIG} --micro-batch-size 4 --recompute-granularity full"),
        Case("1 process, 64 of 256 kept", f"{long} --micro-batch-size 4"),
        Case("dp 2", f"{BIG} --micro-batch-size 4", 2),
        Case("dp 2, ZeRO-3, 4 microbatches",
             f"{BIG} --micro-batch-size 1 --data-parallel-sharding-strategy optim_grads_params", 2),
        Case("tp 2", f"{BIG} --micro-batch-size 4 {tp}", 2),
        Case("tp 2, sequence parallel, full recomputation",
             f"{BIG} --micro-batch-size 4 {tp} --sequence-parallel --recompute-granularity full", 2),
        Case("pp 2, 1f1b, 2 microbatches", f"{BIG} --micro-batch-size 4 {pp}", 2),
        Case("pp 2, interleaved, 8 microbatches", f"{BIG} --micro-batch-size 1 {pp} --pipeline-schedule interleaved "
             "--num-layers-per-virtual-pipeline-stage 2", 2),
        Case("dp 2, 64 of 256 kept", f"{long} --micro-batch-size 4", 2),
        Case("pp 2, 64 of 256 kept, full recomputation",
             f"{long} --micro-batch-size 2 {pp} --recompute-granularity full", 2),
        Case("tp 2 x pp 2, 1f1b, 4 microbatches", f"{BIG} --micro-batch-size 2 {tp} {pp}", 4),
        Case("dp 4, ZeRO-2, 2 microbatches", f"{BIG} --micro-batch-size 1 --use-distributed-optimizer", 4),
        Case("pp 2, zbv, 4 microbatches", f"{BIG} --micro-batch-size 2 {pp} --pipeline-schedule zbv", 2),
        Case("pp 4, 1f1b, 8 microbatches", f"{BIG} --micro-batch-size 1 --pipeline-model-parallel-size 4", 4),
        Case("tp 2 x dp 2, selective recomputation", f"{BIG} --micro-batch-size 4 {tp} --recompute-granularity "
             "selective", 4),
        Case("Llama, 1 process", f"{llama} --micro-batch-size 2"),
        Case("Llama, dp 2", f"{llama} --micro-batch-size 4", 2),
        Case("Llama, tp 2, sequence parallel", f"{llama} --micro-batch-size 4 {tp} --sequence-parallel", 2),
    )


def _blind_cases() -> tuple[Case, ...]:
    """Layouts and models of which no time was seen before their prediction was printed."""
    tp, pp, dp3 = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--data-parallel-sharding-strategy"
    of_llama = LLAMA.removeprefix(GPT)
    deep = BIG.replace("--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 256",
                       "--num-layers 12 --hidden-size 192 --num-attention-heads 6 --seq-length 128")
    wide = BIG.replace("--num-layers 8 --hidden-size 256", "--num-layers 4 --hidden-size 512")
    long = BIG.replace("--seq-length 256", "--seq-length 512")
    interleaved = "--pipeline-schedule interleaved --num-layers-per-virtual-pipeline-stage"
    drop = "--random-ltd --random-ltd-start-length 128 --random-ltd-steps 1000"
    return (
        Case("12 layers of 192, 128 tokens", f"{deep} --micro-batch-size 4"),
        Case("12 layers of 192, 128 tokens, pp 2, interleaved",
             f"{deep} --micro-batch-size 1 {pp} 2 {interleaved} 3", 2),
        Case("12 layers of 192, 128 tokens, Llama, tp 2", f"{deep}{of_llama} --micro-batch-size 4 {tp} 2", 2),
        Case("4 layers of 512, dp 4, ZeRO-3", f"{wide} --micro-batch-size 1 {dp3} optim_grads_params", 4),
        Case("4 layers of 512, dp 2, ZeRO-2, full recomputation",
             f"{wide} --micro-batch-size 2 --use-distributed-optimizer --recompute-granularity full", 2),
        Case("4 layers of 512, tp 4", f"{wide} --micro-batch-size 4 {tp} 4", 4),
        Case("512 tokens, tp 4, sequence parallel", f"{long} --micro-batch-size 2 {tp} 4 --sequence-parallel", 4),
        Case("512 tokens, 128 kept, dp 2", f"{long} --micro-batch-size 2 {drop}", 2),
        Case("512 tokens, Llama, pp 4", f"{long}{of_llama} --micro-batch-size 1 {pp} 4", 4),
        Case("512 tokens, Llama, pp 2 x dp 2, ZeRO-2", f"{long}{of_llama} --micro-batch-size 1 {pp} 2 "
             "--use-distributed-optimizer", 4),
        Case("pp 4, interleaved, 8 microbatches", f"{BIG} --micro-batch-size 1 {pp} 4 {interleaved} 1", 4),
    )


TIMED_CASES = _timed_cases()
FITTED = ("1 process", "dp 2, ZeRO-3, 4 microbatches")
"""To these the machine's constants are fitted: with little memory traffic and communication, and with much of both."""
BLIND_CASES = _blind_cases()
