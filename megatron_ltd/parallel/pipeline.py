"""The pipeline: torch's schedules over the stages of this process, and a forward-only pass for evaluation.

Stages exchange the residual stream, whose shape does not depend on the kept length. It depends on how much of a sample
is read and in what bags. When these change, the engine's stages, which fix their shapes, are rebuilt around the same
modules. Ids, labels and masks of a microbatch are not sent between stages: every process reads its own copy and passes
it to each of its stages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    _batch_p2p,
)

from megatron_ltd.parallel import data_parallel
from megatron_ltd.parallel.partition import ZERO_BUBBLE, stages_of_rank

_SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
TORCH_SPLITS = torch.__version__ >= "2.13"
"""torch 2.11 cannot split the backward pass of functions with a backward of their own, such as collectives."""


class _Plain(nn.Module):
    """Hides the kind of a stage's module from the engine. Of an FSDP2 module it would keep whole gradients until the
    end of the step, and gather whole stages in advance (`backward_maybe_with_nosync` and UNSHARD in torch 2.13)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _Stage(PipelineStage):
    """Holds what it exchanges for a microbatch until the backward pass of that microbatch. The engine holds it for all
    microbatches until the end of the step, which with hundreds of them is more than all activations: buffers of what is
    received, the last stage's losses with their graphs, and in schedules of several stages what is sent.

    Args:
        sends: the schedule keeps what it sends, so the stage sends by itself.
    """

    def __init__(self, *args: Any, sends: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sends = sends
        self._sending: dict[str, list[dist.Work]] = {}

    def begin_step(self) -> None:
        """No microbatch of this step has been computed."""

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._on_meta():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _create_grad_recv_info(self, *args: Any) -> Any:
        with self._on_meta():
            return super()._create_grad_recv_info(*args)

    @contextmanager
    def _on_meta(self) -> Iterator[None]:
        """Buffers that the engine makes meanwhile have a shape alone."""
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # gloo has connected all processes, and no process to itself, where torch 2.11 would send for neighbours on one.
        return [] if self.device.type == "cpu" else super()._get_init_p2p_neighbors_ops()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._move(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._move(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int) -> None:
        self._move(self.grad_recv_info[mb_index], self.device)  # set to zero where there is no gradient
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._unsent("forward", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._unsent("backward", super().get_bwd_send_ops(bwd_chunk_id))

    def _unsent(self, direction: str, operations: list[dist.P2POp]) -> list[dist.P2POp]:
        """What is left for the schedule to send. Waiting for the message before does not block: every send stands in
        the schedule where its receiver is ready for it."""
        if not self._sends:
            return operations
        self.finish_sending(direction)
        self._sending[direction] = _batch_p2p(operations)
        return []

    def finish_sending(self, *directions: str) -> None:
        for direction in directions or tuple(self._sending):
            for work in self._sending.pop(direction, ()):
                work.wait()

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True,
                           last_backward: bool = False) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)
        self._move((*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]), torch.device("meta"))
        if loss is not None:
            loss.detach_()  # its graph holds the stage's input

    @staticmethod
    def _move(received: Sequence[Any], device: torch.device) -> None:
        """Replaces buffers by others without their content; inputs of the first stage have none."""
        for info in received:
            buffer = getattr(info, "buffer", None)
            if buffer is not None and buffer.device.type != device.type:
                info.buffer = torch.empty_like(buffer, device=device, requires_grad=buffer.requires_grad)


class _FullBackwardStage(_Stage):
    """Runs the whole backward pass when a zero-bubble schedule requests the input gradients, and nothing when it
    requests the weight gradients. Gradients are reduced, and parameters freed, during the pass.

    Splitting the pass loses gradients without an error when parameters are freed after the forward pass, keeps whole
    gradients until the end of the step, recomputes once per weight under activation recomputation, and cannot run a
    compiled layer's fused backward. The placement of the stages is kept, and with it most of the schedule's gain.
    """

    def __init__(self, module: nn.Module, *args: Any, sharding: str, **kwargs: Any):
        super().__init__(_Plain(module), *args, **kwargs)
        self._module, self._sharding, self._passes = module, sharding, 0

    def begin_step(self) -> None:
        self._passes = 0  # the step before may have had another number of microbatches

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True,
                           last_backward: bool = False) -> None:
        # Counted here, since zero-bubble schedules call the pass for the weights the last one.
        self._passes += 1
        data_parallel.before_backward(self._module, self._sharding, last=self._passes == self.chunks)
        super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=True, last_backward=last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        return


class Pipeline:
    """The stages of this process and the schedule that runs them.

    Args:
        modules: this process's stages in order of depth; called as `module(x, **batch)`.
        schedule: a value of --pipeline-schedule.
        group: the pipeline's process group.
        hidden_shape: of the tensor that stages exchange, [s/t or s, b, h], for whole samples.
        token_shape: of the first stage's input, [b, s], for whole samples.
        token_dtype: of the first stage's input.
        dtype: of the tensor that stages exchange.
        loss_terms: numbers that the last stage returns for a microbatch in training.
        full_backward: do not split the backward pass, whatever the schedule.
        sharding: a value of --data-parallel-sharding-strategy; unless it is no_shard, the pass must not be split.
    """

    def __init__(self, modules: Sequence[nn.Module], *, schedule: str, group: dist.ProcessGroup, device: torch.device,
                 hidden_shape: tuple[int, ...], token_shape: tuple[int, ...], dtype: torch.dtype, full_backward: bool,
                 loss_terms: int = 1, token_dtype: torch.dtype = torch.int64, sharding: str = "no_shard"):
        self.modules, self.schedule, self.group, self.device = list(modules), schedule, group, device
        self.hidden_shape, self.token_shape, self.dtype = hidden_shape, token_shape, dtype
        self.loss_terms, self.token_dtype = loss_terms, token_dtype
        self.size, self.rank = group.size(), dist.get_rank(group)
        self.stages = len(self.modules) * self.size
        self.local = stages_of_rank(schedule, self.rank, self.size, len(self.modules))
        split = schedule in ZERO_BUBBLE and not full_backward and TORCH_SPLITS
        kind: Any = _Stage if split else partial(_FullBackwardStage, sharding=sharding)
        self._stage_kind = partial(kind, sends=schedule != "1f1b")
        self._engine_stages: list[_Stage] = []
        self._shape = torch.Size()
        self._schedule: Any = None
        self._microbatches = 0
        self._loss_weights = torch.ones(loss_terms, device=device)

    @property
    def has_first(self) -> bool:
        return 0 in self.local

    @property
    def has_last(self) -> bool:
        return self.stages - 1 in self.local

    def train_step(self, tokens: torch.Tensor, batch: Mapping[str, Any], *, microbatches: int,
                   loss_weights: torch.Tensor) -> torch.Tensor:
        """Forward and backward over all microbatches; gradients are left on the parameters.

        Args:
            tokens: [m b, s] or in bags [m b, s, k], the concatenated microbatches.
            batch: further arguments of the stages; tensors are split along dim 0 like the tokens, all else is passed
                unchanged.
            loss_weights: the backward pass minimises the sum of the loss terms weighted by these.

        Returns:
            the sums of the loss terms over the microbatches; zeros on processes without the last stage.

        Shapes:
            loss_weights [loss_terms] fp32 -> the same
        """
        self._loss_weights = loss_weights
        shape = tokens.shape[1:]
        if shape != self._shape:
            self._engine_stages = [self._engine_stage(stage, module, shape)
                                   for stage, module in zip(self.local, self.modules, strict=True)]
        if microbatches != self._microbatches or shape != self._shape:
            # A schedule sizes the engine's stages for its number of microbatches, so an older one would not fit.
            self._schedule, self._microbatches = self._build_schedule(microbatches), microbatches
            self._shape = shape
        for engine_stage in self._engine_stages:
            engine_stage.begin_step()
        sums = self._schedule.step(*((tokens,) if self.has_first else ()), target=tokens if self.has_last else None,
                                   **batch)
        for engine_stage in self._engine_stages:
            engine_stage.finish_sending()
        if not self.has_last:
            return torch.zeros_like(loss_weights)
        return sums.detach().view(microbatches, self.loss_terms).sum(dim=0)  # of consecutive microbatches

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, batch: Mapping[str, Any], *, sliced: bool = True) -> torch.Tensor | None:
        """Run one microbatch through all stages without gradients.

        Args:
            sliced: stages exchange what they exchange in training; False: all tokens, also with sequence parallelism.

        Returns:
            the output of the last stage, on the process that holds it; None elsewhere.
        """
        x: torch.Tensor | None = None
        for stage in range(self.stages):
            if stage not in self.local:
                continue
            if stage == 0:
                x = tokens
            elif stage - 1 not in self.local:
                length = self._slice_length(tokens.shape[1]) if sliced else tokens.shape[1]
                shape = (length, tokens.shape[0], self.hidden_shape[2])
                x = torch.empty(shape, dtype=self.dtype, device=self.device)
                dist.recv(x, group=self.group, group_src=self._owner(stage - 1))
            x = self.modules[self.local.index(stage)](x, **batch)
            if stage + 1 < self.stages and stage + 1 not in self.local:
                dist.send(x.contiguous(), group=self.group, group_dst=self._owner(stage + 1))
        return x if self.has_last else None

    def last_stage_rank(self) -> int:
        """Rank in the group of the process that holds the last stage."""
        return self._owner(self.stages - 1)

    def _owner(self, stage: int) -> int:
        return next(rank for rank in range(self.size)
                    if stage in stages_of_rank(self.schedule, rank, self.size, len(self.modules)))

    def _slice_length(self, length: int) -> int:
        """Tokens per sample in the tensor that stages exchange: all, or those of a slice under sequence parallelism."""
        return length // (self.token_shape[1] // self.hidden_shape[0])

    def _engine_stage(self, stage: int, module: nn.Module, shape: torch.Size) -> _Stage:
        # Shapes given in advance spare the engine two extra passes to determine them.
        hidden_shape, token_shape = self.hidden_shape, (self.token_shape[0], *shape)
        if shape[0] != self.token_shape[1]:
            hidden_shape = (self._slice_length(shape[0]), *hidden_shape[1:])
        hidden = torch.empty(hidden_shape, dtype=self.dtype, device="meta", requires_grad=True)
        tokens = torch.empty(token_shape, dtype=self.token_dtype, device="meta")
        loss = torch.empty(self.loss_terms, dtype=torch.float32, device="meta", requires_grad=True)
        return self._stage_kind(module, stage, self.stages, self.device, input_args=tokens if stage == 0 else hidden,
                    output_args=loss if stage == self.stages - 1 else hidden, group=self.group)

    def _build_schedule(self, microbatches: int) -> Any:
        single = self.schedule == "1f1b"
        return _SCHEDULES[self.schedule](
            self._engine_stages[0] if single else self._engine_stages, n_microbatches=microbatches,
            loss_fn=lambda sums, target: (sums * self._loss_weights).sum(), scale_grads=False)
