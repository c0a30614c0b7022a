"""A step launches work and reads none of it, and everything it touches is on the device.

A rehearsal without an accelerator: on the device `meta` tensors have no values, so reading one raises. Of an
operation's tensors either all are there or none; the exceptions are copies to the device that the host does not wait
for.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import count
from typing import Any, Self
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.model.attention import context
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.plan.derived import policies
from megatron_ltd.token_drop.importance_table import ImportanceTable
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.step import train_step
from megatron_ltd.train.validate import held_out_loss
from tests.gloo import run_ranks
from tests.policy_settings import ENABLED

LAYERS, TOKENS, SAMPLES, VOCABULARY = 6, 32, 2, 60
META = torch.device("meta")
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
"""Operations for which the host waits."""

GPT2_LIKE: dict[str, Any] = {}
LLAMA_LIKE = {"swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope",
              "group_query_attention": True, "num_query_groups": 2, "qk_layernorm": True,
              "untie_embeddings_and_output_weights": True}
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "recomputed": {**ENABLED["random"], "recompute_granularity": "full", "recompute_method": "uniform"},
    "attention recomputed": {"recompute_granularity": "selective"},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "documents": {**ENABLED["random"], "documents": True},
    "alibi": {**ENABLED["random"], "position_embedding_type": "alibi"},
    "rotary, grouped": {**ENABLED["random"], **LLAMA_LIKE},
    "muon": {"optimizer": "muon"},
    **ENABLED,
}
BY_KERNEL = "documents by torch's kernel for them"


class Literals(TorchFunctionMode):
    """Notes tensors that are made of numbers of the host on another device: copies that the host waits for, which are
    no operations."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.device.type != "cpu":
            self.found.add(func.__name__)
        return result


class OneDevice(TorchDispatchMode):
    """Notes operations that mix devices, other than copies from the host for which it does not wait, and counts
    operations that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: set[str] = set()
        self.reads: Counter[str] = Counter()
        self._literals = Literals(self.mixed)

    def __enter__(self) -> Self:
        self._literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            t.dtype is torch.bool for t in tree_leaves(args[1:2]) if isinstance(t, torch.Tensor))
        self.reads[name] += name in READS or by_mask
        tensors = [t.to_local() if isinstance(t, DTensor) else t
                   for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        in_background = name in ("_to_copy", "copy_") and ((kwargs or {}).get("non_blocking") or args[2:] == (True,))
        if len({tensor.device.type for tensor in tensors}) > 1 and not in_background:
            self.mixed.add(name)
        return result


@contextmanager
def a_device_without_values() -> Iterator[None]:
    """Collectives of one process change nothing, torch's fused optimizers accept tensors on `meta`, and torch's
    pipeline stages exchange nothing when they are built, and do not read whether their shapes are known."""
    reduce, devices = dist.all_reduce, _foreach_utils._get_fused_kernels_supported_devices

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return None if tensor.is_meta else reduce(tensor, *args, **kwargs)

    supported = [*devices(), "meta"]
    with mock.patch.object(dist, "all_reduce", all_reduce), \
            mock.patch.object(PipelineStage, "_get_init_p2p_neighbors_ops", lambda *_: [], create=True), \
            mock.patch.object(PipelineStage, "_warmup_forward_vote", lambda *_, **__: None, create=True), \
            mock.patch.object(PipelineStage, "_warmup_backward_result", lambda *_, **__: torch.ones(()), create=True), \
            mock.patch("torch.optim.adam._get_fused_kernels_supported_devices", lambda: supported, create=True), \
            mock.patch("torch.optim.sgd._get_fused_kernels_supported_devices", lambda: supported, create=True), \
            mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: supported, create=True), \
            mock.patch.object(_foreach_utils, "_get_fused_kernels_supported_devices", lambda: supported):
        yield


def config_of(case: Mapping[str, Any]) -> RunConfig:
    def section(kind: Any, **more: Any) -> Any:
        return kind(**{name: value for name, value in case.items() if name in kind.__dataclass_fields__}, **more)

    return RunConfig(
        model=section(ModelConfig, num_layers=LAYERS, hidden_size=16, num_attention_heads=4, seq_length=TOKENS,
                      vocab_size=VOCABULARY, make_vocab_size_divisible_by=8),
        token_drop=section(TokenDropConfig), parallel=section(ParallelConfig),
        training=TrainingConfig(micro_batch_size=SAMPLES),
        optimizer=OptimizerConfig(lr=1e-2, optimizer=case.get("optimizer", "adam")))


def batch(config: RunConfig, text_tokens: int, documents: bool) -> list[dict[str, torch.Tensor]]:
    text = torch.randint(VOCABULARY, (SAMPLES, text_tokens + 1))
    found = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(SAMPLES, text_tokens),
             "sample_ids": torch.arange(SAMPLES)}
    if documents:
        places = torch.arange(text_tokens).repeat(SAMPLES, 1)
        found |= {"document_ids": places // 5, "position_ids": places % 5}
    return [found]


def steps_on(device: torch.device, case: Mapping[str, Any], steps: int) -> OneDevice:
    """What the last of some steps does on a device. In the first one torch builds its pipeline stages."""
    config = config_of(case)
    mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
    model = build_model(config, mesh, device)
    if config.token_drop.policy == "importance":
        model.choose_by(ImportanceTable.initial(VOCABULARY, initial_importance=10.0, beta=0.9, always_keep=(1,),
                                                always_drop=(0,), device=device))
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    scale = torch.ones((), device=device)
    watched = OneDevice()
    for number in range(steps):
        plan = policies(config).plan(number)
        read = batch(config, plan.text_tokens, bool(case.get("documents")))
        with watched if number == steps - 1 else nullcontext():
            train_step(model, optimizer, read, config, plan, learning_rate=1e-3, loss_scale=scale, stop_level=0,
                       device=device)
    return watched


def rehearsed(rank: int, ranks: int) -> dict[str, set[str]]:
    with a_device_without_values():
        found = {name: steps_on(META, case, 1).mixed for name, case in CASES.items()}
        with mock.patch.object(context, "has_kernel", lambda *_: True):
            return found | {BY_KERNEL: steps_on(META, CASES["documents"], 1).mixed}


def test_a_rehearsed_step_reads_nothing_and_mixes_no_devices() -> None:
    (found,) = run_ranks(rehearsed, 1, timeout=120)
    assert found == {name: set() for name in (*CASES, BY_KERNEL)}


def counted(rank: int, ranks: int) -> list[dict[str, int]]:
    return [dict(+steps_on(torch.device("cpu"), CASES[name], 2).reads) for name in ("random", "importance", "muon")]


def test_a_step_on_a_cpu_has_no_operation_that_would_wait() -> None:
    (found,) = run_ranks(counted, 1, timeout=120)
    assert found == [{}, {}, {}]


def evaluated(rank: int, ranks: int) -> dict[str, tuple[int, set[str]]]:
    """Batches whose evaluation was launched before the host first asked for a value, and operations that mix devices,
    of each family; the last with torch's kernel for documents."""
    found = {}
    for family in ("gpt", "bert"):
        config = config_of({"family": family})
        mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
        model, launched, watched = build_model(config, mesh, META), count(), OneDevice()
        slots = TOKENS if family == "gpt" else 5
        more = {} if family == "gpt" else {
            "predicted_positions": torch.arange(slots).repeat(SAMPLES, 1), "sentence_order": torch.ones(SAMPLES).long(),
            "padding_mask": torch.ones(SAMPLES, TOKENS).bool(), "token_types": torch.zeros(SAMPLES, TOKENS).long()}
        whole = {"tokens": torch.ones(SAMPLES, TOKENS).long(), "labels": torch.ones(SAMPLES, slots).long(),
                 "loss_mask": torch.arange(SAMPLES * slots).view(SAMPLES, slots) % 3.0,
                 "sample_ids": torch.arange(SAMPLES), **more}
        by_kernel = mock.patch.object(context, "has_kernel", mock.Mock(return_value=family == "bert"))
        with a_device_without_values(), by_kernel, watched, suppress(NotImplementedError, RuntimeError):
            held_out_loss(model, (whole for _ in range(3) if next(launched) < 3), META)
        found[family] = next(launched), watched.mixed
    return found


def test_an_evaluation_waits_once_at_its_end() -> None:
    (found,) = run_ranks(evaluated, 1, timeout=120)
    assert found == {"gpt": (3, set()), "bert": (3, set())}


def test_the_watch_sees_reads_and_mixtures() -> None:
    with OneDevice() as watched:
        float(torch.ones(()))
        torch.ones(2)[torch.tensor([True, False])]
        torch.ones(2, device="meta") * torch.ones(())
        torch.ones(2).to("meta", non_blocking=True)
    assert watched.mixed == {"mul"} and +watched.reads == {"_local_scalar_dense": 1, "index": 1}
    with OneDevice() as watched:
        torch.ones(2).to("meta")
        torch.tensor([1.0], device="meta").new_tensor(2.0)
    assert watched.mixed == {"_to_copy", "tensor", "new_tensor"}
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones((), device="meta"))
