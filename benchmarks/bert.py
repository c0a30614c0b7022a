"""Time BERT's training steps side by side: dense, random-LTD, Token Dropping, and transformers' MegatronBert.

    python -m benchmarks.bert --layers 8 --hidden 256 --sequence 512 --samples 8 --rounds 7

A step is forward, backward, clipping and fused AdamW, on one thread in fp32, timed by the time the process ran, so
that others on the machine count less. The rows take turns, and ratios are taken within a round. `transformers` predicts
at every position, as its model does; ours only where a token was masked.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import machine
from benchmarks.rounds import processor_seconds
from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.plan.derived import policies, predictions_per_sample
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.token_drop.importance_table import ImportanceTable
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.step import train_step

Batch = dict[str, torch.Tensor]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("hidden", 256), ("sequence", 512), ("vocabulary", 30522), ("samples", 8),
                          ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(argv)


def run_config(args: argparse.Namespace, policy: str) -> RunConfig:
    drop: dict[str, Any] = {"token_drop_policy": policy, "random_ltd_start_length": args.sequence // 2}
    if policy == "importance without cross layer":
        drop |= {"token_drop_policy": "importance", "token_drop_no_cross_layer": True}
    return RunConfig(
        model=ModelConfig(family="bert", num_layers=args.layers, hidden_size=args.hidden,
                          num_attention_heads=args.hidden // 64, seq_length=args.sequence, vocab_size=args.vocabulary),
        token_drop=TokenDropConfig(**drop), parallel=ParallelConfig(distributed_backend="gloo"),
        training=TrainingConfig(micro_batch_size=args.samples, global_batch_size=args.samples, train_iters=1),
        optimizer=OptimizerConfig(lr=1e-4), data=DataConfig())


def random_batch(args: argparse.Namespace, predictions: int) -> Batch:
    """Samples of full length, with as many predictions as there can be."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.samples, args.sequence)
    positions = torch.stack([torch.randperm(args.sequence, generator=generator)[:predictions].sort().values
                             for _ in range(args.samples)])
    return {"tokens": torch.randint(5, args.vocabulary, shape, generator=generator),
            "padding_mask": torch.ones(shape, dtype=torch.bool),
            "token_types": (torch.arange(args.sequence) >= args.sequence // 2).long().expand(shape).contiguous(),
            "predicted_positions": positions,
            "labels": torch.randint(5, args.vocabulary, positions.shape, generator=generator),
            "loss_mask": torch.ones(positions.shape), "sample_ids": torch.arange(args.samples),
            "sentence_order": torch.randint(0, 2, (args.samples,), generator=generator)}


def our_step(config: RunConfig, runtime: Runtime, batch: Batch) -> Callable[[], Any]:
    model = build_model(config, runtime.mesh, runtime.device)
    if config.token_drop.policy == "importance":
        assert config.model.vocab_size is not None
        model.choose_by(ImportanceTable.initial(
            config.model.vocab_size, initial_importance=10.0, beta=0.995, always_keep=(1, 2, 3, 4), always_drop=(0,),
            device=runtime.device))
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    plan = policies(config).plan(0)
    return lambda: train_step(model, optimizer, [batch], config, plan, learning_rate=1e-4, loss_scale=1.0,
                              stop_level=0, device=runtime.device)


def transformers_step(args: argparse.Namespace, batch: Batch) -> Callable[[], Any]:
    from transformers import MegatronBertConfig, MegatronBertForPreTraining

    model = MegatronBertForPreTraining(MegatronBertConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, intermediate_size=4 * args.hidden, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=args.sequence)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = torch.full_like(batch["tokens"], -100).scatter(1, batch["predicted_positions"], batch["labels"])

    def step() -> None:
        optimizer.zero_grad()
        model(batch["tokens"], attention_mask=batch["padding_mask"].long(), token_type_ids=batch["token_types"],
              labels=labels, next_sentence_label=batch["sentence_order"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    kinds = ("none", "random", "importance", "importance without cross layer")
    configs = {kind: run_config(args, kind) for kind in kinds}
    runtime = launch.start(configs["none"], Launch())
    predictions = predictions_per_sample(configs["none"])
    assert predictions is not None
    batch = random_batch(args, predictions)
    rows = {kind: our_step(config, runtime, batch) for kind, config in configs.items()}
    try:
        rows["transformers"] = transformers_step(args, batch)
    except ImportError:
        print("transformers is not installed: no row of it", file=sys.stderr)
    seconds = processor_seconds(rows, args.rounds)
    launch.stop()
    print(f"\nBERT {args.layers} x {args.hidden}, sequence {args.sequence}, vocabulary {args.vocabulary:,}, "
          f"{args.samples} samples, half of the tokens kept; fp32, {args.rounds} rounds, cpu clock\n"
          f"{machine.describe('cpu')}\n\n{table(configs, seconds)}")
    return 0


def table(configs: dict[str, RunConfig], seconds: dict[str, list[float]]) -> str:
    columns = ("step", "median ms", "/ dense", "/ transformers", "FLOPs saved", "time saved", "realised")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    dense = step_flops(configs["none"], policies(configs["none"]).plan(0))
    for name, times in seconds.items():
        ratios = {base: statistics.median(a / b for a, b in zip(times, seconds[base], strict=True))
                  for base in ("none", "transformers") if base in seconds}
        cells = [f"{1000 * statistics.median(times):.0f}", f"{ratios['none']:.3f}",
                 f"{ratios['transformers']:.3f}" if "transformers" in ratios else ""]
        if name in configs and name != "none":
            flops = step_flops(configs[name], policies(configs[name]).plan(0))
            theory, saved = 1 - flops / dense, 1 - ratios["none"]
            cells += [f"{theory:.1%}", f"{saved:.1%}", f"{saved / theory:.0%}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {'dense' if name == 'none' else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
