"""Which checkpoint is loaded, and which are deleted."""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_ltd.checkpoint import layout
from megatron_ltd.checkpoint.layout import (
    TRACKER_NAME,
    checkpoint_path,
    checkpoints,
    clear_leftovers,
    defect,
    find_checkpoint,
    holds_nothing,
    read_tracker,
    set_aside_path,
    superseded,
    write_tracker,
)
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.errors import CheckpointError
from tests.checkpoint.layouts import save_plain


def save_steps(folder: Path, *steps: int, retain_interval: int | None = None) -> Path:
    writer = CheckpointWriter(folder, None, retain_interval=retain_interval)
    for step in steps:
        writer.save(step, {"model.weight": torch.ones(2)}, config={}, counters={})
    return folder


def test_the_tracker_is_one_number_as_in_megatron(tmp_path: Path) -> None:
    save_steps(tmp_path, 1000)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1000\n"
    assert sorted(os.listdir(tmp_path / "iter_0001000")) == ["manifest.json", "rank-00000.safetensors"]


def test_the_tracker_decides_so_that_a_user_may_go_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    save_steps(tmp_path, 1, 2, 3)
    assert find_checkpoint(tmp_path).name == "iter_0000003"
    (tmp_path / TRACKER_NAME).write_text("2")
    assert find_checkpoint(tmp_path).name == "iter_0000002"
    assert find_checkpoint(tmp_path, step=1).name == "iter_0000001"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "x", "-1", "3.5", "9", "1" * 100, "\x00", "२", "../iter_0000001"])
def test_a_tracker_that_names_nothing_is_passed_over_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str,
) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / TRACKER_NAME).write_text(text)
    assert find_checkpoint(tmp_path).name == "iter_0000002"
    assert str(tmp_path / TRACKER_NAME) in capsys.readouterr().err


def test_a_missing_tracker_or_one_that_is_no_file_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    save_steps(tmp_path, 1, 2)
    tracker = tmp_path / TRACKER_NAME
    tracker.unlink()
    assert find_checkpoint(tmp_path).name == "iter_0000002"
    assert "is missing" in capsys.readouterr().err
    os.mkfifo(tracker)
    assert find_checkpoint(tmp_path).name == "iter_0000002"
    tracker.unlink()
    (tmp_path / "other").write_text("1")
    tracker.symlink_to(tmp_path / "other")
    assert find_checkpoint(tmp_path).name == "iter_0000002"


def test_without_a_tracker_incomplete_checkpoints_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    save_steps(tmp_path, 1, 2, 3, 4)
    (tmp_path / TRACKER_NAME).unlink()
    (tmp_path / "iter_0000004" / "manifest.json").unlink()
    os.truncate(tmp_path / "iter_0000003" / "rank-00000.safetensors", 10)
    (tmp_path / "iter_0000009").symlink_to(tmp_path / "iter_0000001")
    shutil.copytree(tmp_path / "iter_0000002", tmp_path / ".tmp-iter_0000007")
    assert find_checkpoint(tmp_path).name == "iter_0000002"
    warnings = capsys.readouterr().err
    assert "iter_0000004/manifest.json is missing" in warnings
    assert "iter_0000003/rank-00000.safetensors has 10 bytes, expected" in warnings


def test_a_damaged_checkpoint_that_the_tracker_names_is_not_replaced_by_another(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "iter_0000002" / "manifest.json").write_text("")
    assert find_checkpoint(tmp_path).name == "iter_0000002"


def test_it_is_an_error_if_there_is_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint .*is missing.*--save named.*To start afresh"):
        find_checkpoint(tmp_path)
    save_steps(tmp_path, 4, 6)
    with pytest.raises(CheckpointError, match="--ckpt-step = 5 is not in .* Newest steps there: 4, 6."):
        find_checkpoint(tmp_path, step=5)


def test_a_folder_is_empty_for_a_run_if_it_has_no_trace_of_a_checkpoint(tmp_path: Path) -> None:
    assert holds_nothing(tmp_path / "missing")
    (tmp_path / "metrics.jsonl").write_text("")
    assert holds_nothing(tmp_path)
    write_tracker(tmp_path, 3)
    assert not holds_nothing(tmp_path)
    (tmp_path / TRACKER_NAME).unlink()
    (tmp_path / "iter_0000003").mkdir()
    assert not holds_nothing(tmp_path)


def test_steps_of_any_length_are_ordered_as_numbers(tmp_path: Path) -> None:
    save_steps(tmp_path, 9_999_999, 10_000_000)
    assert list(checkpoints(tmp_path)) == [9_999_999, 10_000_000]
    assert read_tracker(tmp_path) == 10_000_000
    assert find_checkpoint(tmp_path).name == "iter_10000000"


def test_a_checkpoint_set_aside_by_a_killed_run_is_found_and_put_back(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "iter_0000001").rename(set_aside_path(tmp_path, 1))
    assert find_checkpoint(tmp_path) == set_aside_path(tmp_path, 1)
    clear_leftovers(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000001"
    assert defect(tmp_path / "iter_0000001") is None


def test_leftovers_are_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    save_dir, precious = tmp_path / "save", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("")
    save_steps(save_dir, 1)
    (save_dir / ".tmp-iter_0000002").mkdir()
    (save_dir / ".tmp-iter_0000002" / "link").symlink_to(precious)
    (save_dir / ".trash-iter_0000003").mkdir()
    (save_dir / ".tmp-iter_0000004").symlink_to(precious)
    (save_dir / ".notes").mkdir()
    clear_leftovers(save_dir)
    assert sorted(os.listdir(save_dir)) == [".notes", ".tmp-iter_0000004", "iter_0000001", TRACKER_NAME]
    assert os.listdir(precious) == ["file"]


def test_retention_keeps_multiples_and_the_newest_two(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(10, 101, 10), retain_interval=40)
    assert list(checkpoints(tmp_path)) == [40, 80, 90, 100]


def test_a_save_does_not_look_at_the_checkpoints_that_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(10, 101, 10))
    with mock.patch.object(layout, "defect", wraps=layout.defect) as looks:
        assert superseded(tmp_path, 100, 10) == []
        assert [call.args[0].name for call in looks.call_args_list] == ["iter_0000100", "iter_0000090"]
        assert superseded(tmp_path, 100, 30) == [checkpoint_path(tmp_path, step) for step in (10, 20, 40, 50, 70, 80)]


def test_retention_never_counts_incomplete_or_later_checkpoints_nor_touches_them(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, 8, 9)
    (tmp_path / "iter_0000003" / "rank-00000.safetensors").unlink()
    assert [path.name for path in superseded(tmp_path, 4, 100)] == ["iter_0000001"]
    save_steps(tmp_path, 5, retain_interval=100)
    assert list(checkpoints(tmp_path)) == [3, 4, 5, 8, 9]


def test_a_link_in_place_of_a_checkpoint_is_neither_loaded_nor_deleted(tmp_path: Path) -> None:
    save_dir, elsewhere = tmp_path / "save", tmp_path / "elsewhere"
    save_steps(elsewhere, 1)
    save_steps(save_dir, 2)
    (save_dir / "iter_0000001").symlink_to(elsewhere / "iter_0000001")
    save_steps(save_dir, 3, 4, retain_interval=100)
    assert list(checkpoints(save_dir)) == [3, 4]
    assert os.path.islink(save_dir / "iter_0000001")
    assert defect(elsewhere / "iter_0000001") is None
    with pytest.raises(CheckpointError, match="--ckpt-step = 1 is not in"):
        find_checkpoint(save_dir, step=1)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    save_plain(tmp_path, 1, {"model.weight": torch.zeros(7)})
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", TRACKER_NAME]
    assert (tmp_path / "iter_0000001" / "manifest.json").read_text().count("[\n    7\n") == 1


def test_facts_that_json_cannot_hold_are_a_mistake_on_every_rank(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, None)
    with pytest.raises(ValueError, match="JSON"):
        writer.save(1, {}, config={}, counters={"loss": float("nan")})
    with pytest.raises(CheckpointError, match="float8_e4m3fn, which a checkpoint cannot hold"):
        writer.save(1, {"x": torch.zeros(2).to(torch.float8_e4m3fn)}, config={}, counters={})
    assert holds_nothing(tmp_path)
