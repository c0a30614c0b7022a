"""What a run says of itself before its first step, against its checkpoint and its corpus."""

from pathlib import Path

import pytest

from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.gpt.index import split_bounds, split_range
from tests.train.runs import TINY, Corpus, pretrain, saved_tensors


def test_the_banner_counts_parameters_and_epochs(corpus: Corpus, tmp_path: Path,
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    settings = {**TINY, **corpus.settings, "train_iters": 4, "random_ltd_steps": 3, "save": str(tmp_path)}
    assert pretrain(0, 1, "", settings).code == 0
    said = dict(line.split(": ", 1) for line in capfd.readouterr().out.splitlines() if ": " in line)
    saved = saved_tensors(tmp_path, 4)
    parameters = sum(tensor.numel() for name, tensor in saved.items() if name.startswith("model."))
    assert said["model"].startswith(f"{parameters:,} parameters")

    opened = IndexedCorpus(corpus.prefix)
    bounds = split_bounds(corpus.settings["split"])[0]
    assert bounds is not None
    part = split_range(bounds, len(opened))
    tokens = int(opened.sequence_lengths[part.start:part.stop].sum())
    read = 4 * TINY["global_batch_size"]
    assert said["data"].startswith(f"train {read} samples, ")
    assert f"{read * TINY['seq_length'] / tokens:.3g} epochs in 4 steps" in said["data"]
    dropped, kept = TINY["num_layers"] - 2, TINY["random_ltd_start_length"]
    assert said["dropping"] == (f"--random-ltd; {dropped} of {TINY['num_layers']} layers keep {kept} of "
                                f"{TINY['seq_length']} tokens at first, and the last step keeps 32 of 32")
    assert said["memory"].endswith("at most in the first process (measured)")
