"""A published model is continued on a folder of text by the script that the README names."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from tests.checkpoint.hugging_face import lively, llama, saved
from tests.data.text.test_special_tokens import folder_of
from tests.examples.forked_python import run_script

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "continue_pretraining.sh"
SPECIAL = ["<unk>", "<s>", "<eos>"]


def text(folder: Path, words: str) -> Path:
    """60 documents."""
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"{words} " * (3 + number % 5) + ("a " * (number % 7)))
    return folder


@torch.no_grad()
def bits_per_byte(model: Path, heldout: Path) -> float:
    """By `transformers`, document by document from the token that its tokenizer begins texts with."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    texts = [json.loads(line)["text"] for line in heldout.read_text().splitlines()]
    nats = 0.0
    for document in texts:
        ids = tokenizer(document, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == SPECIAL.index("<s>")
        logits = network(ids[:, :-1]).logits.log_softmax(2)
        nats -= float(logits.gather(2, ids[:, 1:, None]).sum())
    return nats / math.log(2) / sum(len(document.encode()) for document in texts)


def test_a_model_is_continued_on_a_folder_of_text_and_opens_in_transformers(tmp_path: Path) -> None:
    model = saved(lively(llama(vocab_size=5, tie_word_embeddings=True, num_hidden_layers=3)), tmp_path / "model")
    folder_of(model, SPECIAL, True, tokenizer_config={"eos_token": "<eos>", "bos_token": "<s>"})
    settings = {"MODEL": str(model), "TEXT": str(text(tmp_path / "new", "a b b")), "RUN": "run",
                "REPLAY": str(text(tmp_path / "old", "b a")), "REPLAY_WEIGHT": "0.3", "SEQ_LENGTH": "12"}
    assert run_script(SCRIPT, [], tmp_path, **settings)[0] == 20
    for part in (["--ngram-rows", "64"], ["--recipe=muon-conv"], ["--recipe", "muon-conv-ngram"]):
        code, output = run_script(SCRIPT, ["--train-iters", "12", *part], tmp_path, **settings)
        assert code == 20 and "could not be written" in output and not (tmp_path / "run").exists()
    flags = "--train-iters 12 --lr 1e-2 --global-batch-size 8 --random-ltd --random-ltd-start-length 8"
    code, output = run_script(SCRIPT, [*flags.split(), "--random-ltd-steps", "8"], tmp_path, **settings)
    assert code == 0, output
    run = tmp_path / "run"
    for name in ("text", "replay"):
        corpus = IndexedCorpus(str(run / f"{name}_text_document"))
        assert all((read[0], read[-1]) == (1, 2) for read in map(corpus.read, range(len(corpus))))
    scores = [{Path(task["file"]).name: task["metrics"]["bits_per_byte"]["value"]
               for task in json.loads((run / f"{when}.json").read_text())["tasks"].values()}
              for when in ("before", "after")]
    for name in ("text.heldout.jsonl", "replay.heldout.jsonl"):
        assert scores[1][name] < scores[0][name]
        for folder, score in ((model, scores[0]), (run / "hf", scores[1])):
            assert abs(bits_per_byte(folder, run / name) - score[name]) < 1e-5 * score[name]
    data = read_manifest(run / "checkpoints" / "iter_0000012").config["data"]
    assert data["train_data_path"][::2] == ["0.7", "0.3"] and data["bos_token"] == "auto"
    described = json.loads((run / "hf" / "config.json").read_text())
    assert (described["bos_token_id"], described["eos_token_id"]) == (1, 2)
    assert "| text | " in output and "transformers opens run/hf" in output
    other = settings | {"TEXT": str(tmp_path / "old"), "SEQ_LENGTH": "10"}
    code, output = run_script(SCRIPT, flags.split(), tmp_path, **other)
    assert code == 20 and "Choose another RUN" in output
    for said in (f"begun with TEXT = {tmp_path}/new", f"now        TEXT = {tmp_path}/old",
                 "now        SEQ_LENGTH = 10"):
        assert said in output
