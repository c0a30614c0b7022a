"""A checkpoint with a changed byte, or made to do harm, is refused by the name of the file."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_ltd.checkpoint.durable import FileFacts
from megatron_ltd.checkpoint.io import load
from megatron_ltd.checkpoint.manifest import MANIFEST_NAME, Manifest, encode, read_manifest
from megatron_ltd.checkpoint.tensor_file import NAME_OF, Chunk, encode_header, read_header
from megatron_ltd.checkpoint.verify import verify_file
from megatron_ltd.errors import CheckpointError
from tests.checkpoint.layouts import save_plain

SHARD = "rank-00000.safetensors"


def tensors(mark: float = 0.0) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((2, 3), mark), "model.bias": torch.full((3,), mark, dtype=torch.bfloat16)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_plain(tmp_path, 1, tensors(1.0))


def refusal(checkpoint: Path) -> str:
    """The message with which loading is refused; nothing may have been overwritten."""
    loaded = tensors()
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint, loaded, None)
    assert not any(tensor.any() for tensor in loaded.values())
    return str(caught.value)


@pytest.mark.parametrize("name", [SHARD, MANIFEST_NAME])
def test_every_changed_byte_is_noticed(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    original = path.read_bytes()
    for position, byte in enumerate(original):
        for flipped in (byte ^ 1, byte ^ 0x80, 0x20 if byte != 0x20 else 0x09):
            path.write_bytes(original[:position] + bytes([flipped]) + original[position + 1:])
            assert str(path) in refusal(checkpoint)
    path.write_bytes(original)
    load(checkpoint, tensors(), None)


@pytest.mark.parametrize("name", [SHARD, MANIFEST_NAME])
def test_a_file_cut_short_or_extended_anywhere_is_refused(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    original = path.read_bytes()
    for length in range(len(original)):
        path.write_bytes(original[:length])
        assert str(path) in refusal(checkpoint)
    path.write_bytes(original + b"\n")
    assert str(path) in refusal(checkpoint)


def test_the_message_says_what_was_expected_and_found(checkpoint: Path) -> None:
    path = checkpoint / SHARD
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    damaged = path.read_bytes()[:-1] + b"!"
    path.write_bytes(damaged)
    after = hashlib.sha256(damaged).hexdigest()
    assert f"{path} has SHA-256 {after}, expected {before}" in refusal(checkpoint)
    assert "--ckpt-step loads an older one" in refusal(checkpoint)
    path.unlink()
    assert f"{path} is missing" in refusal(checkpoint)


def test_a_link_a_pipe_and_a_folder_are_refused_without_being_opened(checkpoint: Path, tmp_path: Path) -> None:
    path, elsewhere = checkpoint / SHARD, tmp_path / "elsewhere"
    path.rename(elsewhere)
    attacks: list[tuple[Callable[[], object], str]] = [
        (lambda: path.symlink_to(elsewhere), "is a symbolic link"),
        (lambda: os.mkfifo(path), "is not a regular file"),
        (lambda: path.mkdir(), "is not a regular file"),
        (lambda: path.symlink_to("/dev/zero"), "is a symbolic link"),
    ]
    for make, complaint in attacks:
        make()
        assert f"{path} {complaint}" in refusal(checkpoint)
        path.rmdir() if path.is_dir() else path.unlink()
    elsewhere.rename(path)
    manifest = checkpoint / MANIFEST_NAME
    manifest.rename(elsewhere)
    manifest.symlink_to(elsewhere)
    assert f"{manifest} is a symbolic link" in refusal(checkpoint)


def test_an_unknown_tensor_file_is_refused(checkpoint: Path) -> None:
    (checkpoint / "extra.safetensors").write_bytes(b"")
    assert f"{checkpoint}/extra.safetensors is not in the manifest" in refusal(checkpoint)


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its own checksum right again, as somebody with bad intent would."""
    path = checkpoint / MANIFEST_NAME
    body = json.loads(path.read_bytes())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256((json.dumps(body, indent=1) + "\n").encode()).hexdigest()
    path.write_bytes((json.dumps({**body, "sha256": digest}, indent=1) + "\n").encode())


@pytest.mark.parametrize("name", [
    "../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", ".hidden.safetensors", "",
    "x\x00.safetensors", "passwd", "x.safetensors/../../y.safetensors", "x.safetensors\n"])
def test_a_manifest_cannot_name_files_outside_its_folder(checkpoint: Path, name: str) -> None:
    def rename(body: dict[str, Any]) -> None:
        body["files"][name] = body["files"].pop(SHARD)

    rewrite_manifest(checkpoint, rename)
    assert f"{checkpoint / MANIFEST_NAME} is malformed" in refusal(checkpoint)


@pytest.mark.parametrize("change", [
    {"step": -1}, {"step": "1"}, {"step": True}, {"tensors": {"model.weight": {"shape": [-2], "dtype": "F32"}}},
    {"tensors": {"model.weight": {"shape": [2.0], "dtype": "F32"}}}, {"tensors": {"w": {"shape": 3, "dtype": "F32"}}},
    {"tensors": {"w": {"shape": [2], "dtype": "pickle"}}}, {"files": {SHARD: {"bytes": 1 << 70, "sha256": "0" * 64}}},
    {"files": {SHARD: {"bytes": 1, "sha256": "xyz"}}}, {"files": []}, {"config": None}, {"aliases": {"a": 1}},
    {"format": "other"}, {"format_version": "1"}], ids=str)
def test_a_manifest_with_wrong_types_is_refused(checkpoint: Path, change: dict[str, Any]) -> None:
    rewrite_manifest(checkpoint, lambda body: body.update(change))
    assert str(checkpoint / MANIFEST_NAME) in refusal(checkpoint)


def test_a_newer_format_is_refused_with_the_remedy(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, lambda body: body.update(format_version=2))
    said = refusal(checkpoint)
    assert "has format version 2" in said and "Update megatron_ltd" in said


def test_a_deeply_nested_manifest_is_refused(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).write_bytes(b"[" * 100_000)
    assert "is damaged" in refusal(checkpoint)


def reseal(checkpoint: Path, data: bytes) -> None:
    """Replace the shard's contents and make the manifest agree with them."""
    (checkpoint / SHARD).write_bytes(data)
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(checkpoint, lambda body: body["files"].update({SHARD: facts}))


def shard(header: Any, data: bytes, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: str, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(weight: dict[str, Any], bias: dict[str, Any], at: Any = ((0, 0), (0,))) -> dict[str, Any]:
    places = {"model.weight": {"saved_offsets": at[0]}, "model.bias": {"saved_offsets": at[1]}}
    return {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(places)}, "model.weight": weight, "model.bias": bias}


WEIGHT, BIAS = entry("F32", [2, 3], [0, 24]), entry("BF16", [3], [24, 30])
ONES = np.ones(6, np.float32).tobytes() + np.full(3, 0x3F80, np.uint16).tobytes()


def test_a_hand_made_shard_loads(checkpoint: Path) -> None:
    reseal(checkpoint, shard(header(WEIGHT, BIAS), ONES))
    loaded = tensors()
    load(checkpoint, loaded, None)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1.0).items())


@pytest.mark.parametrize("data", [
    shard(header(WEIGHT, BIAS), ONES, length=1 << 63),
    shard(header(WEIGHT, BIAS), ONES, length=(1 << 64) - 1),
    shard(header(WEIGHT, BIAS), ONES, length=10**8 + 1),
    shard(header(WEIGHT, BIAS), ONES + b"x"),
    shard(header(WEIGHT, BIAS), ONES[:-1]),
    shard(b"[" * 200_000, b""),
    shard(b"\xff\xfe", ONES),
    shard([], ONES),
    shard({"__metadata__": 3}, ONES),
    shard({"model.weight": WEIGHT}, ONES[:24]),
    shard(header(entry("F32", [2, 3], [0, 24]), entry("BF16", [3], [0, 6])), ONES),
    shard(header(entry("F32", [2, 3], [6, 30]), BIAS), ONES),
    shard(header(entry("F32", [2, 3], [-8, 16]), BIAS), ONES),
    shard(header(entry("F32", [2, 3], [0, 1 << 62]), BIAS), ONES),
    shard(header(entry("F32", [2.0, 3], [0, 24]), BIAS), ONES),
    shard(header(entry("F32", [True, 6], [0, 24]), BIAS), ONES),
    shard(header(entry("F32", [-2, -3], [0, 24]), BIAS), ONES),
    shard(header(entry("F32", [1 << 40, 1 << 40], [0, 24]), BIAS), ONES),
    shard(header(entry("F32", "23", [0, 24]), BIAS), ONES),
    shard(header(entry("F8", [2, 3], [0, 24]), BIAS), ONES),
    shard(header(WEIGHT, BIAS, at=((0,), (0,))), ONES),
    shard(header(WEIGHT, BIAS, at=((1, 0), (0,))), ONES),
    shard(header(WEIGHT, BIAS, at=((0, -1), (0,))), ONES),
    shard(header(WEIGHT, BIAS, at=(("0", 0), (0,))), ONES),
    shard(header(entry("I32", [2, 3], [0, 24]), BIAS), ONES),
    shard(header(entry("F32", [3, 2], [0, 24]), BIAS), ONES),
    shard(header(entry("F32", [1, 3], [0, 12]), entry("BF16", [9], [12, 30])), ONES),
    shard({**header(WEIGHT, BIAS), "model.extra": entry("U8", [0], [30, 30])}, ONES),
], ids=lambda data: hashlib.sha256(data).hexdigest()[:6])
def test_a_shard_whose_header_lies_is_refused(checkpoint: Path, data: bytes) -> None:
    reseal(checkpoint, data)
    assert SHARD in refusal(checkpoint) or "the files hold" in refusal(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(checkpoint: Path, value: float) -> None:
    weight = np.ones(6, np.float32)
    weight[4] = value
    reseal(checkpoint, shard(header(WEIGHT, BIAS), weight.tobytes() + ONES[24:]))
    assert refusal(checkpoint).endswith("model.weight has NaN or infinity in it")


@given(st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from([torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.int64]),
              st.lists(st.integers(0, 3), max_size=3)), max_size=5))
def test_the_safetensors_library_reads_any_header_that_is_written(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    values = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in contents.items()}
    ordered = sorted(values, key=lambda name: -values[name].itemsize)
    chunks = [Chunk(n, NAME_OF[values[n].dtype], tuple(values[n].shape), (7,) * values[n].dim()) for n in ordered]
    raw = b"".join(values[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in ordered)
    data = encode_header(chunks) + raw
    path.write_bytes(data)
    read = load_file(path)
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], values[name]) and read[name].dtype == values[name].dtype for name in read)
    found, not_finite = verify_file(path, FileFacts(len(data), hashlib.sha256(data).hexdigest()))
    assert found == chunks
    assert not not_finite


@given(st.binary(max_size=200), st.integers(0, 60))
def test_random_bytes_are_refused_or_describe_the_file_exactly(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int,
) -> None:
    data = shard(header(WEIGHT, BIAS), ONES)
    data = data[:at] + noise + data[at + len(noise):]
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    path.write_bytes(data)
    try:
        chunks = read_header(path)
    except CheckpointError:
        return
    assert sum(chunk.size_bytes for chunk in chunks) + 8 + struct.unpack("<Q", data[:8])[0] == len(data)


def test_a_manifest_survives_a_round_trip(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert isinstance(manifest, Manifest)
    assert encode(manifest) == (checkpoint / MANIFEST_NAME).read_bytes()
    assert manifest.versions["torch"] == torch.__version__
    facts = manifest.files[SHARD]
    data = (checkpoint / SHARD).read_bytes()
    assert facts == FileFacts(len(data), hashlib.sha256(data).hexdigest())
