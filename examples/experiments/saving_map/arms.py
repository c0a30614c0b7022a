"""The sizes and the arms of the map: what each changes of the shared settings.

A budget is given in tokens a parameter of the dense model, embedding included. Every arm reads that many raw tokens;
arms that drop spend fewer FLOPs on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.experiments.budget import Arm, Budget, Flags, layer_drop, linear_growth, two_stages

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Size:
    """A model.

    Args:
        start_tokens: that random-LTD keeps at first.
    """

    name: str
    budget: Budget
    start_tokens: int

    def steps(self, tokens_per_parameter: float) -> int:
        return max(4, round(tokens_per_parameter * self.budget.parameters / self.budget.step_tokens))


SIZES = {
    "small": Size("small", Budget(HERE / "small.toml", 2048), 32),
    "larger": Size("larger", Budget(HERE / "larger.toml", 2048), 32),
    "rehearsal": Size("rehearsal", Budget(HERE / "rehearsal.toml", 320), 16),
}


def _dense(size: Size, steps: int) -> Flags:
    return ()


def _ltd(size: Size, steps: int) -> Flags:
    return linear_growth(size.start_tokens, steps)


def _ltd_flops(size: Size, steps: int) -> int:
    return size.budget.flops(_ltd(size, steps), steps)


def _two_stages(size: Size, steps: int) -> Flags:
    return two_stages(size.budget, size.start_tokens, steps, _ltd_flops(size, steps))


def _layer_drop(size: Size, steps: int) -> Flags:
    return layer_drop(size.budget, steps, _ltd_flops(size, steps))


MUON = ("--optimizer", "muon")
DROPPING = 2 / 3
"""Share of the steps in which TREAD, alternate tokens and layer dropout save; the rest trains the whole model."""


def _until(steps: int) -> str:
    return str(round(DROPPING * steps))


def _tread(size: Size, steps: int) -> Flags:
    """Half of the tokens go around all layers but the first and the last."""
    tokens = size.budget.config((), steps).model.seq_length
    return ("--token-drop-policy", "tread", "--random-ltd-length-list", f"0:{tokens // 2},{_until(steps)}:{tokens}")


def _alternate(size: Size, steps: int) -> Flags:
    return ("--alternate-tokens", "2", "--alternate-tokens-steps", _until(steps))


def _layer_dropout(size: Size, steps: int) -> Flags:
    return ("--layer-dropout-rate", "0.8", "--layer-dropout-steps", _until(steps))


def _raptr(size: Size, steps: int) -> Flags:
    """Half, two thirds, five sixths of the layers and at last all, for equal times: 25% fewer on average."""
    layers = size.budget.config((), steps).model.num_layers
    stages = (f"{steps * number // 4}:{max(2, round(layers * (3 + number) / 6))}" for number in range(4))
    return ("--raptr-stages", ",".join(stages))


def _superposition(size: Size, steps: int) -> Flags:
    """Pairs of tokens for a third of the steps, on the same text."""
    return ("--token-superposition", "2", "--token-superposition-steps", str(round(steps / 3)))


def _with_muon(flags: Callable[[Size, int], Flags]) -> Callable[[Size, int], Flags]:
    return lambda size, steps: (*MUON, *flags(size, steps))


@dataclass(frozen=True)
class Method:
    """How an arm trains; its flags depend on the model and the number of steps."""

    title: str
    flags: Callable[[Size, int], Flags]


METHODS = {
    "dense": Method("dense, AdamW", _dense),
    "ltd": Method("random-LTD, linear over the run", _ltd),
    "ltd_two_stages": Method("random-LTD, two stages", _two_stages),
    "layer_drop": Method("LayerDrop", _layer_drop),
    "tread": Method("TREAD, half of the tokens for two thirds of the steps", _tread),
    "alternate": Method("alternate tokens, half of them for two thirds of the steps", _alternate),
    "layer_dropout": Method("layer dropout, for two thirds of the steps", _layer_dropout),
    "superposition": Method("token superposition in pairs, for a third of the steps", _superposition),
    "muon": Method("dense, Muon", _with_muon(_dense)),
    "muon_ltd": Method("random-LTD, Muon", _with_muon(_ltd)),
    "muon_tread": Method("TREAD, Muon", _with_muon(_tread)),
    "muon_alternate": Method("alternate tokens, Muon", _with_muon(_alternate)),
    "muon_superposition": Method("token superposition, Muon", _with_muon(_superposition)),
    "muon_layer_dropout": Method("layer dropout, Muon", _with_muon(_layer_dropout)),
    "raptr": Method("RAPTR, four stages from half of the layers to all", _raptr),
    "muon_raptr": Method("RAPTR, Muon", _with_muon(_raptr)),
}


def arm_of(size: Size, name: str, tokens_per_parameter: float) -> Arm:
    """The arm of a model that reads so many tokens a parameter."""
    steps, method = size.steps(tokens_per_parameter), METHODS[name]
    return Arm(name, method.title, method.flags(size, steps), steps)
