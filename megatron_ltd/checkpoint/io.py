"""Loads checkpoints into any parallel layout.

A checkpoint's tensors have global names and shapes; each rank asks for the parts it holds. Everything that can be
wrong is found before the first number is overwritten, and by all ranks at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from megatron_ltd.checkpoint.agreement import all_or_none, all_see, gather_json, raise_problems, rank_in
from megatron_ltd.checkpoint.layout import find_checkpoint, older_than
from megatron_ltd.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron_ltd.checkpoint.storage import SafetensorsReader
from megatron_ltd.checkpoint.tensor_file import NAME_OF
from megatron_ltd.checkpoint.verify import verify_files
from megatron_ltd.checkpoint.writer import dcp_errors
from megatron_ltd.errors import CheckpointError, DamagedCheckpointError
from megatron_ltd.log import Console


def agree_on_checkpoint(load_dir: Path, group: dist.ProcessGroup | None, step: int | None = None,
                        console: Console | None = None) -> Path:
    """`find_checkpoint` by rank 0 for all ranks.

    Raises:
        CheckpointError: on all ranks, if there is nothing to load or a rank cannot see it.
    """
    headline = f"no checkpoint to load from {load_dir}"
    chosen = all_or_none(
        headline, lambda: find_checkpoint(load_dir, step, console).name if rank_in(group) == 0 else None, group)
    path = load_dir / str(gather_json(chosen, group)[0])
    all_see(headline, path, "--load", group)
    return path


def load(path: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None,
         all_of: Sequence[str] = ("model.",)) -> Manifest:
    """Verify a checkpoint and fill tensors from it in place; called by all ranks.

    Args:
        path: the checkpoint's folder.
        tensors: by global name; DTensors or plain tensors, on any mesh. Names may differ between ranks.
        group: all ranks, over gloo.
        all_of: prefixes; a saved tensor with such a name that no rank asks for is an error.

    Raises:
        CheckpointError: on all ranks; the checkpoint is damaged or does not fit. Nothing was overwritten, unless
            the message says otherwise.
    """
    manifest = read_on_all_ranks(path, group)
    answers = gather_json([unfit(tensors, manifest), sorted(tensors)], group)
    wanted = {name for _, names in answers for name in names}
    headline = f"{path} does not fit this run"
    raise_problems(headline, list(dict.fromkeys(problem for found, _ in answers for problem in found)))
    raise_problems(headline, [f"{name} is in the checkpoint, but not in the model"
                              for name in sorted(manifest.tensors.keys() - wanted) if name.startswith(tuple(all_of))])
    contents = verify_files(path, manifest, group)
    bad = sorted(contents.not_finite & wanted)
    raise_problems(f"{path} cannot be trained on", [f"{name} has NaN or infinity in it" for name in bad],
                   DamagedCheckpointError)
    mine = {name: manifest.tensors[name] for name in sorted(tensors)}
    reader = SafetensorsReader(path, contents, mine)
    with dcp_errors(f"{path} was read in part only; tensors may hold a mixture"):
        dcp_load({name: tensors[name].detach() for name in mine}, storage_reader=reader, process_group=group,
                 planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False))
    return manifest


def read_on_all_ranks(path: Path, group: dist.ProcessGroup | None) -> Manifest:
    """The manifest, read by every rank and compared.

    Raises:
        DamagedCheckpointError: on all ranks, if one of them cannot read it.
        CheckpointError: on all ranks, if it is not the same everywhere.
    """
    manifest = all_or_none(f"{path} cannot be loaded", lambda: read_manifest(path), group, DamagedCheckpointError)
    digests = gather_json({name: facts.sha256 for name, facts in manifest.files.items()}, group)
    differing = [f"rank {rank}" for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise CheckpointError(f"{path / MANIFEST_NAME} is not the same file on {', '.join(differing)} as on rank 0: "
                              f"--load must be on a file system that all ranks share")
    return manifest


def newest_sound_before(path: Path, group: dist.ProcessGroup | None) -> Path | None:
    """The newest checkpoint of an earlier step that is complete, undamaged and finite; every byte is read. Called by
    all ranks."""
    names = gather_json([older.name for older in older_than(path)], group)[0]
    return next((path.with_name(name) for name in names if _is_sound(path.with_name(name), group)), None)


def _is_sound(path: Path, group: dist.ProcessGroup | None) -> bool:
    try:
        return not verify_files(path, read_on_all_ranks(path, group), group).not_finite
    except DamagedCheckpointError:
        return False


def unfit(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> list[str]:
    """Tensors that the checkpoint does not have, or has in another shape or dtype."""
    problems = []
    for name, tensor in sorted(tensors.items()):
        facts = manifest.tensors.get(name)
        if facts is None:
            problems.append(f"{name} is not in the checkpoint")
            continue
        if tuple(tensor.shape) != facts.shape:
            problems.append(f"{name} has shape {facts.shape} in the checkpoint, {tuple(tensor.shape)} in the model")
        if NAME_OF.get(tensor.dtype) != facts.dtype:
            problems.append(f"{name} has dtype {facts.dtype} in the checkpoint, {tensor.dtype} in the model")
    return problems
