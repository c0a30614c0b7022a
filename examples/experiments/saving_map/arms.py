"""The sizes and the arms of the map: what each changes of the shared settings.

A budget is given in tokens per parameter of the dense model, embedding included. Every arm reads that many raw tokens;
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


def _shape(layers: int, width: int) -> Flags:
    return ("--num-layers", str(layers), "--hidden-size", str(width))


SIZES = {
    "small": Size("small", Budget(HERE / "small.toml", 2048), 32),
    "flat": Size("flat", Budget(HERE / "small.toml", 2048, _shape(4, 76)), 32),  # as many parameters as small,
    "deep": Size("deep", Budget(HERE / "small.toml", 2048, _shape(12, 48)), 32),  # to 2%
    "larger": Size("larger", Budget(HERE / "larger.toml", 2048), 32),
    "gpu": Size("gpu", Budget(HERE / "gpu.toml", 2048), 64),
    "rehearsal": Size("rehearsal", Budget(HERE / "rehearsal.toml", 320), 16),
}


def _dense(size: Size, steps: int) -> Flags:
    return ()


def _ltd(size: Size, steps: int) -> Flags:
    return linear_growth(size.start_tokens, steps)


def _ltd_half(size: Size, steps: int) -> Flags:
    return linear_growth(size.start_tokens, steps // 2)


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


def _progressive(size: Size, steps: int) -> Flags:
    """The paper's floor and pace; unlike the others it saves most at the end."""
    return ("--pld-theta", "0.5", "--pld-gamma", f"{100 / steps:g}")


def _drop_backward(size: Size, steps: int) -> Flags:
    return ("--drop-backward-rate", "0.5")


def _mixture_of_depths(size: Size, steps: int) -> Flags:
    return ("--mixture-of-depths-capacity", "0.125")


def _shallow(size: Size, steps: int) -> Flags:
    """Two thirds of the layers: what a model that is less deep does with about as few FLOPs as those that drop."""
    return ("--num-layers", str(size.budget.config((), steps).model.num_layers * 2 // 3))


def _curriculum(size: Size, steps: int) -> Flags:
    """From a quarter of the sequence to all of it in two thirds of the steps."""
    tokens = size.budget.config((), steps).model.seq_length
    return ("--seq-length-curriculum-start-length", str(tokens // 4), "--seq-length-curriculum-steps", _until(steps),
            "--seq-length-curriculum-length-step", str(tokens // 32))


def _small_batch(size: Size, steps: int) -> Flags:
    """Saves nothing: what the curriculum's smaller batches alone do. The same held-out samples but for a few."""
    config = size.budget.config((), steps)
    samples, batches = config.training.micro_batch_size * 3 // 4, config.logging.eval_iters * 4 // 3
    return ("--micro-batch-size", str(samples), "--global-batch-size", str(samples), "--eval-iters", str(batches))


def _window(size: Size, steps: int) -> Flags:
    """Attention that reaches back over a quarter of the sequence, in all layers."""
    return ("--window-size", f"{size.budget.config((), steps).model.seq_length // 4},0")


def _ngram(size: Size, steps: int) -> Flags:
    """A table of pairs with 64 rows for each token of the vocabulary: far more parameters, and no FLOPs."""
    return ("--ngram-rows", str(64 * size.budget.vocab_size))


def _triples(size: Size, steps: int) -> Flags:
    """Triples in as many rows again."""
    return (*_ngram(size, steps), "--ngram-length", "3")


def _conv(size: Size, steps: int) -> Flags:
    """Queries, keys and values that also read the three tokens before their own."""
    return ("--qkv-conv-kernel", "4")


def _ngram_conv(size: Size, steps: int) -> Flags:
    return (*_ngram(size, steps), *_conv(size, steps))


def _linear_decay(size: Size, steps: int) -> Flags:
    """Saves nothing by itself: the learning rate falls on a line and not on a cosine."""
    return ("--lr-decay-style", "linear")


@dataclass(frozen=True)
class Method:
    """How an arm trains.

    Args:
        flags: depend on the model and the number of steps.
        reads: share of the tokens of its steps' samples that it reads; the fewer, the more steps it takes.
    """

    title: str
    flags: Callable[[Size, int], Flags]
    reads: float = 1.0

    def with_muon(self) -> "Method":
        return Method(f"{self.title.partition(',')[0]}, Muon", lambda size, steps: (*MUON, *self.flags(size, steps)),
                      self.reads)


DENSE = Method("dense, AdamW", _dense)
DROPPING_METHODS = {
    "ltd": Method("random-LTD, linear over the run", _ltd),
    "ltd_half": Method("random-LTD to half of the run, linear", _ltd_half),
    "ltd_two_stages": Method("random-LTD in two stages", _two_stages),
    "layer_drop": Method("LayerDrop", _layer_drop),
    "tread": Method("TREAD, half of the tokens for two thirds of the steps", _tread),
    "alternate": Method("alternate tokens, half of them for two thirds of the steps", _alternate),
    "layer_dropout": Method("layer dropout, for two thirds of the steps", _layer_dropout),
    "progressive": Method("progressive layer dropping", _progressive),
    "raptr": Method("RAPTR, four stages from half of the layers to all", _raptr),
    "drop_backward": Method("DropBP, half of the backward passes", _drop_backward),
    "mixture_of_depths": Method("Mixture-of-Depths, an eighth of the tokens in every other layer", _mixture_of_depths),
    "superposition": Method("token superposition in pairs, for a third of the steps", _superposition),
    "curriculum": Method("sequence curriculum, for two thirds of the steps", _curriculum, reads=0.74),
    "shallow": Method("dense with two thirds of the layers", _shallow),
    "window": Method("dense with a window of a quarter of the sequence", _window),
    "ngram": Method("dense with embeddings of pairs", _ngram),
    "ngram3": Method("dense with embeddings of pairs and triples", _triples),
    "ngram_shallow": Method("dense with embeddings of pairs and two thirds of the layers",
                            lambda size, steps: (*_ngram(size, steps), *_shallow(size, steps))),
    "conv": Method("dense with convolutions", _conv),
    "ngram_conv": Method("dense with convolutions and embeddings of pairs", _ngram_conv),
    "ltd_conv": Method("random-LTD with convolutions", lambda size, steps: (*_ltd(size, steps), *_conv(size, steps))),
    "linear_decay": Method("dense with linear decay", _linear_decay),
    "ltd_linear_decay": Method("random-LTD with linear decay",
                               lambda size, steps: (*_ltd(size, steps), *_linear_decay(size, steps))),
    "small_batch": Method("dense with three quarters of the batch", _small_batch, reads=0.75),
}
METHODS = {"dense": DENSE, **DROPPING_METHODS, "muon": DENSE.with_muon(),
           **{f"muon_{name}": method.with_muon() for name, method in DROPPING_METHODS.items()}}


def arm_of(size: Size, name: str, tokens_per_parameter: float) -> Arm:
    """The arm of a model that reads so many tokens per parameter."""
    method = METHODS[name]
    steps = size.steps(tokens_per_parameter / method.reads)
    return Arm(name, method.title, method.flags(size, steps), steps)
