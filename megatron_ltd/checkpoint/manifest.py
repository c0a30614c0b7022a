"""`manifest.json`: everything a checkpoint holds that is no tensor, and the checksums of its files.

The file ends with the SHA-256 of the rest of itself and is valid only in the exact form in which it is written, so
that any changed byte is noticed. It is written last: a folder with a valid manifest is a complete checkpoint.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

import megatron_ltd
from megatron_ltd.checkpoint.durable import FileFacts, read_file, write_file
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = "megatron_ltd checkpoint"
FORMAT_VERSION = 1
LIMIT_BYTES = 1 << 28
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
"""Names of the dtypes in safetensors and in torch."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


@dataclass(frozen=True)
class TensorFacts:
    """Global shape and dtype of a tensor; the dtype by its name in safetensors, such as F32."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is."""

    step: int
    config: dict[str, Any]
    """`RunConfig.to_dict()` of the run that wrote it."""
    counters: dict[str, Any]
    """Consumed samples and tokens, loss scale, and whatever else resuming needs."""
    tensors: dict[str, TensorFacts]
    files: dict[str, FileFacts]
    versions: dict[str, str]
    changed: dict[str, list[str]] | None = None
    """Names of the settings that differ from their defaults, by section; filled in when the manifest is written. None
    in manifests of versions that did not record it."""


def versions() -> dict[str, str]:
    """The software that writes a checkpoint."""
    import torch  # only here: settings are read from a manifest before torch is loaded

    return {"megatron_ltd": megatron_ltd.__version__, "torch": torch.__version__, "numpy": numpy.__version__,
            "python": platform.python_version()}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest durably."""
    write_file(folder / MANIFEST_NAME, encode(manifest))


def encode(manifest: Manifest) -> bytes:
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": manifest.step,
        "config": manifest.config,
        "changed": changed_settings(manifest.config),
        "counters": manifest.counters,
        "tensors": {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in manifest.tensors.items()},
        "aliases": {},  # part of the format, always empty
        "files": {name: {"bytes": f.size_bytes, "sha256": f.sha256} for name, f in manifest.files.items()},
        "versions": manifest.versions,
    }
    return _dump({**body, "sha256": _digest(body)})


def changed_settings(config: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the settings that differ from the defaults of this version, by section."""
    defaults = RunConfig().to_dict()
    return {section: [name for name, value in values.items()
                      if name not in defaults.get(section, {}) or defaults[section][name] != value]
            for section, values in config.items() if isinstance(values, dict)}


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest of a checkpoint's folder; the files it names are not looked at.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    path = checkpoint / MANIFEST_NAME
    data = read_file(path, LIMIT_BYTES)
    try:
        body = json.loads(data)
        found = body.pop("sha256")
        expected = _digest(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: no manifest can be read from it "
                              f"({type(error).__name__}: {error})"[:500]) from error
    if found != expected or data != _dump({**body, "sha256": found}):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is {expected}, expected {found!r}"[:500])
    if body.get("format") != FORMAT or not _is_count(body.get("format_version")):
        raise CheckpointError(f"{path} is not the manifest of a {FORMAT}")
    if body["format_version"] > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {body['format_version']}; this megatron_ltd "
                              f"({megatron_ltd.__version__}) reads up to {FORMAT_VERSION}. Update megatron_ltd.")
    try:
        return _from_body(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed: {type(error).__name__}: {error}"[:500]) from error


def _from_body(body: dict[str, Any]) -> Manifest:
    files = {name: FileFacts(facts["bytes"], facts["sha256"]) for name, facts in body["files"].items()}
    tensors = {name: TensorFacts(tuple(t["shape"]), t["dtype"]) for name, t in body["tensors"].items()}
    for name, facts in files.items():
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a file of a checkpoint")
        if not _is_count(facts.size_bytes) or not re.fullmatch("[0-9a-f]{64}", facts.sha256):
            raise ValueError(f"{name} has size {facts.size_bytes!r} and SHA-256 {facts.sha256!r}")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or not all(_is_count(size) for size in tensor.shape):
            raise ValueError(f"tensor {name} has shape {tensor.shape} and dtype {tensor.dtype!r}")
    for section in ("config", "counters", "aliases", "versions"):
        if not isinstance(body[section], dict):
            raise TypeError(f"{section} is no table")
    changed = body.get("changed")
    if changed is not None and not isinstance(changed, dict):
        raise TypeError("changed is no table")
    if not _is_count(body["step"]):
        raise ValueError(f"step is {body['step']!r}")
    if body["aliases"]:
        raise ValueError(f"aliases are {body['aliases']!r}, and no version writes any")
    return Manifest(step=body["step"], config=body["config"], counters=body["counters"], tensors=tensors, files=files,
                    versions=body["versions"], changed=changed)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


def _dump(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(body)).hexdigest()
