"""The sizes in which the experiment comes."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Edition:
    """A model, a budget and a grid.

    Args:
        config: settings that all arms share.
        vocab_size: of the byte-level BPE that is trained on the corpus.
        steps: of the dense run; the budgets of the other arms follow from it.
        seeds: of initialisation, order of the data, and dropping.
        rates: peak learning rates from which that of each arm is chosen.
        grid_share: length of the runs that choose it, as a share of the arm's.
        grid_seed: of those runs.
        start_tokens: kept, or read, at the first step of growing schedules.
        length_step: the sequence curriculum's length is a multiple of this.
        jobs: runs at a time.
    """

    name: str
    config: Path
    vocab_size: int
    steps: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    grid_share: float
    grid_seed: int
    start_tokens: int
    length_step: int
    jobs: int


EDITIONS = {
    "cpu": Edition("cpu", HERE / "cpu.toml", vocab_size=4096, steps=768, seeds=(1, 2, 3),
                   rates=(1e-3, 2e-3, 4e-3, 8e-3), grid_share=0.25, grid_seed=1, start_tokens=64, length_step=64,
                   jobs=2),
    # Twice as long with one seed: does what the shorter runs show last?
    "cpu-long": Edition("cpu-long", HERE / "cpu.toml", vocab_size=4096, steps=1536, seeds=(1,), rates=(2e-3, 4e-3),
                        grid_share=1 / 8, grid_seed=1, start_tokens=64, length_step=64, jobs=2),
    "gpu": Edition("gpu", HERE / "gpu.toml", vocab_size=16384, steps=800, seeds=(1,),
                   rates=(5e-4, 1e-3, 2e-3, 4e-3), grid_share=0.125, grid_seed=1, start_tokens=128, length_step=128,
                   jobs=1),
    # A rehearsal: seconds a run, nothing to learn from its numbers.
    "rehearsal": Edition("rehearsal", HERE / "rehearsal.toml", vocab_size=320, steps=24, seeds=(1, 2),
                         rates=(1e-3, 2e-3), grid_share=0.5, grid_seed=1, start_tokens=16, length_step=16, jobs=2),
}
