"""A newest checkpoint that is damaged, and one by a newer version: what is said, and how a run goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.checkpoint import manifest
from megatron_ltd.checkpoint.layout import checkpoint_path
from tests.gloo import launch_ranks
from tests.train.launchers import exit_record, finish, start, torchrun
from tests.train.refusals import CHECKPOINT, RUN, assert_clear, contents, refused_in_this_process, settings_in
from tests.train.runs import Corpus, pretrain, read_lines, run, words


@pytest.fixture(scope="module")
def finished_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, {**RUN, **corpus.settings, "save": str(folder / "checkpoints"), "save_interval": 2})
    return folder


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def flip_a_byte(checkpoint: Path) -> None:
    [path] = checkpoint.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {"flipped": flip_a_byte, "no-manifest": lose_the_manifest}


@pytest.mark.parametrize(("damage", "world_size"), [("flipped", 2), ("no-manifest", 1)])
def test_the_newest_sound_checkpoint_is_named_and_taken_on_request(
    corpus: Corpus, folder: Path, finished_run: Path, damage: str, world_size: int,
) -> None:
    older, newest = (checkpoint_path(folder / "checkpoints", step) for step in (2, 4))
    DAMAGE[damage](newest)
    settings, before = settings_in(corpus, folder), contents(folder)
    endings = launch_ranks(pretrain, world_size, settings)
    assert [ending.code for ending in endings] == [CHECKPOINT] * world_size
    assert_clear(endings[0].said, [str(newest), f"The newest sound checkpoint is {older}; --load-fallback continues"])
    assert contents(folder) == before

    endings = launch_ranks(pretrain, world_size, {**settings, "load_fallback": True})
    assert [ending.code for ending in endings] == [0] * world_size
    assert_clear(endings[0].said, ["WARNING: ", f"--load-fallback: this run continues from {older}"])
    losses, wanted = ([line["lm_loss"] for line in read_lines(place / "metrics.jsonl") if "lm_loss" in line]
                      for place in (folder, finished_run))
    assert losses == pytest.approx(wanted, rel=1e-5, abs=0.0)
    assert launch_ranks(pretrain, world_size, settings)[0].code == 0, "the damaged checkpoint has been replaced"


def test_settings_are_taken_from_a_sound_checkpoint_too(corpus: Corpus, folder: Path) -> None:
    lose_the_manifest(checkpoint_path(folder / "checkpoints", 4))
    settings = settings_in(corpus, folder, use_checkpoint_args=True)
    ending = refused_in_this_process(settings)
    assert ending.code == CHECKPOINT
    assert_clear(ending.said, ["manifest.json is missing", "--load-fallback continues"])
    assert pretrain(0, 1, "", {**settings, "load_fallback": True}).code == 0


def test_without_a_sound_checkpoint_there_is_nothing_to_fall_back_to(corpus: Corpus, folder: Path) -> None:
    for step in (2, 4):
        flip_a_byte(checkpoint_path(folder / "checkpoints", step))
    ending = refused_in_this_process(settings_in(corpus, folder, load_fallback=True))
    assert ending.code == CHECKPOINT
    assert_clear(ending.said, ["iter_0000004 is damaged and was not loaded"])
    assert "newest sound" not in ending.said


def test_an_automatic_restart_does_not_repeat_what_no_restart_can_help(corpus: Corpus, folder: Path) -> None:
    """The first attempt of the launcher meets the damage, so three more would."""
    flip_a_byte(checkpoint_path(folder / "checkpoints", 4))
    log = folder / "log"
    command = torchrun(2, "--max-restarts", "3", "-m", "megatron_ltd.pretrain_gpt",
                       *words(settings_in(corpus, folder)))
    code, said = finish(start(command, log)), log.read_text()
    assert code != 0 and said.count("is damaged and was not loaded") == 1, said
    assert exit_record(folder / "checkpoints")["code"] == CHECKPOINT


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a manifest says, with valid checksums."""
    path = checkpoint / manifest.MANIFEST_NAME
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    path.write_bytes(manifest._dump({**body, "sha256": manifest._digest(body)}))


def by_a_newer_version(*, changed: bool | None) -> Callable[[dict[str, Any]], None]:
    """With two settings that this version does not know, one of them in a section of its own.

    Args:
        changed: whether they differ from their defaults; None for a version that does not say.
    """
    def change(body: dict[str, Any]) -> None:
        body["versions"]["megatron_ltd"] = "99.0"
        body["config"]["model"]["telepathy"] = 3
        body["config"]["clairvoyance"] = {"horizon_steps": 7}
        if changed is None:
            del body["changed"]
        elif changed:
            body["changed"]["model"].append("telepathy")
    return change


def test_unknown_settings_at_their_defaults_are_noted(
    corpus: Corpus, folder: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    rewrite(checkpoint_path(folder / "checkpoints", 4), by_a_newer_version(changed=False))
    assert pretrain(0, 1, "", settings_in(corpus, folder)).code == 0
    assert ("settings that this version does not know, at their defaults: --telepathy = 3, --horizon-steps = 7"
            in capsys.readouterr().out)


@pytest.mark.parametrize(("changed", "fragments"), [
    (True, ["and not at their defaults: --telepathy = 3. Use a version"]),
    (None, ["which may differ from their defaults: --telepathy = 3, --horizon-steps = 7. Use a version"]),
], ids=["changed", "not-recorded"])
def test_unknown_settings_that_may_matter_are_refused_by_name(
    corpus: Corpus, folder: Path, changed: bool | None, fragments: list[str],
) -> None:
    rewrite(checkpoint_path(folder / "checkpoints", 4), by_a_newer_version(changed=changed))
    ending = refused_in_this_process(settings_in(corpus, folder))
    assert ending.code == CHECKPOINT
    assert_clear(ending.said, ["was written by megatron_ltd 99.0", "that knows them, such as 99.0", *fragments])


def test_a_manifest_says_which_settings_differ_from_their_defaults(folder: Path) -> None:
    changed = manifest.read_manifest(checkpoint_path(folder / "checkpoints", 4)).changed
    assert changed is not None
    assert {"num_layers", "hidden_size"} <= set(changed["model"]) and "rotary_base" not in changed["model"]
    assert "save_interval" in changed["checkpoint"] and changed["parallel"] == []
