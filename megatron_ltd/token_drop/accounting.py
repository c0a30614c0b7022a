"""What a run has consumed, in the three units that differ under token dropping.

    raw tokens      samples x tokens of text read of each: the sequence length, or what a sequence curriculum or token
                    superposition makes of it
    layer tokens    the mean over layers of the tokens a layer processed (https://arxiv.org/abs/2211.11586, section 3.4)
    FLOPs           the computation, including attention's quadratic term, embedding and head (`plan/flops.py`)

Layer tokens are kept as an integer, the sum over layers, so that no rounding accumulates over a run.
"""

from dataclasses import dataclass

from megatron_ltd.token_drop.plan import StepPlan


@dataclass(frozen=True)
class Consumed:
    """Counters of a run; all of them are saved in its checkpoints."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    layer_token_sum: int = 0
    """Tokens processed, summed over layers; divide by the number of layers for layer tokens."""
    flops: int = 0
    full_flops: int = 0
    """FLOPs for the same tokens without dropping and without skipped layers."""

    def after_step(self, plan: StepPlan, *, samples: int, sample_flops: int, full_sample_flops: int) -> "Consumed":
        """The counters after one more step of `samples` samples."""
        return Consumed(
            steps=self.steps + 1,
            samples=self.samples + samples,
            tokens=self.tokens + samples * plan.text_tokens,
            layer_token_sum=self.layer_token_sum + samples * plan.layer_token_sum,
            flops=self.flops + samples * sample_flops,
            full_flops=self.full_flops + samples * full_sample_flops,
        )

    def layer_tokens(self, layers: int) -> int:
        return self.layer_token_sum // layers

    @property
    def saving(self) -> float:
        """Share of the FLOPs that dropping has saved so far."""
        return 0.0 if self.full_flops == 0 else 1.0 - self.flops / self.full_flops
