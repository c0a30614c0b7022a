"""Several validation sets, and validation on all of a set."""

import re
from collections.abc import Iterator

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.validation_sets import NAMED_PATH, validation_sets
from megatron_ltd.settings.checks.rules import weighted
from megatron_ltd.settings.flag_reference import flags_by_field


def validation_violations(config: RunConfig) -> Iterator[str]:
    """What is wrong with names of sets, and with weights where each set is read by itself, or whole."""
    data, flags = config.data, flags_by_field()
    values, names = data.validation_paths, data.validation_set_names
    flag = flags["valid_data_path" if data.train_jsonl is None else "valid_jsonl"]
    unnamed = [value for value in values if not NAMED_PATH.fullmatch(value)]
    if 0 < len(unnamed) < len(values):
        yield (f"{flag.spoken(values)}: {unnamed[0]} has no name, others do; write NAME=PATH for each set, and merge "
               "corpora that belong to one (tools/merge_datasets.py)")
    elif not unnamed and len(validation_sets(data)) < len(values):
        yield f"{flag.spoken(values)}: two sets have one name; choose another"
    if data.multiple_validation_sets and weighted(values):
        yield (f"--multiple-validation-sets with {flag.spoken(values)}: weights mix corpora into one set; leave the "
               "weights out")
    elif names is not None and values and data.multiple_validation_sets and (
            len(names) != len(values) or len(set(names)) < len(names) or len(unnamed) < len(values)):
        yield (f"--validation-set-names = {' '.join(names)}: must be one name, each its own, for each of the "
               f"{len(values)} paths of {flag.name}, which then have none (NAME=PATH)")
    yield from (f"--validation-set-names = {name}: a name consists of letters, digits, '_', '-' and '.'; choose such a "
                "name" for name in names or () if not re.fullmatch(r"[\w.-]+", name))
    for path in (flag, flags["data_path"]):
        if config.logging.full_validation and weighted(path.of(config) or ()):
            yield (f"--full-validation with {path.spoken(path.of(config))}: a set that is mixed by weights has no end; "
                   "leave the weights out, or the flag")
