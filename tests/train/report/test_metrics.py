"""The numbers of a step by hand, and Megatron-LM's lines."""

import json
import math
import re
from dataclasses import replace

import pytest

from megatron_ltd.plan.layouts.cluster import peak_tflops
from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.train.report.metrics import StepReport, held_out_fields, held_out_line
from megatron_ltd.train.result import HeldOut
from tests.plans import plan_of

REPORT = StepReport(
    consumed=Consumed(steps=100, samples=800, tokens=819_200, layer_token_sum=24 * 307_200 + 5, flops=60 * 10**12,
                      full_flops=80 * 10**12),
    total_steps=500, loss=6.1234567, gradient_norm=1.23456, learning_rate=1.5e-4, global_batch_size=8,
    plan=plan_of(1024, 24, 256, range(1, 23)), loss_scale=1.0, skipped=False, step_seconds=0.5, devices=4,
    step_flops=6 * 10**11, full_step_flops=10**12, peak_tflops=2.0)

MEGATRON_FIELDS = ["consumed samples", "elapsed time per iteration (ms)", "throughput per GPU (TFLOP/s/GPU)",
                   "learning rate", "global batch size", "lm loss", "loss scale", "grad norm",
                   "number of skipped iterations", "number of nan iterations"]


def parsed(line: str) -> dict[str, str]:
    """The `name: value` parts of a line, as scripts for Megatron-LM's logs read them."""
    parts = [part.strip() for part in line.split("|")]
    assert parts.pop() == "", "the line ends with a bar"
    return {part.rsplit(":", 1)[0].strip(): part.rsplit(":", 1)[1].strip() for part in parts[1:]}


def test_the_numbers_of_a_step_by_hand() -> None:
    assert REPORT.fields() == {
        "step": 100, "consumed_samples": 800, "consumed_tokens": 819_200, "consumed_layer_tokens": 307_200,
        "consumed_flops": 60 * 10**12,
        "lm_loss": 6.1234567, "grad_norm": 1.23456, "learning_rate": 1.5e-4, "global_batch_size": 8, "kept_length": 256,
        "step_seconds": 0.5, "tokens_per_second": 16_384.0, "model_flops": 6 * 10**11,
        "tflops_per_device": pytest.approx(0.3), "mfu": pytest.approx(0.15), "theoretical_saving": pytest.approx(0.4),
        "cumulative_saving": pytest.approx(0.25), "loss_scale": 1.0, "skipped": False,
    }


def test_a_z_loss_and_a_second_learning_rate_are_reported_where_there_are_any() -> None:
    report = replace(REPORT, z_loss=3.25e-3, decoupled_learning_rate=3e-5)
    assert report.fields() == REPORT.fields() | {"z_loss": 3.25e-3, "decoupled_learning_rate": 3e-5}
    values = parsed(report.line())
    assert values["z loss"] == "3.250000E-03" and values["decoupled learning rate"] == "3.000000E-05"
    assert values["learning rate"] == "1.500000E-04"


def test_where_no_peak_is_known_there_is_no_utilisation() -> None:
    report = replace(REPORT, peak_tflops=None)
    assert report.fields()["mfu"] is None
    assert "MFU" not in report.line() and "MFU: 15.0%" in REPORT.line()


def test_a_step_of_no_measurable_time_is_still_reported() -> None:
    fields = replace(REPORT, step_seconds=0.0).fields()
    assert math.isfinite(fields["tokens_per_second"]) and math.isfinite(fields["tflops_per_device"])


def test_the_line_is_megatrons_with_what_dropping_adds() -> None:
    line = REPORT.line()
    assert "\n" not in line
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +100/ +500 \|", line)
    values = parsed(line)
    assert list(values)[:len(MEGATRON_FIELDS)] == MEGATRON_FIELDS
    assert values == {
        "consumed samples": "800", "elapsed time per iteration (ms)": "500.0",
        "throughput per GPU (TFLOP/s/GPU)": "0.3", "learning rate": "1.500000E-04", "global batch size": "8",
        "lm loss": "6.123457E+00", "loss scale": "1.0", "grad norm": "1.235", "number of skipped iterations": "0",
        "number of nan iterations": "0", "kept length": "256/ 1024", "consumed tokens": "819200",
        "layer tokens": "307200", "tokens/s": "16384", "MFU": "15.0%", "saving": "40.0% (run 25.0%)",
    }


def test_a_classifier_of_images_has_no_lm_loss() -> None:
    values = parsed(replace(REPORT, loss_name="loss").line())
    assert values["loss"] == "6.123457E+00" and "lm loss" not in values


@pytest.mark.parametrize(("loss", "text"), [(math.nan, "NAN"), (math.inf, "INF")])
def test_a_loss_that_is_not_finite_is_printed(loss: float, text: str) -> None:
    report = replace(REPORT, loss=loss, gradient_norm=loss, skipped=True)
    values = parsed(report.line())
    assert values["lm loss"] == text and values["grad norm"] == text.lower()
    assert values["number of nan iterations"] == "1" and values["number of skipped iterations"] == "1"
    assert report.fields()["skipped"] is True


@pytest.mark.parametrize("name", ["validation", "test"])
def test_held_out_sets(name: str) -> None:
    assert held_out_fields(name, 200, HeldOut(2.0)) == {
        "step": 200, f"{name}_loss": 2.0, f"{name}_ppl": pytest.approx(7.38905609893)}
    assert held_out_line(name, 200, HeldOut(2.0)) == (
        f" {name} loss at iteration 200 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 |")


def test_a_sequence_curriculum_and_skipped_layers_have_their_own_numbers_where_there_are_any() -> None:
    report = replace(REPORT, plan=plan_of(512, 24, 256, range(1, 23), skipped=(2, 5)),
                     of_policies={"sequence_length": 512, "skipped_layers": [2, 5]})
    assert report.fields() == REPORT.fields() | {"sequence_length": 512, "skipped_layers": [2, 5],
                                                 "tokens_per_second": 8192.0}
    values = parsed(report.line())
    assert values["sequence length"] == "512" and values["kept length"] == "256/  512"
    assert "sequence length" not in REPORT.line()


def test_the_sentence_order_has_its_own_numbers() -> None:
    report = replace(REPORT, sentence_order_loss=0.5)
    assert report.fields() == REPORT.fields() | {"sentence_order_loss": 0.5}
    assert parsed(report.line())["sop loss"] == "5.000000E-01" and "sop loss" not in REPORT.line()
    assert held_out_fields("test", 1, HeldOut(2.0, 0.5))["test_sentence_order_loss"] == 0.5
    assert held_out_line("test", 1, HeldOut(2.0, 0.5)).endswith("| sop loss value: 5.000000E-01 |")


@pytest.mark.parametrize(("loss", "finite"), [(1e6, True), (math.inf, True), (math.nan, False)])
def test_a_perplexity_beyond_all_numbers_is_no_crash(loss: float, finite: bool) -> None:
    assert math.isfinite(held_out_fields("validation", 1, HeldOut(loss))["validation_ppl"]) is finite
    assert "PPL" in held_out_line("validation", 1, HeldOut(loss))


def test_fields_survive_json() -> None:
    assert json.loads(json.dumps(REPORT.fields())) == REPORT.fields()


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H200", 989.0), ("NVIDIA B200", 2250.0), ("Tesla V100-SXM2-32GB", 125.0), ("NVIDIA GeForce RTX 4090", None),
    ("cpu", None),
])
def test_peaks_of_known_devices(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
