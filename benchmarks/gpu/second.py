"""The steps of the second call of `benchmarks/gpu_quarter_hour.sh`, see `first.py`; those that take single
operations apart are in `micro.py`."""

import argparse
import functools
import statistics
from dataclasses import replace

import torch
from torch._dynamo.utils import counters

from benchmarks import bert
from benchmarks.gpu import plain_gpt
from benchmarks.gpu.bench import TINY, Bench, ratio
from benchmarks.nanogpt import NanoGPT
from benchmarks.ours import OurModel
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.plan.derived import policies, predictions_per_sample
from megatron_ltd.plan.flops import step_flops

LLAMA = {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32,
         "num_query_groups": 8, "vocab_size": 32000}
TINY_LLAMA = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 256}
VIT = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "img_h": 224, "img_w": 224, "patch_dim": 16,
       "num_channels": 3, "num_classes": 1000, "seq_length": 197}
TINY_VIT = VIT | {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 2, "img_h": 32, "img_w": 32,
                  "seq_length": 5}


def compiled_1b(bench: Bench) -> None:
    """1.3B, compiled."""
    bench.train_compiled("1.3b", ("dense", "kept 1/4"))


def traces(bench: Bench) -> None:
    """Where the time of a dense and of a dropped step goes: kernels, a trace to look at, and the parts of a step."""
    ours = OurModel(bench.config(bench.shape("350m")), bench.runtime, on_device=True)
    full = ours.config.model.seq_length
    for row, kept in (("dense", full), ("kept 1/4", full // 4)):
        ours.step(kept)
        with torch.profiler.profile() as profile:
            ours.step(kept)
            bench.wait()
        name = row.replace(" ", "_").replace("/", "_of_")
        profile.export_chrome_trace(str(bench.out / f"trace_{name}.json.gz"))
        order = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
        (bench.out / f"kernels_{name}.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=40))
        waits = sum(event.count for event in profile.key_averages() if "_local_scalar_dense" in event.key)
        bench.write(f"350m, {row}", parts_ms={part: 1e3 * seconds for part, seconds in ours.timed_parts(kept).items()},
                    host_waits=waits)
    del ours
    bench.free()


def growing_length(bench: Bench) -> None:
    """350M compiled, k growing in eight strides: graphs, the slowest step after warm-up, memory."""
    torch._dynamo.reset()
    counters.clear()
    ours = OurModel(bench.config(bench.shape("350m"), compiled=True), bench.runtime, on_device=True)
    for stride in range(1, 9):
        step = functools.partial(ours.step, ours.config.model.seq_length * stride // 8)
        of_stride = [bench.seconds(step) for _ in range(2 if bench.tiny else 25)]
        bench.write(f"350m, kept {stride}/8", first_s=of_stride[0], median_ms=1e3 * statistics.median(of_stride),
                    worst_of_median=max(of_stride[1:]) / statistics.median(of_stride))
    bench.write("350m, growing length", graphs=counters["stats"]["unique_graphs"],
                reserved_mb=torch.cuda.memory_reserved() / 2**20 if bench.cuda else None,
                allocated_mb=torch.cuda.memory_allocated() / 2**20 if bench.cuda else None)
    del ours, step
    bench.free()


def bert_large(bench: Bench) -> None:
    """BERT-large without dropout, and with that of its shipped configuration."""
    sizes = (4, 64, 64, 256, 2) if bench.tiny else (24, 1024, 512, 30522, 32)
    names = ("layers", "hidden", "sequence", "vocabulary", "samples")
    arguments = argparse.Namespace(**dict(zip(names, sizes, strict=True)))
    for probability in (0.0, 0.1):
        config = bert.run_config(arguments, "random")
        config = replace(config, training=replace(config.training, bf16=True), model=replace(
            config.model, hidden_dropout=probability, attention_dropout=probability))
        predictions = predictions_per_sample(config)
        assert predictions is not None
        bench.train(f"bert-large, dropout {probability}", config, ("dense", "kept 1/2"), rounds=5,
                    batches=[[bert.random_batch(arguments, predictions)]])


def against_plain(bench: Bench) -> None:
    """Compiled steps of ours and of a plain GPT in turn."""
    for name in ("125m", "350m"):
        torch._dynamo.reset()
        shape = bench.shape(name)
        plain = NanoGPT(plain_gpt, shape, precision="bf16", device=bench.runtime.device, compiled=True)
        ours = OurModel(bench.config(shape, compiled=True), bench.runtime, on_device=True)
        rows = {"plain": plain.step, "dense": lambda ours=ours: ours.step(ours.config.model.seq_length)}
        for step in rows.values():
            step()
        seconds: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(1 if bench.tiny else 10):
            for row, step in rows.items():
                seconds[row].append(bench.seconds(step))
        flops = step_flops(ours.config, policies(ours.config).whole)
        for row in rows:
            bench.write(f"{name}, compiled, {row}", of_plain=ratio(seconds[row], seconds["plain"]),
                        **bench.rates(ours.config, flops, seconds[row]))
        del plain, ours, rows
        bench.free()


def half_precision(bench: Bench) -> None:
    """350M in fp16."""
    bench.train("350m, fp16", bench.config(bench.shape("350m"), precision="fp16"), ("dense", "kept 1/4"), rounds=5)


def llama(bench: Bench) -> None:
    """The shape of Llama 3.2 1B: grouped queries, rotary positions, SwiGLU, RMSNorm."""
    shape = bench.shape("1.3b")
    config = bench.config(shape)
    model = replace(config.model, **(TINY_LLAMA if bench.tiny else LLAMA), group_query_attention=True, swiglu=True,
                    position_embedding_type="rope", normalization="RMSNorm", disable_bias_linear=True)
    bench.train("llama", replace(config, model=model), ("dense", "kept 1/2", "kept 1/4"), rounds=5)


def vit_base(bench: Bench) -> None:
    """ViT-B on images of 224 pixels."""
    model = ModelConfig(family="vit", **(TINY_VIT if bench.tiny else VIT))  # type: ignore[arg-type]
    config = bench.config(replace(TINY, samples=2 if bench.tiny else 64))
    config = replace(config, model=model, token_drop=replace(
        config.token_drop, random_ltd_start_length=model.seq_length))
    samples = config.training.micro_batch_size
    assert model.img_h is not None and model.img_w is not None and model.num_classes is not None
    batch = {"tokens": torch.rand(samples, 3, model.img_h, model.img_w), "sample_ids": torch.arange(samples),
             "labels": torch.randint(model.num_classes, (samples, 1)), "loss_mask": torch.ones(samples, 1)}
    bench.train("vit-b", config, ("dense", "kept 1/2"), rounds=5, batches=[[batch]])
