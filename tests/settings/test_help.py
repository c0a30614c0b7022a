"""--help and a mistake in a command: answered without torch, and with what concerns the recipe."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd import finetune_gpt, finetune_vit, pretrain_bert, pretrain_gpt
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.settings.flag_reference import REQUIRED, all_flags
from megatron_ltd.settings.help import recipe_flags

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"pretrain_gpt": pretrain_gpt.RECIPE, "pretrain_bert": pretrain_bert.RECIPE,
           "finetune_gpt": finetune_gpt.RECIPE, "finetune_vit": finetune_vit.RECIPE}
REFUSED = ("--num-layers 2 --hidden-size 65 --num-attention-heads 4 --lr 1e-3 --train-data-path x --train-epochs 1 "
           "--tokenizer-type NullTokenizer").split()


def printed(capsys: pytest.CaptureFixture[str], recipe: str, *words: str) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        parse_run_config(list(words), RECIPES[recipe].family, finetuning=RECIPES[recipe].finetuning)
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch is an error."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    inherited = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME"}}
    return {**inherited, "PYTHON": sys.executable, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_and_a_mistake_are_answered_without_torch(recipe: str, without_torch: dict[str, str]) -> None:
    for start in ([sys.executable, "-m", f"megatron_ltd.{recipe}"], ["bash", str(ROOT / f"examples/{recipe}.sh")]):
        for words, code, said in ((["--help"], 0, "--num-layers N [required]"), (REFUSED, 20, "--hidden-size = 65")):
            done: Any = subprocess.run([*start, *words], env=without_torch, capture_output=True, text=True, timeout=300,
                                       check=False)
            assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_what_most_runs_need(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, recipe, "--num-layers", "4", "--help")
    shown = {line.split()[0] for line in lines if line.startswith("  --")}
    assert len(lines) <= 150 and 30 <= len(shown) <= 45
    assert {f"--{field.replace('_', '-')}" for field in REQUIRED} - {"--seq-length"} <= shown
    assert "  --lr X [required]" in lines and any("--help-all" in line for line in lines)


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_help_has_the_flags_of_the_recipe_with_their_defaults(
    recipe: str, capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys, recipe, "--help-all")
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    known = recipe_flags(RECIPES[recipe].family, finetuning=RECIPES[recipe].finetuning)
    assert shown == ["--config", "--deepspeed-config", "--recipe", *(flag.name for flag in known)]
    assert "  --adam-beta1 X [0.9]" in lines and "  --exit-signal-handler / --no-exit-signal-handler [on]" in lines


def test_each_flag_is_one_of_some_recipe_and_the_models_do_not_show_each_other_s() -> None:
    flags = {name: {flag.name for flag in recipe_flags(recipe.family, finetuning=recipe.finetuning)}
             for name, recipe in RECIPES.items()}
    assert set.union(*flags.values()) == {flag.name for flag in all_flags()}
    assert {"--mask-prob", "--bert-no-binary-head"} <= flags["pretrain_bert"]
    assert "--img-h" in flags["finetune_vit"] and "--train-jsonl" in flags["finetune_gpt"]
    for name in flags:
        assert ("--mask-prob" in flags[name]) == (name == "pretrain_bert")
        assert ("--img-h" in flags[name]) == (name == "finetune_vit") == ("--tokenizer-type" not in flags[name])
        assert ("--mock-data" in flags[name]) == name.startswith("pretrain")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_commands_in_the_scripts_use_flags_that_help_shows(recipe: str) -> None:
    known = {flag.name for flag in recipe_flags(RECIPES[recipe].family, finetuning=RECIPES[recipe].finetuning)}
    comment = (ROOT / f"examples/{recipe}.sh").read_text().split(f"examples/{recipe}.sh ")[-1].split("\n#\n")[0]
    used = {word for word in comment.replace("#", " ").split() if word.startswith("--")}
    assert len(used) >= 4 and used <= known
