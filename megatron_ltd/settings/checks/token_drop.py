"""Whether the settings of token dropping, LayerDrop and the sequence curriculum fit each other and the rest."""

from collections.abc import Iterator

from megatron_ltd.config import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import dropped_layers, parse_layer_list, parse_length_list, start_length


def token_drop_violations(config: RunConfig) -> Iterator[str]:
    """Everything about dropped tokens, for settings that pass `value_violations`."""
    drop, seq, tp = config.token_drop, config.model.seq_length, config.parallel.tensor_model_parallel_size
    if drop.policy == "none":
        return
    strata = drop.random_ltd_strata
    try:
        sizes = _kept_lengths(config)
    except ConfigError as error:
        yield str(error)
        sizes = []
    listed = {flag: value for flag, value in (("--random-ltd-start-length", drop.random_ltd_start_length),
                                              ("--random-ltd-steps", drop.random_ltd_steps)) if value is not None}
    if drop.random_ltd_length_list is not None and listed:
        yield (f"--random-ltd-length-list = {drop.random_ltd_length_list} is given with "
               f"{' and '.join(f'{flag} = {value}' for flag, value in listed.items())}: the list is the whole "
               "schedule; keep one of them")
    for flag, size in [("--seq-length", seq), *sizes]:
        if size > seq and flag != "--random-ltd-length-step":
            yield f"{flag} = {size}: more than --seq-length = {seq}; choose at most {seq}"
        if size % strata:
            yield (f"{flag} = {size}: not a multiple of --random-ltd-strata = {strata}; choose "
                   f"{(size // strata + 1) * strata}, or fewer strata")
    if config.parallel.sequence_parallel and strata % tp:
        yield (f"--random-ltd-strata = {strata}: with --sequence-parallel it must be a multiple of "
               f"--tensor-model-parallel-size = {tp}; use --random-ltd-strata {(strata // tp + 1) * tp}")
    yield from _layer_list(config)


def _kept_lengths(config: RunConfig) -> list[tuple[str, int]]:
    """(flag, length) of everything that a kept length follows from."""
    drop = config.token_drop
    if drop.random_ltd_length_list is not None:
        return [("a length of --random-ltd-length-list", length)
                for length in sorted({length for _, length in parse_length_list(drop.random_ltd_length_list)})]
    sizes = [("--random-ltd-start-length", start_length(config))]
    if drop.random_ltd_steps is not None:
        sizes.append(("--random-ltd-length-step", drop.random_ltd_length_step))
    return sizes


def _layer_list(config: RunConfig) -> Iterator[str]:
    text, layers = config.token_drop.random_ltd_layers, config.model.num_layers
    if text is not None:
        yield from _listed_layers("--random-ltd-layers", text, layers)
    elif not dropped_layers(config):
        yield (f"--num-layers = {layers}: no layer drops tokens, since by default the first and the last do not; "
               "give --random-ltd-layers, or leave --random-ltd out")


def _listed_layers(flag: str, text: str, layers: int) -> Iterator[str]:
    """Whether a list names layers that exist, each once."""
    try:
        listed = parse_layer_list(text, flag)
    except ConfigError as error:
        yield str(error)
        return
    outside = sorted({layer for layer in listed if layer >= layers})
    if outside:
        yield (f"{flag} = {text}: layer {outside[0]} does not exist, --num-layers = {layers} are counted "
               f"from 0; name layers up to {layers - 1}")
    doubled = sorted({layer for layer in listed if listed.count(layer) > 1})
    if doubled:
        yield f"{flag} = {text}: layer {doubled[0]} is listed twice; list every layer once"


def layer_drop_violations(config: RunConfig) -> Iterator[str]:
    """Everything about LayerDrop."""
    drop = config.token_drop
    if drop.layer_drop_layers is not None:
        yield from _listed_layers("--layer-drop-layers", drop.layer_drop_layers, config.model.num_layers)
    if drop.layer_drop_rate == 0.0:
        return
    counted = {"--token-budget = layer": config.training.token_budget == "layer" and
               config.training.train_tokens is not None,
               "--layer-token-lr": config.optimizer.layer_token_lr}
    yield from (f"{flag} is given with --layer-drop-rate = {drop.layer_drop_rate}: how many layer tokens a step "
                "processes is then drawn at that step, so lengths cannot be given in them; use steps, samples or raw "
                "tokens" for flag, given in counted.items() if given)


def curriculum_violations(config: RunConfig) -> Iterator[str]:
    """Everything about the sequence curriculum."""
    drop, full = config.token_drop, config.model.seq_length
    start, steps = drop.seq_length_curriculum_start_length, drop.seq_length_curriculum_steps
    given = {"--seq-length-curriculum-start-length": start, "--seq-length-curriculum-steps": steps}
    if start is None or steps is None:
        missing = [flag for flag, value in given.items() if value is None]
        yield from (f"{flag} = {value} is given without {missing[0]}: a sequence curriculum needs a first length and "
                    "the steps until the full one; give both" for flag, value in given.items() if value is not None)
        return
    text = f"--seq-length-curriculum-start-length = {start}"
    if config.model.family == "bert":
        yield (f"{text}: a sequence curriculum cuts samples short, and one of BERT ends with [SEP] and has the tokens "
               "to predict anywhere, which its heads are given as a fixed number of places; leave it out")
    elif config.model.family == "vit":
        yield (f"{text}: a sequence curriculum reads the first tokens of a sample, and an image has no first ones; "
               "leave it out")
    if config.data.train_jsonl is not None:
        yield (f"{text} is given with --train-jsonl: packed prompts would lose their responses; leave it out")
    if start > full:
        yield f"{text}: more than --seq-length = {full}; choose at most {full}"
    yield from _curriculum_units(config, start)


def _curriculum_units(config: RunConfig, start: int) -> Iterator[str]:
    """Every length that the curriculum goes through must divide as whole samples do."""
    drop, parallel = config.token_drop, config.parallel
    units = {f"--random-ltd-strata = {drop.random_ltd_strata}": drop.random_ltd_strata if drop.policy != "none" else 1,
             f"--tensor-model-parallel-size = {parallel.tensor_model_parallel_size}, with --sequence-parallel":
             parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1}
    for flag, size in (("--seq-length-curriculum-start-length", start),
                       ("--seq-length-curriculum-length-step", drop.seq_length_curriculum_length_step)):
        yield from (f"{flag} = {size}: not a multiple of {what}; choose {(size // unit + 1) * unit}"
                    for what, unit in units.items() if size % unit)
