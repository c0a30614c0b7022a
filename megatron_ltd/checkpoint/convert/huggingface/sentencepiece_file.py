"""A SentencePiece model as a tokenizer.json, which gives the same ids: the classes of `transformers` that read .model
files normalise and split differently from SentencePiece."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from megatron_ltd.errors import CheckpointError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
OUTSIDE_TEXT = " "
"""Begins the names of unigram pieces that are no text, such as `</s>`: normalised text has no space, so the letters of
such a name in a text are pieces of their own, as in SentencePiece."""


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: an integer, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        yield key >> 3, data[place:place + size]
        place += size


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


def _piece(data: bytes) -> Piece:
    values = dict(_fields(data))
    return Piece(values[1].decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, NORMAL))


def tokenizer_json(model: bytes) -> str:
    """The text of a tokenizer.json.

    Raises:
        CheckpointError: a model of another kind than unigram, and BPE without user-defined symbols.
    """
    fields = list(_fields(model))
    pieces = [_piece(value) for number, value in fields if number == 1]
    trainer = dict(_fields(b"".join(value for number, value in fields if number == 2)))
    normalizer = dict(_fields(b"".join(value for number, value in fields if number == 3)))
    kind, byte_fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
    unknown = next((number for number, piece in enumerate(pieces) if piece.kind == UNKNOWN), 0)
    if kind == UNIGRAM:
        named = [OUTSIDE_TEXT * (piece.kind in (UNKNOWN, CONTROL, UNUSED)) + piece.text for piece in pieces]
        best = max((piece.score for piece in pieces if piece.kind == NORMAL), default=0.0)
        scores = [len(piece.text) * best - 0.1 if piece.kind == USER_DEFINED else piece.score for piece in pieces]
        core: Any = models.Unigram(list(zip(named, scores, strict=True)), unknown, byte_fallback)
    elif kind == BPE and not any(piece.kind == USER_DEFINED for piece in pieces):
        core = models.BPE({piece.text: number for number, piece in enumerate(pieces)}, _merges(pieces),
                          unk_token=pieces[unknown].text, fuse_unk=True, byte_fallback=byte_fallback)
    else:
        raise CheckpointError(f"a SentencePiece model of kind {kind}: only unigram models, and BPE models without "
                              "user-defined symbols, can be exported. Give --no-tokenizer to export the model alone")
    engine = tokenizers.Tokenizer(core)
    steps: list[Any] = [normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    if normalizer.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.get(3, 1):  # add_dummy_prefix
        steps.append(normalizers.Prepend("▁"))
    engine.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if kind == UNIGRAM and trainer.get(22, 1):  # split_by_whitespace
        engine.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.get(3, 1) else []
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    text: str = engine.to_str()
    return text


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best pieces first."""
    number = {piece.text: place for place, piece in enumerate(pieces)}
    found = [(-piece.score, number[piece.text[:cut]], number[piece.text[cut:]], piece.text[:cut], piece.text[cut:])
             for piece in pieces if piece.kind == NORMAL for cut in range(1, len(piece.text))
             if piece.text[:cut] in number and piece.text[cut:] in number]
    return [(left, right) for *_, left, right in sorted(found)]
