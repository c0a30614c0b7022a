"""The measurement of pipeline stages: what it runs, and the arithmetic of its table."""

import pytest

from benchmarks import pipeline_balance
from megatron_ltd.plan.layouts.pipeline_costs import pipeline_layers, predict

TINY = ["--layers", "6", "--hidden", "64", "--sequence", "16", "--vocabulary", "64", "--samples", "1", "--stages", "3",
        "--rounds", "1"]


def test_shares_and_speeds_of_the_table() -> None:
    args = pipeline_balance.parse_args(TINY)
    configs = {split: pipeline_balance.settings(args, split) for split in ("uniform", "auto")}
    _, _, uniform, auto = pipeline_balance.table(
        configs, {"uniform": [3.0, 2.0, 1.0], "auto": [2.0, 2.0, 2.0]}).splitlines()
    shares = predict(configs["uniform"], 1, (2, 2, 2)).shares
    cells = [cell.strip() for cell in uniform.split("|")[1:-1]]
    assert cells[:4] == ["uniform", "2 2 2", " ".join(f"{share:.2f}" for share in shares), "1.50 1.00 0.50"]
    difference = max(abs(found / share - 1) for found, share in zip((1.5, 1.0, 0.5), shares, strict=True))
    assert cells[4:] == [f"{difference:.1%}", "1.00", "1.00"]
    assert auto.split("|")[2].split() == [str(count) for count in pipeline_layers(configs["auto"], 1)]
    assert auto.split("|")[-2].strip() == "1.50"


def test_every_stage_of_both_splits_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline_balance.main(TINY) == 0
    printed = capsys.readouterr().out
    assert "6 layers x 64" in printed and "8 tokens kept in layers 2 to 4" in printed
    for name in ("uniform", "auto"):
        (row,) = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
        assert len(row.split("|")[4].split()) == 3
