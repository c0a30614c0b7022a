"""A checkpoint as a model that lm-evaluation-harness builds: `--model megatron-ltd --model_args load=DIR,...`."""

from dataclasses import replace
from typing import Any

from lm_eval.api.registry import register_model

from megatron_ltd.checkpoint.saved_settings import TOKENIZER_SETTINGS
from megatron_ltd.data.text.other_tokens import other_tokens
from megatron_ltd.data.text.tokenizer import tokenizer_of_model
from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.bos import choose_bos
from megatron_ltd.lm_eval.harness.model import HarnessModel
from megatron_ltd.lm_eval.scorer import build_scorer
from megatron_ltd.log import Console
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.state import TrainState

SETTINGS = (*TOKENIZER_SETTINGS, "tokenizer_control_symbols")
"""Of the tokenizer."""
BATCH_ROWS = 8
"""Where the harness is to find a size by itself, which it cannot for this model."""


@register_model("megatron-ltd")
class MegatronLtd(HarnessModel):
    """The model of a checkpoint, on the processes that torchrun has started.

    Args:
        load: folder of checkpoints.
        ckpt_step: this step rather than the newest.
        bos_token_id: token with which every text begins; "none" for none; by default what the model's files say.
        overlong: truncate or error.
        batch_size: rows that a data-parallel process runs at once, the harness's --batch_size.
        max_batch_size, device: of the harness, without effect.
        tokenizer: `tokenizer_type` and the like, in place of what the manifest says.
    """

    def __init__(self, load: str, ckpt_step: int | None = None, tensor_model_parallel_size: int = 1,
                 pipeline_model_parallel_size: int = 1, bos_token_id: int | str | None = None,
                 overlong: str = "truncate", batch_size: int | str | None = None,
                 max_batch_size: int | None = None, device: str | None = None, **tokenizer: Any):
        unknown = sorted(set(tokenizer) - set(SETTINGS))
        if unknown:
            raise ConfigError(f"--model_args: there is no {', '.join(unknown)}; choose from load, ckpt_step, "
                              "tensor_model_parallel_size, pipeline_model_parallel_size, bos_token_id, overlong, "
                              f"{', '.join(SETTINGS)}")
        if overlong not in ("truncate", "error"):
            raise ConfigError(f"--model_args overlong={overlong}: must be truncate or error")
        rows = int(str(batch_size)) if str(batch_size).isdigit() else BATCH_ROWS
        scorer = build_scorer(load, step=ckpt_step, tensor_parallel=tensor_model_parallel_size,
                              pipeline_parallel=pipeline_model_parallel_size, micro_batch_size=rows)
        tokens = tokenizer_of_model(replace(scorer.tokenizer_config, **tokenizer), scorer.config.model.vocab_size)
        none_wanted = str(bos_token_id).lower() == "none" and bos_token_id is not None
        trained_here = TrainState.from_counters(scorer.manifest.counters).consumed.tokens > 0
        bos, told = choose_bos(tokens, None if bos_token_id is None or none_wanted else int(bos_token_id), none_wanted,
                               trained_here, scorer.tokenizer_config.bos_token)
        console = Console(Launch.from_environment().rank == 0)
        if told is not None:
            console.line(told)
        other = other_tokens(tokens, scorer.tokenizer_config) if tokenizer else None
        if other is not None:
            console.warn(other)
        super().__init__(scorer, tokens, bos=bos, overlong=overlong, show_progress=console.speaks)
