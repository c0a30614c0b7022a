"""The tokenizer's files that travel with a model."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.convert.huggingface.folder import read_json
from megatron_ltd.checkpoint.durable import make_folder
from megatron_ltd.config import DataConfig

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "tokenizer.model", "vocab.txt", "chat_template.jinja", "generation_config.json")
FOLDER = "tokenizer"
"""Where they lie beside imported checkpoints."""


def carry_in(source: Path, save_dir: Path, family: str) -> DataConfig:
    """Copy the tokenizer's files of a model folder beside its checkpoint, and say how to build the tokenizer.

    Args:
        family: of the model; BERT's tokenizer is its vocabulary.
    """
    target = save_dir / FOLDER
    found = [name for name in FILES if (source / name).is_file()]
    if found:
        make_folder(target)
    for name in found:
        shutil.copyfile(source / name, target / name)
    place = target.resolve()
    if family == "bert" and "vocab.txt" in found:
        vocab_file = str(place / "vocab.txt")
        if _lower_case(source):
            return DataConfig(tokenizer_type="BertWordPieceLowerCase", vocab_file=vocab_file)
        return DataConfig(tokenizer_type="BertWordPieceCase", vocab_file=vocab_file)
    if "tokenizer.json" in found:
        return DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(place / "tokenizer.json"))
    if {"vocab.json", "merges.txt"} <= set(found):
        return DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(place / "vocab.json"),
                          merge_file=str(place / "merges.txt"))
    if "tokenizer.model" in found:
        return DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(place / "tokenizer.model"))
    return DataConfig()


def _lower_case(source: Path) -> bool:
    path = source / "tokenizer_config.json"
    return bool(read_json(path).get("do_lower_case", True)) if path.is_file() else True


def carry_out(settings: DataConfig, target: Path, eos_token: str | None) -> list[str]:
    """Copy the tokenizer's files, and what lies beside them, into a model folder; returns the copied names.

    Args:
        eos_token: the text of the end-of-document token, where the files do not say.
    """
    model = settings.tokenizer_model
    sources = {
        "HuggingFaceTokenizer": {"tokenizer.json": model if model is None or not os.path.isdir(model)
                                 else os.path.join(model, "tokenizer.json")},
        "SentencePieceTokenizer": {"tokenizer.model": model},
        "GPT2BPETokenizer": {"vocab.json": settings.vocab_file, "merges.txt": settings.merge_file},
    }.get(settings.tokenizer_type or "", {"vocab.txt": settings.vocab_file})
    present = {name: Path(path) for name, path in sources.items() if path is not None and Path(path).is_file()}
    for folder in {path.parent for path in present.values()}:
        for name in FILES:
            if (folder / name).is_file():
                present.setdefault(name, folder / name)
    for name, path in present.items():
        shutil.copyfile(path, target / name)
    if "tokenizer_config.json" not in present and {"tokenizer.json", "vocab.txt"} & present.keys():
        _write_tokenizer_config(target, settings.tokenizer_type, eos_token)
    return sorted(present)


def _write_tokenizer_config(target: Path, kind: str | None, eos_token: str | None) -> None:
    """What `AutoTokenizer` needs besides tokenizer.json or vocab.txt."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if kind in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": kind == "BertWordPieceLowerCase"}
    elif eos_token is not None:
        settings |= {"eos_token": eos_token}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
