"""Seconds of each pipeline stage, measured, against the work that the split was chosen by.

    python -m benchmarks.pipeline_balance --stages 4 --rounds 7

The model drops half of the tokens in its second half, as Token Dropping does, so that equal stages are far from equal
work. The stages of the uniform and of the balanced split run one after the other in one process with one thread,
forward and backward, round by round, and the CPU time of each is taken: what one process of a pipeline would be busy
for with one microbatch. Medians are compared.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import machine
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import ParallelConfig, TrainingConfig
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.partition import stage_spans
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layouts.pipeline_costs import pipeline_layers, predict
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch

SPLITS = ("uniform", "auto")


def settings(args: argparse.Namespace, split: str) -> RunConfig:
    """A run with this split; half of the tokens are dropped from the layer before the middle to the last but one."""
    layers, sequence = args.layers, args.sequence
    return RunConfig(
        model=ModelConfig(num_layers=layers, hidden_size=args.hidden, num_attention_heads=args.hidden // 64,
                          seq_length=sequence, vocab_size=args.vocabulary),
        token_drop=TokenDropConfig(random_ltd=True, random_ltd_start_length=sequence // 2,
                                   random_ltd_layers=f"{layers // 2 - 1}-{layers - 2}"),
        parallel=ParallelConfig(pipeline_model_parallel_size=args.stages, pipeline_split=split),
        training=TrainingConfig(micro_batch_size=args.samples, global_batch_size=64 * args.samples, train_iters=1))


def stage_steps(config: RunConfig, tp: TensorParallel) -> list[Callable[[], None]]:
    """For each stage a forward and backward pass of one microbatch through it."""
    model, samples = config.model, config.training.micro_batch_size
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(model.vocab_size, (samples, model.seq_length + 1), generator=generator)
    batch = {"labels": text[:, 1:].contiguous(), "loss_mask": torch.ones(samples, model.seq_length),
             "sample_ids": torch.arange(samples), "plan": policies(config).plan(0)}
    steps = []
    for first, stop in stage_spans(list(pipeline_layers(config, 1))):
        stage = GPT(model, tp, StageSpan(first, stop, model.num_layers), policies=policies(config))
        materialize(stage, model, prefix="", seed=0, device=torch.device("cpu"), draw=True)
        stage.train()
        x = text[:, :-1].contiguous() if first == 0 else torch.randn(
            model.seq_length, samples, model.hidden_size, generator=generator, requires_grad=True)

        def step(stage: GPT = stage, x: torch.Tensor = x) -> None:
            stage.zero_grad(set_to_none=False)
            stage(x, **batch).sum().backward()

        steps.append(step)
    return steps


def measure(steps: dict[str, list[Callable[[], None]]], rounds: int) -> dict[str, list[float]]:
    """Median seconds of each stage of each split; a first round does not count."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in stages] for name, stages in steps.items()}
    for number in range(rounds + 1):
        for name, stages in steps.items():
            for stage, step in enumerate(stages):
                started = time.process_time()
                step()
                if number > 0:
                    seconds[name][stage].append(time.process_time() - started)
    return {name: [statistics.median(times) for times in stages] for name, stages in seconds.items()}


def table(configs: dict[str, RunConfig], seconds: dict[str, list[float]]) -> str:
    """Shares of the mean, predicted and measured, and the throughput that follows from the busiest stage."""
    lines = ["| split | layers | predicted shares | measured shares | largest difference | predicted speed | "
             "measured speed |", "|---|---|---|---|--:|--:|--:|"]
    first = next(iter(configs))
    bound = {name: max(predict(config, 1, pipeline_layers(config, 1)).shares) for name, config in configs.items()}
    for name, config in configs.items():
        split = pipeline_layers(config, 1)
        mean = statistics.fmean(seconds[name])
        predicted, found = predict(config, 1, split).shares, [stage / mean for stage in seconds[name]]
        difference = max(abs(share / wanted - 1.0) for share, wanted in zip(found, predicted, strict=True))
        lines.append(f"| {name} | {' '.join(map(str, split))} | {_numbers(predicted)} | {_numbers(found)} | "
                     f"{difference:.1%} | {bound[first] / bound[name]:.2f} | "
                     f"{max(seconds[first]) / max(seconds[name]):.2f} |")
    return "\n".join(lines)


def _numbers(shares: list[float] | tuple[float, ...]) -> str:
    return " ".join(f"{share:.2f}" for share in shares)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 8, "hidden": 256, "sequence": 512, "vocabulary": 4096, "samples": 4, "stages": 4,
                          "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    configs = {split: settings(args, split) for split in SPLITS}
    alone = replace(configs["uniform"], parallel=ParallelConfig(distributed_backend="gloo"))
    runtime = launch.start(alone, Launch())
    try:
        tp = TensorParallel(runtime.mesh.tp, False)
        seconds = measure({name: stage_steps(config, tp) for name, config in configs.items()}, args.rounds)
    finally:
        launch.stop()
    print(f"{args.layers} layers x {args.hidden}, sequence {args.sequence}, vocabulary {args.vocabulary}, "
          f"{args.samples} samples, {args.sequence // 2} tokens kept in layers {args.layers // 2 - 1} to "
          f"{args.layers - 2}; {args.rounds} rounds, CPU time\n{machine.describe('cpu')}\n")
    print(table(configs, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
