"""What is known of the classes of `transformers` is what the installed version says."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig

from megatron_ltd.checkpoint.convert.huggingface.config import model_config, unread_entries
from megatron_ltd.checkpoint.convert.huggingface.families import (
    ARCHITECTURE,
    COMPUTED_ELSEWHERE,
    DEFAULTS,
    FAMILY_OF,
    OTHERS,
)
from megatron_ltd.errors import CheckpointError
from tests.checkpoint.hugging_face import MODELS, lively, read_in, saved
from tools import convert_checkpoint

SOURCES = Path(transformers.__file__).parent
NOT_OF_A_FILE = {"_attn_implementation", "num_labels"}
"""How the caller wants attention to be computed, and what follows from id2label."""


def is_config(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "config") or (
        isinstance(node, ast.Attribute) and node.attr == "config")


def entries_read(path: Path) -> set[str]:
    """Names of the attributes of a `config` that a file reads."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        elif (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
              and is_config(node.args[0]) and isinstance(node.args[1], ast.Constant)):
            found.add(str(node.args[1].value))
    return found


@pytest.mark.parametrize("kind", FAMILY_OF)
def test_every_entry_that_a_class_reads_is_read_here_too(kind: str) -> None:
    """So that what is noted as read by no class is that indeed."""
    module = kind.replace("-", "_")
    known = AutoConfig.for_model(kind)
    read = entries_read(SOURCES / "models" / module / f"modeling_{module}.py") - NOT_OF_A_FILE
    read |= {field.name for field in dataclasses.fields(known)}
    described = {name: value for name, value in known.to_dict().items() if name in read}
    described |= {name: None for name in read - described.keys()} | {"model_type": kind}
    assert len(read) > 15
    assert unread_entries(described, Path("config.json")) == []


@pytest.mark.parametrize("kind", FAMILY_OF)
def test_defaults_and_classes_are_those_of_the_configuration_classes(kind: str) -> None:
    known = AutoConfig.for_model(kind)
    fields = {field.name: field.default for field in dataclasses.fields(known)}
    named = {name: value for name, value in DEFAULTS[kind].items() if name != "num_labels"}
    assert {name: fields[name] for name in named} == named
    assert getattr(transformers, ARCHITECTURE[kind]).config_class is type(known)


def test_models_that_are_refused_with_a_reason_and_entries_of_other_models_exist() -> None:
    assert OTHERS.keys() <= transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES.keys()
    texts = [path.read_text() for path in (SOURCES / "models").glob("*/*.py")
             if path.name.startswith(("configuration_", "modeling_"))]
    assert not [name for name in COMPUTED_ELSEWHERE if not any(re.search(rf"\b{name}\b", text) for text in texts)]


def test_bloom_is_read_under_the_names_of_its_published_files() -> None:
    plain = {"model_type": "bloom", "hidden_size": 48, "n_layer": 3, "n_head": 6, "vocab_size": 61}
    published = {"model_type": "bloom", "n_embed": 48, "n_layer": 3, "num_attention_heads": 6, "vocab_size": 61}
    assert model_config(published, Path("config.json")) == model_config(plain, Path("config.json"))
    with pytest.raises(CheckpointError, match="n_embed = 48: must equal hidden_size = 64"):
        model_config(published | {"hidden_size": 64}, Path("config.json"))


def test_entries_that_no_class_reads_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(lively(MODELS["qwen2-qkv-biases"]()), tmp_path / "source")
    path = source / "config.json"
    odd = {"_num_labels": 1, "use_mrope": False, "rotation_note": "odd", "unknown_token_id": 5, "logit_scale": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    assert read_in(source, tmp_path / "ours") == 0
    said = capsys.readouterr().out
    assert "no class of qwen2 reads, so they change nothing" in said
    assert all(name in said for name in odd)


def test_a_dry_run_reads_the_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = MODELS["llama-yarn"]()
    source = saved(theirs, tmp_path / "source")
    (source / "model.safetensors").unlink()
    assert convert_checkpoint.main(["--from-hf", str(source), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"{theirs.num_parameters():,} parameters" in said
    assert "--hidden-size 64" in said and """--rope-scaling '{"rope_type": "yarn", "factor": 3.0""" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    for changes, words in (({"model_type": "gemma"}, "since its embeddings"), ({"hidden_act": "relu"}, "'relu'")):
        (source / "config.json").write_text(json.dumps(theirs.config.to_dict() | changes))
        assert convert_checkpoint.main(["--from-hf", str(source), "--dry-run"]) == 22
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_a_dry_run_without_a_description_names_the_flag_and_what_to_give(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    assert convert_checkpoint.main(["--from-hf", str(tmp_path / missing), "--dry-run"]) == 22
    told = capsys.readouterr().err
    assert f"--from-hf = {tmp_path / missing}: there is no file" in told and "or its config.json" in told
