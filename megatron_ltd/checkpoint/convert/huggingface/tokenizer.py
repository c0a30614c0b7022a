"""The tokenizer's files that travel with a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from megatron_ltd.checkpoint.convert.huggingface.folder import read_json
from megatron_ltd.checkpoint.convert.huggingface.sentencepiece_file import tokenizer_json
from megatron_ltd.checkpoint.durable import make_folder
from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.special_tokens import read_settings
from megatron_ltd.data.text.tokenizer import HuggingFaceEngine, Tokenizer
from megatron_ltd.errors import CheckpointError

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
REPLACED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
            "merges.txt", "tokenizer.model", "vocab.txt")
"""Files that decide ids."""
KEPT = ("chat_template", "model_max_length", "padding_side")
"""Entries of a tokenizer_config.json that hold for any tokenizer."""
HARD_TEXTS = (
    "Hello world", " leading", "trailing  ", "two  spaces   three", "   ", " ", "tab\tnew\nline\r\nend", "\n\nx",
    "don't, can't", "3.14159 1234567", "caf\u00e9 e\u0301 \ufb01 \u00bd \uff21 \u2460", "\u65e5\u672c\u8a9e",
    "\U0001f389\U0001f389", "x\u200by\u00a0z\u3000w", "</s> <s> <unk>", "<|endoftext|> <|im_end|>", "[MASK] [CLS]",
    "camelCase_snake-kebab", "def f(x):\n    return x\n", "UPPER lower")
"""Spaces, composed and wide letters, other scripts, names of special tokens, code."""


def carry_in(source: Path, save_dir: Path, family: str) -> DataConfig:
    """Copy the tokenizer's files of a model folder beside its checkpoint, and say how to build the tokenizer.

    Args:
        family: of the model; BERT's tokenizer is its vocabulary.

    Raises:
        CheckpointError: the files cannot be copied.
    """
    target = save_dir / FOLDER
    found = [name for name in FILES if (source / name).is_file()]
    try:
        if found:
            make_folder(target)
        for name in found:
            shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise CheckpointError(f"the tokenizer's files of {source} cannot be copied to {target}: {error}. Choose "
                              "another --output, in a writable folder.") from error
    kinds = KINDS
    if family == "bert":
        kinds = {"BertWordPieceLowerCase" if _lower_case(source) else "BertWordPieceCase": BERT_FILES, **KINDS}
    for kind, files in kinds.items():
        if kind == "GPT2BPETokenizer" and not _splits_as_gpt2(source):
            continue
        if set(files.values()) <= set(found):
            paths = {setting: str(target.resolve() / name) for setting, name in files.items()}
            return DataConfig(tokenizer_type=kind, **paths)  # type: ignore[arg-type]
    return DataConfig()


def _lower_case(source: Path) -> bool:
    path = source / "tokenizer_config.json"
    return bool(read_json(path).get("do_lower_case", True)) if path.is_file() else True


def _splits_as_gpt2(source: Path) -> bool:
    """Whether vocab.json and merges.txt are all of the tokenizer; other classes of them split texts in other ways."""
    declared = read_settings(source / "tokenizer_config.json").get("tokenizer_class")
    return declared in (None, "GPT2Tokenizer", "GPT2TokenizerFast")


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
    for folder in dict.fromkeys(path.parent for path in present.values()):  # that of the first file comes first
        for name in FILES:
            if (folder / name).is_file():
                present.setdefault(name, folder / name)
    for name, path in present.items():
        shutil.copyfile(path, target / name)
    if "tokenizer_config.json" not in present and {"tokenizer.json", "vocab.txt"} & present.keys():
        _write_tokenizer_config(target, settings.tokenizer_type, eos_token)
    return sorted(present)


def make_agree(target: Path, tokenizer: Tokenizer, kind: str) -> None:
    """Make sure that `transformers` opens the folder with a tokenizer that gives our ids for `HARD_TEXTS`, and begins
    texts with our token; where it is not installed, that the folder's tokenizer.json does. If the carried files do not,
    one is written that does.

    Args:
        kind: --tokenizer-type.

    Raises:
        CheckpointError: no tokenizer.json gives our ids.
    """
    if _difference(target, tokenizer) is None:
        return
    if isinstance(tokenizer, HuggingFaceEngine):
        text = tokenizer.definition
    else:
        text = tokenizer_json(Path(tokenizer.files[0]).read_bytes())
    engine = tokenizers.Tokenizer.from_str(text)
    named = {name: engine.id_to_token(token)
             for name, token in (("bos_token", tokenizer.bos), ("pad_token", tokenizer.pad)) if token is not None}
    if tokenizer.adds_bos and engine.encode("a").ids[:1] != [tokenizer.bos]:
        bos = named["bos_token"]
        engine.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokenizer.bos)])
    kept = {name: value for name, value in read_settings(target / "tokenizer_config.json").items() if name in KEPT}
    for name in REPLACED:
        (target / name).unlink(missing_ok=True)
    (target / "tokenizer.json").write_text(engine.to_str(), encoding="utf-8")
    _write_tokenizer_config(target, kind, engine.id_to_token(tokenizer.eod), kept | named)
    if difference := _difference(target, tokenizer):
        raise CheckpointError(f"the tokenizer cannot be exported, since {difference}. Give --no-tokenizer to export "
                              "the model alone")


def _difference(folder: Path, tokenizer: Tokenizer) -> str | None:
    """How the folder's tokenizer differs from ours."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        AutoTokenizer = None
    try:
        if AutoTokenizer is not None:
            opened = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            found = [opened(text, add_special_tokens=False)["input_ids"] for text in HARD_TEXTS]
            begins = opened("a")["input_ids"][:1]
        elif (folder / "tokenizer.json").is_file():
            engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            engine.encode_special_tokens = not isinstance(tokenizer, HuggingFaceEngine)
            found = [engine.encode(text, add_special_tokens=False).ids for text in HARD_TEXTS]
            begins = engine.encode("a").ids[:1]
        else:
            return "there is no tokenizer.json"
    except Exception as error:  # neither library promises what it raises
        return f"it cannot be opened ({error})"[:300]
    for text, ids in zip(HARD_TEXTS, found, strict=True):
        if ids != tokenizer.encode(text):
            return f"{text!r} becomes {ids} there and {tokenizer.encode(text)} here"[:400]
    if tokenizer.adds_bos and begins != [tokenizer.bos]:
        return f"texts begin with {begins} there, and with the token {tokenizer.bos} here"
    return None


def _write_tokenizer_config(target: Path, kind: str | None, eos_token: str | None, more: dict[str, Any] | None = None
                            ) -> None:
    """What `AutoTokenizer` needs besides tokenizer.json or vocab.txt, and `more`."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if kind in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": kind == "BertWordPieceLowerCase"}
    elif eos_token is not None:
        settings |= {"eos_token": eos_token}
    if kind == "SentencePieceTokenizer":
        settings |= {"split_special_tokens": True}  # `</s>` in a text is four letters to SentencePiece
    settings |= more or {}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
