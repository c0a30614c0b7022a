"""Any two policies: their plans compose, or the pair is refused by a message that names both settings; and the command
of each in the documentation."""

import re
from itertools import combinations
from pathlib import Path

import pytest

from megatron_ltd.plan.derived import policies
from megatron_ltd.settings.checks.all import violations
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.token_drop.registry import POLICIES
from tests.policy_settings import ENABLED
from tests.runnable_settings import with_settings

PLAIN = with_settings(random_ltd=False, random_ltd_start_length=None, random_ltd_steps=None, num_layers=6,
                      seq_length=32)
KINDS = {policy.name: policy for policy in POLICIES}


def contradict(first: str, second: str) -> bool:
    """Whether both choose tokens, or both skip layers."""
    kinds = KINDS[first], KINDS[second]
    return all(kind.chooses_tokens for kind in kinds) or all(kind.skips_layers for kind in kinds)


def test_every_policy_has_settings_that_enable_it_alone() -> None:
    assert set(ENABLED) == set(KINDS)
    for name, settings in ENABLED.items():
        config = with_settings(PLAIN, **settings)
        assert [policy.name for policy in policies(config).active] == [name]
        assert violations(config, 1) == []


def test_the_documentation_has_a_command_for_every_policy_that_can_run() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "token_dropping.md").read_text(encoding="utf-8")
    (shared,) = re.findall(r'^    RUN="python -m megatron_ltd.pretrain_gpt (.+?)"$', text, re.MULTILINE | re.DOTALL)
    shown = []
    for flags in re.findall(r"^    \$RUN (.+)$", text, re.MULTILINE):
        config, notes = parse_run_config([*shared.replace("\\\n", " ").split(), *flags.split()])
        assert notes == [] and violations(config, 1) == []
        shown += [policy.name for policy in policies(config).active]
    assert sorted(shown) == sorted([*KINDS, "mixture-of-depths"])


def test_no_two_policies_draw_the_same_numbers() -> None:
    draws = [policy.first_draw for policy in KINDS.values() if hasattr(policy, "first_draw")]
    assert len(draws) == len(set(draws)) and all(draw % 2**16 == 0 for draw in draws)


@pytest.mark.parametrize("pair", list(combinations(sorted(KINDS), 2)), ids=" and ".join)
def test_two_policies_compose_or_are_refused_by_name(pair: tuple[str, str]) -> None:
    first, second = pair
    config = with_settings(PLAIN, **{**ENABLED[second], **ENABLED[first]})
    found = violations(config, 1)
    if contradict(first, second) or found:  # or for a reason of its own
        flags = [KINDS[name].asked_for(config.token_drop).split()[0] for name in pair]
        one_flag = KINDS[first].switch in ENABLED[first].keys() & ENABLED[second].keys()
        assert one_flag or any(all(flag in text for flag in flags) for text in found), found
        return
    alone = [policies(with_settings(PLAIN, **ENABLED[name])) for name in pair]
    for step in range(0, 40, 3):
        plan, parts = policies(config).plan(step), [each.plan(step) for each in alone]
        assert plan.read_tokens == min(part.read_tokens for part in parts)
        for layer, of_layers in zip(plan.layers, zip(*(part.layers for part in parts), strict=True), strict=True):
            # Fewer where a policy keeps a share of the tokens that are read.
            assert 0 < layer.tokens <= min(each.tokens for each in of_layers)
            assert layer.skipped == any(each.skipped for each in of_layers)
            assert layer.backward == all(each.backward for each in of_layers)
            assert layer.token_set is None or layer.attends_to_all == any(each.attends_to_all for each in of_layers)
            scales = of_layers[0].scale * of_layers[1].scale
            assert layer.skipped or layer.scale == pytest.approx(scales)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_mixture_of_depths_composes_with_a_policy_or_is_refused_by_name(name: str) -> None:
    config = with_settings(PLAIN, **ENABLED[name], mixture_of_depths_capacity=0.25)
    found = violations(config, 1)
    if KINDS[name].chooses_tokens:
        flag = KINDS[name].asked_for(config.token_drop)
        assert found == [f"{flag} is given with --mixture-of-depths-capacity = 0.25: a layer's tokens are chosen by "
                         "one policy; keep one of them"]
        return
    assert found == []
    alone = policies(with_settings(PLAIN, **ENABLED[name]))
    for step in range(0, 40, 3):
        plan, other = policies(config).plan(step), alone.plan(step)
        assert plan.read_tokens == other.read_tokens and plan.skipped_layers == other.skipped_layers
        assert [layer.tokens * 4 for layer in plan.layers[1::2]] == [plan.read_tokens] * 3
        assert plan.layers[::2] == other.layers[::2]
        assert [(layer.scale, layer.backward) for layer in plan.layers] == [
            (layer.scale, layer.backward) for layer in other.layers]
