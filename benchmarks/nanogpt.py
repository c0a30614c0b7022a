"""A peer: the GPT of nanoGPT's `model.py`, loaded from a checkout the user points to.

Trained as its `train.py` does: autocast in bf16, gradients clipped to norm 1.0, AdamW, here the fused one everywhere.
"""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.shapes import Shape
from megatron_ltd.errors import ConfigError


def load_source(folder: Path) -> ModuleType:
    """The module `model.py` of a checkout.

    Raises:
        ConfigError: it is not there, or is another one.
    """
    path = folder / "model.py"
    if not path.is_file():
        raise ConfigError(f"--nanogpt = {folder}: no model.py there; give the folder of a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "GPT") or not hasattr(module, "GPTConfig"):
        raise ConfigError(f"--nanogpt = {folder}: model.py there has no GPT and GPTConfig; give a checkout of nanoGPT")
    return module


class NanoGPT:
    """One model and its optimizer."""

    def __init__(self, source: ModuleType, shape: Shape, *, precision: str, device: torch.device, compiled: bool):
        config = source.GPTConfig(
            block_size=shape.sequence_tokens, vocab_size=shape.vocabulary, n_layer=shape.layers, n_head=shape.heads,
            n_embd=shape.hidden, dropout=0.0, bias=True)
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
            model = source.GPT(config).to(device)
        self._parameters = list(model.parameters())
        groups = [{"params": [p for p in self._parameters if p.dim() >= 2], "weight_decay": 0.01},
                  {"params": [p for p in self._parameters if p.dim() < 2], "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), fused=True)
        self._model: Any = torch.compile(model) if compiled else model
        self._autocast = torch.amp.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        text = torch.randint(shape.vocabulary, (shape.samples, shape.sequence_tokens + 1), device=device)
        self._tokens, self._labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step(self) -> None:
        """One training step."""
        with self._autocast:
            _, loss = self._model(self._tokens, self._labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
