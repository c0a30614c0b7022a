"""Conversion holds a few tensors at a time, however large the model is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, FFN, VOCABULARY = 6, 512, 4096, 4001
LARGEST_BYTES = 4 * HIDDEN * FFN
LIMIT_BYTES = 6 * LARGEST_BYTES

SCRIPT = """
import sys
from tools import convert_checkpoint

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
assert convert_checkpoint.main(sys.argv[1:]) == 0
print(status("VmHWM") - before)
"""


def synthetic_model(folder: Path) -> int:
    """A Llama of many equal layers; returns the bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "max_position_embeddings": 64, "vocab_size": VOCABULARY}))
    tensors = {"model.embed_tokens.weight": torch.full((VOCABULARY, HIDDEN), 0.5),
               "model.norm.weight": torch.ones(HIDDEN), "lm_head.weight": torch.ones(VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for part in "qkvo":
            tensors[f"{layer}.self_attn.{part}_proj.weight"] = torch.full((HIDDEN, HIDDEN), 0.1 * i)
        for name, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = torch.full(shape, 0.2 * i)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = torch.ones(HIDDEN)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def peak_growth(*flags: str) -> int:
    """Bytes by which the memory of the tool grows while it runs."""
    root = Path(__file__).resolve().parents[3]
    # What is freed goes back to the system at once: otherwise the C library keeps up to 40 MB, more or less by chance.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *flags], cwd=root, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_memory_is_bounded_by_the_largest_tensor_both_ways(tmp_path: Path) -> None:
    total = synthetic_model(tmp_path / "source")
    assert total > 2.5 * LIMIT_BYTES
    inward = peak_growth("--from-hf", str(tmp_path / "source"), "--save", str(tmp_path / "ours"))
    outward = peak_growth("--load", str(tmp_path / "ours"), "--to-hf", str(tmp_path / "back"))
    assert inward < LIMIT_BYTES and outward < LIMIT_BYTES, f"{inward=} {outward=} {LIMIT_BYTES=} {total=}"
