"""Everything a run needs to resume: weights, optimizer state, and a few counters.

Data order, dropout, kept tokens and the learning rate are functions of the counters, so nothing else is saved. Names
are global and shards know their placement, so a checkpoint of one layout loads in another.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ltd.checkpoint import io
from megatron_ltd.checkpoint.manifest import Manifest
from megatron_ltd.checkpoint.saved_settings import saved_config
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError, flag_name
from megatron_ltd.model.arithmetic.parts import PARTS
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.loss_scale import LossScale
from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.train.adapt import FREE, FREE_WITH_VOCABULARY, Adaptation
from megatron_ltd.train.best import BestSoFar
from megatron_ltd.train.faults.record import FaultRecord
from megatron_ltd.train.setup import Model, NamedParameter


@dataclass
class TrainState:
    """The counters of a run; `updates` is `consumed.steps` less the steps without an update."""

    consumed: Consumed = field(default_factory=Consumed)
    loss_scale: LossScale = field(default_factory=LossScale)
    updates: int = 0
    best: BestSoFar = BestSoFar()
    faults: FaultRecord = FaultRecord()

    def counters(self) -> dict[str, Any]:
        found = {"consumed": dataclasses.asdict(self.consumed), "loss_scale": dataclasses.asdict(self.loss_scale),
                 "updates": self.updates, "best": dataclasses.asdict(self.best)}
        return found if self.faults == FaultRecord() else found | {"faults": dataclasses.asdict(self.faults)}

    @classmethod
    def from_counters(cls, counters: dict[str, Any]) -> "TrainState":
        """The inverse of `counters`.

        Raises:
            CheckpointError: the counters are not in the format of this version.
        """
        try:
            # Checkpoints of earlier versions have no best evaluation, and those of a sound run no faults.
            faults: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                                      for name, value in counters.get("faults", {}).items()}
            return cls(Consumed(**counters["consumed"]), LossScale(**counters["loss_scale"]), counters["updates"],
                       BestSoFar(**counters.get("best", {})), FaultRecord(**faults))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's counters are not those of this version: {error}") from error


IMPORTANCE = "token_drop.importance"


def named_tensors(model: Model, optimizer: ShardedOptimizer | None, updates: int) -> dict[str, torch.Tensor]:
    """The tensors to save, by global name, without the copies of tied embeddings."""
    tensors: dict[str, torch.Tensor] = {f"model.{p.global_name}": p.parameter for p in model.parameters
                                        if not p.is_copy}
    if optimizer is not None:
        moments = optimizer.state_tensors(updates)
        for p in model.parameters:
            if not p.is_copy:
                tensors |= _of_parameter(p, optimizer, moments)
    if model.importance is not None:
        tensors[IMPORTANCE] = model.importance.values
    return tensors


def _of_parameter(p: NamedParameter, optimizer: ShardedOptimizer,
                  moments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The moments of one parameter, by global name."""
    return {f"optimizer.{m}.{p.global_name}": moments[f"{m}.{p.name}"] for m in optimizer.moments(p.name)}


def load(path: Path, model: Model, optimizer: ShardedOptimizer | None, group: dist.ProcessGroup | None, *,
         importance: bool = False, adapt: Adaptation | None = None) -> Manifest:
    """Load weights, and the optimizer's state if an optimizer is given, from a checkpoint, in place.

    Args:
        importance: load the model's importance table too.
        adapt: tensors that must be adapted; only without an optimizer.

    Raises:
        CheckpointError: on all ranks; the checkpoint is damaged or does not fit the model.
    """
    updates = 0
    if optimizer is not None:
        updates = TrainState.from_counters(io.read_on_all_ranks(path, group).counters).updates
    targets: dict[str, torch.Tensor] = {}
    repeated: list[tuple[torch.Tensor, torch.Tensor]] = []
    moments = optimizer.state_tensors(updates) if optimizer is not None else {}
    beside, new = ({}, frozenset()) if adapt is None else (adapt.read, adapt.new)
    targets |= {f"model.{name}": tensor for name, tensor in beside.items()}
    for p in model.parameters:
        if p.global_name in beside or p.global_name in new:
            continue
        wanted: dict[str, torch.Tensor] = {f"model.{p.global_name}": p.parameter}
        if optimizer is not None:
            wanted |= _of_parameter(p, optimizer, moments)
        for name, tensor in wanted.items():
            # A V-shaped pipeline holds both copies of a tied embedding in one process; each name is read once.
            repeated += [(tensor, targets[name])] if name in targets else []
            targets.setdefault(name, tensor)
    if importance and model.importance is not None:
        targets[IMPORTANCE] = model.importance.values
    manifest = io.load(path, targets, group)
    if adapt is not None:
        adapt.finish((p.global_name, p.parameter) for p in model.parameters)
    for copy, original in repeated:
        with torch.no_grad():
            copy.copy_(original)
    return manifest


def check_model_settings(config: RunConfig, manifest: Manifest, path: Path) -> None:
    """Check that the settings which define the weights are those of the checkpoint. A model that starts from another's
    weights may differ in settings to which the weights are adapted.

    Raises:
        CheckpointError: settings differ; the message names all of them.
    """
    free = {"hidden_dropout", "attention_dropout", "init_method_std", "scaled_init", "seq_length",
            "max_position_embeddings"}
    if config.model.family == "vit" and config.checkpoint.finetune:
        free |= FREE
    saved, mine = saved_config(manifest, path).to_dict()["model"], config.to_dict()["model"]
    if saved["family"] != mine["family"]:
        raise CheckpointError(f"{path} holds a {saved['family']} model, and this program trains a {mine['family']}; "
                              "use the other's program, or load another checkpoint")
    grows = config.model.family != "vit" and (mine["vocab_size"] or 0) > (saved["vocab_size"] or 0)
    if config.checkpoint.finetune and config.checkpoint.resize_vocabulary and grows:
        free |= FREE_WITH_VOCABULARY
    gained = [part for part in PARTS if part.is_new(saved, mine)]
    if config.checkpoint.finetune:
        free |= {name for part in gained for name in part.free}
    lines = [f"{flag_name(name)}: {saved[name]} in the checkpoint, {mine[name]} in this run"
             for name in mine if name not in free and saved[name] != mine[name]]
    if lines and grows and len(lines) == 1:
        raise CheckpointError(f"{path} has rows for {saved['vocab_size']} tokens, and this run's vocabulary has "
                              f"{mine['vocab_size']}. Name the model's own tokenizer, or start from its weights with "
                              "--finetune --resize-vocabulary, which gives it rows for the others.")
    addable = [f"{flag_name(name)}:" for part in gained for name in part.free]
    if lines and all(line.startswith(tuple(addable)) for line in lines):
        flags = ", ".join(f"{flag_name(part.free[0])} = {mine[part.free[0]]}" for part in gained)
        raise CheckpointError(f"{path} has no {' and no '.join(part.name for part in gained)}, and this run has "
                              f"{flags}. Leave that out, or start from the checkpoint's weights with --finetune: what "
                              "is added to them starts as zeros and changes nothing at first.")
    if lines:
        raise CheckpointError(f"{path} holds another model; use its settings (--use-checkpoint-args):\n  "
                              + "\n  ".join(lines))


def check_optimizer(config: RunConfig, manifest: Manifest, path: Path) -> None:
    """Check that the saved optimizer state, if there is any, belongs to this run's optimizer.

    Raises:
        CheckpointError: it belongs to a different optimizer.
    """
    saved, mine = manifest.config["optimizer"]["optimizer"], config.optimizer.optimizer
    if saved != mine and any(name.startswith("optimizer.") for name in manifest.tensors):
        raise CheckpointError(f"{path} holds the state of --optimizer {saved}, but this run has --optimizer {mine}; "
                              f"give --optimizer {saved}, or --no-load-optim to take the weights and counters alone")
