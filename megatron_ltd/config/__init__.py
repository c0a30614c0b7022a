"""Every setting of a run, as frozen dataclasses.

The literal under a field is its documentation: the command line, `docs/flags.md` and the error messages are
generated from it. A new setting of the model has as its default what the code computed before, since older checkpoints
do not name it. A field `num_layers` is the flag `--num-layers`, with Megatron-LM's name wherever the concept
exists there. Derived values are properties and are never written back. `None` means "not given".

Precedence: the defaults here < `--config file.toml` < flags. `megatron_ltd.settings.cli` builds a `RunConfig`,
`megatron_ltd.settings.checks.all` reports everything wrong with it at once.
"""
