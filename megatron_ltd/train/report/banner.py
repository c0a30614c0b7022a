"""What a run is, told before its first step."""

from collections.abc import Iterator
from resource import RUSAGE_SELF, getrusage

import torch

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.blend import BlendedDataset
from megatron_ltd.data.build import Datasets
from megatron_ltd.data.gpt.dataset import GPTDataset
from megatron_ltd.data.held_out import named_sets
from megatron_ltd.data.sample import Dataset
from megatron_ltd.log import size_text
from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.derived import policies, total_samples, total_steps
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.memory import MemoryModel, parameters_text
from megatron_ltd.train.report.short_line import count_text


def banner(config: RunConfig, datasets: Datasets, dp: int, device: str = "cpu",
           ramp: BatchRamp | None = None) -> list[str]:
    """Model, data, dropping and memory, a line each.

    Args:
        dp: data-parallel size.
        device: type of the processes' devices.
        ramp: see `total_steps`.
    """
    model = config.model
    state, rest = _memory(config, dp, device)
    return [f"model: {parameters_text(config)} parameters, {model.num_layers} layers x {model.hidden_size}, "
            f"{model.seq_length} tokens a sample",
            f"data: {'; '.join(_sets(config, datasets, dp, ramp))}",
            f"dropping: {dropping(config, dp, ramp)}",
            f"memory: about {size_text(state)} a process for weights, gradients and optimizer, "
            f"{size_text(rest)} for activations (predicted)"]


def _memory(config: RunConfig, dp: int, device: str) -> tuple[int, int]:
    """Predicted bytes of the process that needs most: its weights, gradients and optimizer, and what else it holds at
    the peak of the step that needs most."""
    parallel = config.parallel
    layout = Layout.of(config, dp * parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    memory = MemoryModel(config, layout, device)
    plan = max(policies(config).stretches, key=lambda plan: plan.layer_token_sum)
    rank = max(range(layout.pp), key=lambda rank: memory.peak(rank, plan).total)
    state, peak = memory.state(rank), memory.peak(rank, plan)
    return state, max(0, peak.total - state) or peak.activations


def _sets(config: RunConfig, datasets: Datasets, dp: int, ramp: BatchRamp | None) -> Iterator[str]:
    length, samples = config.model.seq_length, total_samples(config, dp, ramp)
    epochs = epochs_of(datasets.train, samples, length)
    if config.training.epoch_samples is not None:
        epochs = [samples / config.training.epoch_samples]
    times = f", {' / '.join(f'{count:.3g}' for count in epochs[:8])} epochs" if epochs else ""
    steps = total_steps(config, dp, ramp)
    yield f"train {samples:,} samples, {count_text(samples * length)} tokens{times} in {steps:,} steps"
    yield from (f"{kind}{name and '-' + name} {len(part):,} samples"
                for kind, dataset in (("validation", datasets.valid), ("test", datasets.test))
                for name, part in named_sets(dataset).items())


def epochs_of(dataset: Dataset, samples: int, length: int) -> list[float]:
    """How often so many samples read each corpus; empty if that is not known."""
    if isinstance(dataset, GPTDataset):
        return [samples * length / dataset.epoch_tokens]
    if isinstance(dataset, BlendedDataset):
        shares = zip(dataset.datasets, dataset.index.drawn, strict=True)
        return [count for part, drawn in shares for count in epochs_of(part, drawn, length)]
    return []


def dropping(config: RunConfig, dp: int, ramp: BatchRamp | None = None) -> str:
    """What the policies do, in one sentence. Args: see `total_steps`."""
    found = policies(config)
    if not found.active:
        return "none; every layer processes every token"
    first, last = found.planned(0), found.planned(max(0, total_steps(config, dp, ramp) - 1))
    names = ", ".join(policy.asked_for(config.token_drop) for policy in found.active)
    if first.kept_tokens == first.read_tokens == last.kept_tokens == last.read_tokens:
        return f"{names}; every layer that is not skipped processes every token"
    fewer = sum(layer.tokens < first.read_tokens for layer in first.layers)
    return (f"{names}; {fewer} of {len(first.layers)} layers keep {first.kept_tokens} of {first.read_tokens} tokens at "
            f"first, and the last step keeps {last.kept_tokens} of {last.read_tokens}")


def measured_memory(device: torch.device) -> str:
    """The most memory that this process has used so far."""
    if device.type == "cuda":
        return f"memory: {size_text(torch.cuda.max_memory_allocated(device))} at most on the first GPU (measured)"
    return f"memory: {size_text(getrusage(RUSAGE_SELF).ru_maxrss * 1024)} at most in the first process (measured)"
