"""Four published launch scripts of Megatron-LM and Megatron-DeepSpeed, with their paths changed, and made small."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from megatron_ltd.train.process.environment import Launch
from tests.train.runs import RECIPES, launched, read_lines

SMALL = ("--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
         "--micro-batch-size 1 --global-batch-size 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
         "--train-iters 2 --eval-iters 1 --log-interval 1").split()
LENGTHS = {"min_value": 16, "max_value": 64}


def small_deepspeed_file(path: Path, to: Path) -> Path:
    """The script's file, with the sizes of the small model in its block of random-LTD."""
    found = json.loads(path.read_text())
    block = found["data_efficiency"]["data_routing"]["random_ltd"]
    block |= {"total_layer_num": 4, "random_ltd_layer_num": 2, "random_ltd_layer_id": [1, 2]}
    block["random_ltd_schedule"] |= LENGTHS
    to.write_text(json.dumps(found))
    return to


def write_corpus(prefix: Path, sentences: int) -> str:
    """Documents of random ids that both vocabularies have."""
    random = np.random.default_rng(1)
    with IndexedCorpusWriter(str(prefix), 30000) as writer:
        for _ in range(60):
            writer.add_document(random.integers(1000, 20000, 120).tolist(), [120 // sentences] * sentences)
    return str(prefix)


@pytest.mark.parametrize(("name", "more"), [
    ("nvidia-gpt3-175b", ["--rampup-batch-size", "1", "1", "4"]), ("nvidia-bert-340m", []),
    ("mds-gpt-1.3b-random-ltd", []), ("mds-bert-336m-random-ltd", []),
])
def test_a_published_script_trains_with_its_paths_changed_and_nothing_else(
    shared_data: Path, tmp_path: Path, name: str, more: list[str],
) -> None:
    script = shared_data / "launch_scripts" / f"{name}.args"
    if not script.exists():
        pytest.skip("the launch scripts are not there")
    family, tokenizers = "bert" if "bert" in name else "gpt", shared_data / "tokenizers"
    vocabulary = "bert/bert-large-uncased-vocab.txt" if family == "bert" else "gpt2/vocab.json"
    paths: dict[str, Any] = {
        "@DATA@": write_corpus(tmp_path / "corpus", 4 if family == "bert" else 1), "@VOCAB@": tokenizers / vocabulary,
        "@MERGES@": tokenizers / "gpt2" / "merges.txt", "@SAVE@": tmp_path / "c", "@LOAD@": tmp_path / "c",
        "@TB@": tmp_path / "tb"}
    deepspeed_file = script.with_name(f"{name}.ds.json")
    if deepspeed_file.exists():
        paths["@DS@"] = small_deepspeed_file(deepspeed_file, tmp_path / "ds.json")
    header, *words = script.read_text().splitlines()
    assert f"recipe={family} " in header
    command = [*(str(paths.get(word, word)) for word in words), *SMALL, *more]
    with launched(Launch()):
        assert RECIPES[f"pretrain_{family}"].main([*command, "--metrics-file", str(tmp_path / "m.jsonl")]) == 0
    steps = [line for line in read_lines(tmp_path / "m.jsonl") if "lm_loss" in line]
    assert [line["step"] for line in steps] == [1, 2] and all(math.isfinite(line["lm_loss"]) for line in steps)
    assert {line["kept_length"] for line in steps} == ({16} if "random-ltd" in name else {64})
