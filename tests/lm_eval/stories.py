"""The trained 260k-parameter Llama of the public test data, and its tokenizer as a SentencePiece model."""

import json
import struct
from pathlib import Path
from typing import Any

SENTENCEPIECE_BPE = 2
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
SPECIAL = {0: ("<unk>", UNKNOWN), 1: ("<s>", CONTROL), 2: ("</s>", CONTROL)}


def folder(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


def reference(shared_data: Path) -> dict[str, Any]:
    return json.loads((folder(shared_data) / "reference.json").read_text())


def varint(number: int) -> bytes:
    """A protocol-buffer number."""
    if number < 0x80:
        return bytes([number])
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7)


def whole(tag: int, number: int) -> bytes:
    return varint(tag << 3) + varint(number)


def block(tag: int, data: bytes) -> bytes:
    return varint(tag << 3 | 2) + varint(len(data)) + data


def sentencepiece_model(shared_data: Path) -> bytes:
    """tok512.bin, [length] then [score, length, bytes] a piece, as the protocol buffer that SentencePiece reads."""
    data = (folder(shared_data) / "tok512.bin").read_bytes()
    position, pieces = 4, []
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        text = data[position + 8:position + 8 + length].decode()
        position += 8 + length
        number = len(pieces)
        kind = BYTE if text.startswith("<0x") else NORMAL
        text, kind = SPECIAL.get(number, (text.replace(" ", "\u2581"), kind))
        value = varint(2 << 3 | 5) + struct.pack("<f", score)
        pieces.append(block(1, block(1, text.encode()) + value + whole(3, kind)))
    trainer = whole(3, SENTENCEPIECE_BPE) + whole(4, len(pieces)) + whole(35, 1)
    normalizer = block(1, b"identity") + whole(3, 1) + whole(4, 0) + whole(5, 1)
    return b"".join(pieces) + block(2, trainer) + block(3, normalizer)
