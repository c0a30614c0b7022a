"""The tokenizer's files that travel with a model."""

import json
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
KINDS = {
    "HuggingFaceTokenizer": {"tokenizer_model": "tokenizer.json"},
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    "SentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
}
"""Tokenizer type -> setting -> the file it names; the first type whose files are all there is taken."""
BERT_FILES = {"vocab_file": "vocab.txt"}


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
    kinds = KINDS
    if family == "bert":
        kinds = {"BertWordPieceLowerCase" if _lower_case(source) else "BertWordPieceCase": BERT_FILES, **KINDS}
    for kind, files in kinds.items():
        if set(files.values()) <= set(found):
            paths = {setting: str(target.resolve() / name) for setting, name in files.items()}
            return DataConfig(tokenizer_type=kind, **paths)  # type: ignore[arg-type]
    return DataConfig()


def _lower_case(source: Path) -> bool:
    path = source / "tokenizer_config.json"
    return bool(read_json(path).get("do_lower_case", True)) if path.is_file() else True


def carry_out(settings: DataConfig, target: Path, eos_token: str | None) -> list[str]:
    """Copy the tokenizer's files, and what lies beside them, into a model folder; returns the copied names.

    Args:
        eos_token: the text of the end-of-document token, where the files do not say.
    """
    present: dict[str, Path] = {}
    for setting, name in KINDS.get(settings.tokenizer_type or "", BERT_FILES).items():
        if given := getattr(settings, setting):
            path = Path(given)
            if path.is_dir() and settings.tokenizer_type == "HuggingFaceTokenizer":
                path = path / name
            if path.is_file():
                present[name] = path
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
