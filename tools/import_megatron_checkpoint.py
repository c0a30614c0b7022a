"""Imports the weights of a Megatron-LM checkpoint, classic or in megatron-core's distributed format (torch_dist), and
writes one in the latter.

    python tools/import_megatron_checkpoint.py --from-megatron old/iter_0001000 --output imported --vocab-size 50257
    python tools/import_megatron_checkpoint.py --load checkpoints/350m --output exported

TRUST: these files are Python pickles. They are opened with torch's restricted unpickler (weights_only), which builds
tensors, plain containers and the settings' argparse.Namespace, and rejects everything else: no code in the file is run,
as far as the unpickler can be trusted; the index of the distributed format is opened in the same way with the types of
torch's index. Import only files whose origin you know. This is the only command of the project that opens pickles; its
output is safetensors.

Supported are GPT and BERT, any tensor- and pipeline-parallel size, and of pickled files (mp_rank_XX[_YYY]/
model_optim_rng.pt) the three orders of query/key/value rows. Optimizer state is not read. Train the checkpoint further
with --load DIR --finetune --use-checkpoint-args and a tokenizer. An exported folder is what Megatron-LM loads with
--load DIR --ckpt-format torch_dist and the printed flags; the model must fit into memory.
"""

import argparse
import enum
import functools
import io
import json
import pathlib
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

import torch
from torch.distributed.checkpoint import filesystem, planner, save
from torch.distributed.checkpoint import metadata as index_types

from megatron_ltd.checkpoint.convert.megatron.args import flags_of, megatron_settings
from megatron_ltd.checkpoint.convert.megatron.distributed import Piece, Stored, exported, import_distributed
from megatron_ltd.checkpoint.convert.megatron.importing import import_model
from megatron_ltd.checkpoint.layout import find_checkpoint
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.saved_settings import saved_config
from megatron_ltd.checkpoint.whole_tensors import PREFIX, CheckpointTensors
from megatron_ltd.errors import CheckpointError, ConfigError
from megatron_ltd.log import Console
from megatron_ltd.train.state import TrainState
from tools.commands.command_line import add_output, exit_code_of, parser_of

INDEX, SETTINGS = ".metadata", "common.pt"
INDEX_TYPES = {
    index_types: ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                  "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    filesystem: ("_StorageInfo", "_StoragePrefix"),
    planner: ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    torch: ("Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"),
    torch.serialization: ("_get_layout",),
    pathlib: ("PosixPath",),
}
"""What torch's index of a distributed checkpoint is made of: tables without behaviour."""


class Choice:
    """Stands for a value of an enumeration in the settings, none of which decides what a model computes."""

    def __init__(self, value: object):
        self.value = value


def member(choices: object, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 write for a value of an enumeration: getattr, with its type and its name."""
    if choices is Choice:
        return Choice(name)
    if isinstance(choices, enum.EnumMeta) and name in choices.__members__:
        return choices[name]
    raise pickle.UnpicklingError(f"it takes {name!r} of something that is no enumeration")


CHOICES = ("megatron.core.transformer.enums.AttnBackend", "megatron.core.transformer.enums.CudaGraphScope",
           "megatron.core.transformer.enums.LayerType", "megatron.core.enums.ModelType",
           "megatron.core.transformer.enums.ModelType", "megatron.core.rerun_state_machine.RerunMode")


class IndexReader(pickle.Unpickler):
    """Builds the index of a distributed checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return member
        for known, names in INDEX_TYPES.items():
            if known.__name__ == module and name in names:
                return getattr(known, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no index needs")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--from-megatron", metavar="DIR", help="folder of one iteration to read")
    parser.add_argument("--load", metavar="DIR", help="folder of checkpoints to export")
    parser.add_argument("--ckpt-step", type=int, metavar="STEP", help="with --load: this step rather than the newest")
    add_output(parser, "--save", required=True, metavar="DIR", help="new folder: with --from-megatron for the "
               "checkpoint, with --load for one of Megatron-LM")
    parser.add_argument("--vocab-size", type=int, metavar="N",
                        help="size of the tokenizer, if the files hold only the padded size")
    args = parser.parse_args(argv)
    if (args.from_megatron is None) == (args.load is None):
        raise ConfigError("Give --from-megatron DIR --output DIR to read a checkpoint of Megatron-LM, or --load DIR "
                          "--output DIR to write one.")
    if args.vocab_size is not None and args.vocab_size < 1:
        raise ConfigError(f"--vocab-size = {args.vocab_size} must be at least 1.")
    return args


@contextmanager
def only_globals(known: list[Any]) -> Iterator[None]:
    """Within it torch's restricted unpickler builds these objects, and none that other packages have allowed."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def opened(path: Path, part: tuple[int, int] | None = None) -> Any:
    """Open one file, or a part of it, with the restricted unpickler; tensors of a file are mapped rather than read.

    Args:
        part: where it begins, and its length in bytes.

    Raises:
        CheckpointError: the file is damaged, or holds objects that the unpickler rejects.
    """
    known: list[Any] = [argparse.Namespace, (member, "builtins.getattr"), *((Choice, name) for name in CHOICES)]
    try:
        source: Path | io.BytesIO = path
        if part is not None:
            with open(path, "rb") as stream:
                stream.seek(part[0])
                source = io.BytesIO(stream.read(part[1]))
        with only_globals(known):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=True if part is None else None)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be opened without trusting it: {str(error).splitlines()[0]}. Only tensors, containers and "
            "an argparse.Namespace of plain values are read; save the file again without other objects in its args.",
        ) from error


def read(path: Path) -> Any:
    """The content of a classic file.

    Raises:
        CheckpointError: as `opened`, or it holds something else.
    """
    state = opened(path)
    if not isinstance(state, dict) or not {"args", "model"} & state.keys():
        raise CheckpointError(f"{path} is no checkpoint of Megatron-LM: it has no args and no model.")
    return state


def read_index(folder: Path) -> dict[str, Stored]:
    """The tensors of a distributed checkpoint; a piece is read when it is needed.

    Raises:
        CheckpointError: the index is damaged, or holds something else.
    """
    try:
        with open(folder / INDEX, "rb") as stream:
            index = IndexReader(stream).load()
        pieces: dict[str, list[Piece]] = {}
        for key, info in index.storage_data.items():
            entry = index.state_dict_metadata[key.fqn]
            if not isinstance(entry, index_types.TensorStorageMetadata):
                continue
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.distcp", info.relative_path) \
                    or getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{folder / INDEX} names {info.relative_path!r}, which is no plain .distcp file "
                                      "in the same folder")
            sizes = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == key.offset)
            load = functools.partial(opened, folder / info.relative_path, (info.offset, info.length))
            pieces.setdefault(key.fqn, []).append(Piece(tuple(key.offset), tuple(sizes), load))
        return {name: Stored(tuple(index.state_dict_metadata[name].size), found) for name, found in pieces.items()}
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, AttributeError, TypeError, KeyError, IndexError,
            StopIteration) as error:
        raise CheckpointError(f"{folder / INDEX} is no index of a distributed checkpoint: {error!r}"[:500]) from error


def write(args: argparse.Namespace) -> None:
    """Write a checkpoint of ours as one that megatron-core loads."""
    target = Path(args.output)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"--output = {target} is not empty. Name a new folder.")
    path = find_checkpoint(Path(args.load), args.ckpt_step)
    manifest = read_manifest(path)
    model = saved_config(manifest, path).model
    settings = megatron_settings(model)
    tensors = CheckpointTensors(path, manifest)
    state = exported(model, lambda name: tensors.read(PREFIX + name), settings["padded_vocab_size"])
    folder = target / "release"
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch tells that there is a single process
        save(state, storage_writer=filesystem.FileSystemWriter(str(folder)), no_dist=True)
    torch.save({"args": argparse.Namespace(**settings), "checkpoint_version": 3.0, "iteration": 0}, folder / SETTINGS)
    (folder / "metadata.json").write_text(json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
        "common_backend_version": 1}), encoding="utf-8")
    (target / "latest_checkpointed_iteration.txt").write_text("release", encoding="utf-8")
    flags = ["--ckpt-format torch_dist", f"--make-vocab-size-divisible-by {model.make_vocab_size_divisible_by}"]
    Console().line(f"wrote {folder} from {path}; its flags there: {' '.join([*flags, *flags_of(settings)])}")


def run(args: argparse.Namespace) -> None:
    if args.load is not None:
        write(args)
        return
    folder, counters = Path(args.from_megatron), TrainState().counters()
    if folder.is_dir():
        Console().line(f"{folder} is read as pickles, with torch's restricted unpickler; import only files whose "
                       "origin you know")
    if (folder / INDEX).is_file():
        path, config = import_distributed(opened(folder / SETTINGS), read_index(folder), Path(args.output), counters,
                                          vocab_size=args.vocab_size)
    else:
        path, config = import_model(folder, read, Path(args.output), counters, vocab_size=args.vocab_size)
    model = config.model
    Console().line(f"wrote {path}: {model.family}, {model.num_layers} layers x {model.hidden_size}, vocabulary "
                   f"{model.vocab_size}; train on it with --load {args.output} --finetune --use-checkpoint-args")


def main(argv: list[str]) -> int:
    return exit_code_of(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
