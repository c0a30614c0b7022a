"""Storage for torch.distributed.checkpoint: safetensors files that are hashed while they are written.

DCP plans who writes what (replicas once, shards by their owners) and which saved chunks overlap a wanted shard; this
is where its bytes go. torch's own `HuggingFaceStorageWriter` reads and writes the same format, but builds each file
twice in memory, refuses views and transposed tensors, and would need every file to be read again for its checksum.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from megatron_ltd.checkpoint.durable import FileFacts
from megatron_ltd.checkpoint.manifest import TensorFacts
from megatron_ltd.checkpoint.tensor_file import DTYPE_OF, NAME_OF, Chunk, write_tensors
from megatron_ltd.checkpoint.verify import Contents
from megatron_ltd.errors import CheckpointError


class SafetensorsWriter(StorageWriter):
    """Writes one file per rank into a folder that exists.

    After a save, `files` and `tensors` hold what the manifest needs on the coordinating rank.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, FileFacts] = {}
        self.tensors: dict[str, TensorFacts] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.files, self.tensors = {}, {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            _chunk(item)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: Future[list[WriteResult]] = Future()
        results.set_result(self._write(plan, planner) if plan.items else [])
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.files = dict(result.storage_data for of_rank in results for result in of_rank)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), name
            self.tensors[name] = TensorFacts(tuple(tensor.size), NAME_OF[tensor.properties.dtype])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # Wide numbers first, so that every chunk is aligned to its own width.
        chunks = {_chunk(item): item for item in plan.items}
        ordered = sorted(chunks, key=lambda chunk: (-DTYPE_OF[chunk.dtype].itemsize, chunk.name))
        values = (cast(torch.Tensor, planner.resolve_data(chunks[chunk])) for chunk in ordered)
        written = plan.storage_data, write_tensors(self.folder / plan.storage_data, ordered, values)
        return [WriteResult(chunks[chunk].index, chunk.size_bytes, written) for chunk in ordered]


class LazyPlanner(DefaultSavePlanner):
    """Plans a save of tensors on the device "meta", whose values are read one at a time when they are written."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.read = read

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.read(index.fqn)


class SafetensorsReader(FileSystemReader):
    """Reads tensors from verified files, as torch's reader of files, but for their format.

    Args:
        contents: where the chunks are, as the verification found them.
        wanted: global shape and dtype by name.
    """

    def __init__(self, folder: Path, contents: Contents, wanted: Mapping[str, TensorFacts]):
        super().__init__(folder)
        self.folder = folder
        self._metadata = _metadata(contents, wanted)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._metadata.storage_data[item.storage_index], []).append(item)
        for file, items in by_file.items():
            with safe_open(self.folder / file, framework="pt") as stored:
                for item in items:
                    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    values = stored.get_slice(item.storage_index.fqn)[box]
                    target = planner.resolve_tensor(item).detach()
                    if target.shape != values.shape:
                        raise ValueError(f"{item.storage_index}: {values.shape} does not fit {target.shape}")
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _metadata(contents: Contents, wanted: Mapping[str, TensorFacts]) -> Metadata:
    tensors: dict[str, Any] = {}
    files: dict[MetadataIndex, str] = {}
    for name, facts in wanted.items():
        boxes = []
        for file, chunk in contents.chunks[name]:
            boxes.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)))
            files[MetadataIndex(name, chunk.offsets)] = file
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=DTYPE_OF[facts.dtype]), torch.Size(facts.shape),
                                              boxes)
    return Metadata(state_dict_metadata=tensors, storage_data=files)


def _chunk(item: WriteItem) -> Chunk:
    name, data = item.index.fqn, item.tensor_data
    assert data is not None, f"{name} is no tensor"
    dtype = data.properties.dtype
    if dtype not in NAME_OF:
        raise CheckpointError(f"{name} has dtype {dtype}, which a checkpoint cannot hold")
    return Chunk(name, NAME_OF[dtype], tuple(data.chunk.sizes), tuple(data.chunk.offsets))
