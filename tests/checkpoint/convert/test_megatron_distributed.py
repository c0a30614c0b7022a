"""megatron-core's distributed checkpoints: written by megatron-core, read here, and written for it."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron_ltd.model.arithmetic.shapes import VOCABULARY
from megatron_ltd.parallel.collectives import TensorParallel
from tests.checkpoint.convert.megatron_core_ranks import answered, written
from tests.checkpoint.hugging_face import assert_logits_close, our_logits
from tests.gloo import run_ranks
from tests.train.runs import saved_tensors
from tools import import_megatron_checkpoint as tool

pytest.importorskip("megatron.core")
KINDS = ["gpt", "llama", "bert", "today", "one-plus"]
TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(5))
Written = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def tp() -> Iterator[TensorParallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TensorParallel(init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A folder with a checkpoint of each kind, and the logits that megatron-core computes with it."""
    folder = tmp_path_factory.mktemp("megatron_core")
    logits = run_ranks(written, 4, str(folder), KINDS, TOKENS, timeout=240.0)[0]
    for kind in KINDS:
        assert tool.main(["--from-megatron", str(folder / kind), "--output", str(folder / f"our-{kind}")]) == 0
    return folder, dict(zip(KINDS, logits, strict=True))


def test_a_gpt_computes_what_megatron_core_computes(theirs: Written, tp: TensorParallel) -> None:
    folder, logits = theirs
    for kind in (kind for kind in KINDS if kind != "bert"):
        found = our_logits(folder / f"our-{kind}", 0, tp, TOKENS)
        assert_logits_close(found, logits[kind][..., :61])


def test_what_megatron_core_pickles_is_the_same_model(theirs: Written) -> None:
    for kind in KINDS:
        ours = theirs[0] / f"unpickled-{kind}"
        assert tool.main(["--from-megatron", str(theirs[0] / f"pickled-{kind}"), "--output", str(ours)]) == 0
        found, expected = saved_tensors(ours, 0), saved_tensors(theirs[0] / f"our-{kind}", 0)
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_megatron_core_loads_what_is_written_for_it(theirs: Written, capsys: pytest.CaptureFixture[str]) -> None:
    folder, logits = theirs
    for kind in KINDS:
        assert tool.main(["--load", str(folder / f"our-{kind}"), "--output", str(folder / f"back-{kind}")]) == 0
    said = capsys.readouterr().out
    assert "--window-size 5,0" in said and "--window-attn-skip-freq [1,0,1,1] --no-rope-freq [0,0,1,0]" in said
    assert said.count("--qk-layernorm") == 2 and said.count("--apply-layernorm-1p") == 1
    folders = {kind: str(folder / f"back-{kind}" / "release") for kind in KINDS}
    for kind, found in zip(KINDS, run_ranks(answered, 1, folders, TOKENS, timeout=240.0)[0], strict=True):
        assert_logits_close(found[..., :61], logits[kind][..., :61])
        again = folder / f"again-{kind}"
        assert tool.main(["--from-megatron", folders[kind], "--output", str(again)]) == 0
        before, after = saved_tensors(folder / f"our-{kind}", 0), saved_tensors(again, 0)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            rows = 61 if name.removeprefix("model.") in VOCABULARY else len(tensor)  # the others pad the vocabulary
            assert torch.equal(tensor[:rows], after[name][:rows]), name


def test_an_index_that_holds_anything_else_is_not_built(theirs: Written, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("common.pt", "metadata.json"):
        (tmp_path / name).write_bytes((theirs[0] / "gpt" / name).read_bytes())

    class Program:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exit, ("a program was run",)

    for content, words in ((pickle.dumps(Program()), "which no index needs"), (b"", "is no index"),
                           (pickle.dumps({"a": 1}), "is no index")):
        (tmp_path / ".metadata").write_bytes(content)
        assert tool.main(["--from-megatron", str(tmp_path), "--output", str(tmp_path / "out")]) == 22
        assert words in capsys.readouterr().err
