"""A tokenizer with which a model was not trained is told from its own, moved or with tokens added."""

import shutil
from pathlib import Path

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.other_tokens import other_tokens
from megatron_ltd.data.text.tokenizer import build_tokenizer
from tests.data.text.test_special_tokens import folder_of, opened

NAMES = ["<unk>", "<eos>", *(f"w{number}" for number in range(40))]


def named(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    return folder_of(folder, names, False)


def test_the_same_ids_are_the_models_wherever_they_lie_and_others_are_not(tmp_path: Path) -> None:
    base = named(tmp_path / "base", NAMES)
    own = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(base))
    shutil.copytree(base, tmp_path / "moved")
    more = named(tmp_path / "more", [*NAMES, "<user>", "<answer>"])
    other = named(tmp_path / "other", [*NAMES[:2], *reversed(NAMES[2:])])
    assert other_tokens(opened(tmp_path / "moved"), own) is None and other_tokens(opened(more), own) is None
    told = other_tokens(opened(other), own)
    assert told is not None and told.startswith("91% of the token ids") and str(base) in told and str(other) in told
    numbers = DataConfig(tokenizer_type="NullTokenizer")
    assert other_tokens(build_tokenizer(numbers, 44), own) is None and other_tokens(opened(other), numbers) is None
    shutil.rmtree(base)
    assert other_tokens(opened(other), own) is None
