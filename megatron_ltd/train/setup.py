"""The model on this process: its stages, sharded, optionally compiled, and the pipeline that runs them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.bert import BERT
from megatron_ltd.model.decoding import DecodingGPT
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import draw_in_turns, global_name, materialize
from megatron_ltd.model.transformer import StageSpan, Transformer
from megatron_ltd.model.vit import ViT
from megatron_ltd.parallel import data_parallel
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.gradients import missing_gradients, reduce_replicated, reduce_tied, zero_gradients
from megatron_ltd.parallel.logit_passes import LogitPasses
from megatron_ltd.parallel.mesh import Mesh
from megatron_ltd.parallel.partition import stage_spans, stages_of_rank
from megatron_ltd.parallel.pipeline import Pipeline
from megatron_ltd.plan.derived import policies, virtual_chunks, whole_backward
from megatron_ltd.plan.layouts.pipeline_costs import pipeline_layers
from megatron_ltd.token_drop.importance_table import ImportanceTable, LossRecord
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.train.compilation import prepare_compilation

Stage = GPT | BERT | ViT
LAYERS = "stack.blocks."
"""Prefix of the layers' parameter names; the layer's number follows."""


@dataclass(frozen=True)
class NamedParameter:
    """A parameter of this process.

    `name` is unique in this process; `global_name` is the same in every layout; `is_copy` marks the second copy of a
    tied embedding, which the gradient norm and checkpoints ignore.
    """

    name: str
    global_name: str
    parameter: nn.Parameter
    is_copy: bool

    @property
    def layer(self) -> int | None:
        """Global id of the layer it belongs to; None if it belongs to no layer."""
        return int(self.global_name.split(".")[1]) if self.global_name.startswith("layers.") else None


class Model:
    """The stages of this process, and the reduction of their gradients.

    The parameters are listed once, when they are built: while they are gathered for a forward pass,
    `Module.parameters()` would return the gathered ones.

    `importance` is the table of the importance policy, which a run sets before its first step; `loss_record` collects
    the losses with which a step updates it. Both are None without the policy.
    """

    def __init__(self, stages: list[Stage], pipeline: Pipeline, mesh: Mesh, tp: TensorParallel):
        self.stages, self.pipeline, self.mesh, self.tp = stages, pipeline, mesh, tp
        self.parameters = list(self._named_parameters())
        self.importance: ImportanceTable | None = None
        self.loss_record: LossRecord | None = None

    def choose_by(self, importance: ImportanceTable) -> None:
        """Choose kept tokens by this table, and record the losses that update it."""
        self.importance = importance
        self.loss_record = LossRecord(len(importance.values), importance.values.device)

    def _named_parameters(self) -> Iterator[NamedParameter]:
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                known_as = global_name(name, stage.config)
                yield NamedParameter(name, known_as, parameter, known_as != name and name == "head.weight")

    def train_mode(self, plan: StepPlan) -> None:
        """Prepare the stages for a step."""
        for stage in self.stages:
            stage.train()
            for layer, block in stage.stack.blocks.items():
                data_parallel.gather_in_backward(block, plan.layers[int(layer)].learns)

    def eval_mode(self) -> None:
        for stage in self.stages:
            stage.eval()

    def after_evaluation(self) -> None:
        data_parallel.reshard(self.stages)

    def finish_gradients(self, plan: StepPlan) -> None:
        """Take the remaining gradient sums once every stage has run its backward passes. Layers without a backward pass
        in this step get zero gradients.

        Raises:
            RuntimeError: a parameter has no gradient.
        """
        zero_gradients(p.parameter for p in self.parameters if p.layer is not None and not plan.layers[p.layer].learns)
        missing = missing_gradients((p.name, p.parameter) for p in self.parameters)
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing[:5])} and {len(missing)} parameters in all; "
                               "the step is not applied")
        if self.pipeline.stages > 1:
            reduce_tied(self._tied("embedding.word.weight"), self._tied("head.weight"), self.mesh.pp_group)
        reduce_replicated((p.parameter for p in self.parameters), self.tp)

    def _tied(self, name: str) -> nn.Parameter | None:
        if not self.stages[0].config.tied:
            return None
        return next((p.parameter for p in self.parameters if p.name == name), None)


def build_model(config: RunConfig, mesh: Mesh, device: torch.device, *, draw: bool = True,
                decodes: bool = False) -> Model:
    """Build the stages of this process.

    Args:
        draw: fill the parameters with their initial values; False: leave them to a checkpoint.
        decodes: build a GPT that can also generate text.
    """
    parallel = config.parallel
    tp = TensorParallel(mesh.tp, parallel.sequence_parallel)
    chunks = virtual_chunks(config)
    spans = stage_spans(list(pipeline_layers(config, mesh.dp_size)))
    prepare_compilation(config)
    schedule = parallel.pipeline_schedule if mesh.pp_size > 1 else "1f1b"
    stages = [_build_stage(config, tp, StageSpan(*spans[stage], config.model.num_layers), mesh, device, draw, decodes)
              for stage in stages_of_rank(schedule, mesh.pp_rank, mesh.pp_size, chunks)]
    samples, length = config.training.micro_batch_size, config.model.seq_length
    _, slice_length = tp.sequence_span(length)
    pipeline = Pipeline(
        stages, schedule=schedule, group=mesh.pp_group, device=device,
        hidden_shape=(slice_length, samples, config.model.hidden_size), **_first_input(config.model, samples),
        dtype=data_parallel.compute_dtype(config.training.precision),
        full_backward=whole_backward(config, mesh.dp_size), sharding=parallel.sharding,
        loss_terms=loss_terms(config))
    return Model(stages, pipeline, mesh, tp)


def _first_input(model: ModelConfig, samples: int) -> dict[str, Any]:
    """Shape and dtype of the first stage's input for a microbatch."""
    if model.family == "vit":
        assert model.num_channels is not None and model.img_h is not None and model.img_w is not None
        return {"token_shape": (samples, model.num_channels, model.img_h, model.img_w), "token_dtype": torch.float32}
    return {"token_shape": (samples, model.seq_length)}


def loss_terms(config: RunConfig) -> int:
    """Terms of the loss: the tokens' cross-entropy and, with BERT's binary head, that of the sentence order, or GPT's
    z-loss."""
    return 2 if config.model.has_binary_head or config.training.z_loss_coeff else 1


def _build_stage(config: RunConfig, tp: TensorParallel, span: StageSpan, mesh: Mesh, device: torch.device,
                 draw: bool, decodes: bool) -> Stage:
    """Build one stage. Its layers are allocated and sharded one by one, so that memory never holds an unsharded
    model."""
    training = config.training
    dropping = policies(config)
    kinds: dict[str, type[GPT] | type[BERT] | type[ViT]] = {
        "bert": BERT, "vit": ViT, "gpt": DecodingGPT if decodes else GPT}
    kind = kinds[config.model.family]
    stage = kind(config.model, tp, span, policies=dropping, seed=training.seed, recompute=config.parallel.recompute)
    reshard_after_forward = config.parallel.sharding == "optim_grads_params"
    layers = [(block, f"{LAYERS}{layer}") for layer, block in stage.stack.blocks.items()]
    # The values do not depend on who draws them, and a thread draws a billion in several seconds.
    turns = draw_in_turns([*layers, (stage, "")], config.model, training.seed, mesh.data_group) if (
        draw and mesh.dp_size > 1) else None

    def allocate_and_shard(module: nn.Module, prefix: str) -> None:
        materialize(module, config.model, prefix=prefix, seed=training.seed, device=device, draw=draw,
                    turns=turns)
        data_parallel.shard(module, mesh, precision=training.precision, reshard_after_forward=reshard_after_forward)

    if training.compile and isinstance(stage, Transformer):
        stage.vocab = replace(stage.vocab, passes=LogitPasses.compiled())
    for block, prefix in layers:
        if training.compile:
            block.forward = torch.compile(block.forward)
        allocate_and_shard(block, prefix)
    # The root has the embeddings, which the backward pass starts with: not worth freeing after the forward pass.
    reshard_after_forward = False
    allocate_and_shard(stage, "")
    data_parallel.gather_once(block for layer, block in stage.stack.blocks.items() if dropping.may_skip(int(layer)))
    return stage
