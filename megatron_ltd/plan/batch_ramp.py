"""How many samples a step takes: a pure function of the samples consumed before it.

With `--rampup-batch-size START INCREMENT SAMPLES` (Megatron-LM's rule) the batch starts at START and grows by
INCREMENT each time another equal share of the first SAMPLES samples is consumed:

    consumed     0 ......... r ........ 2r ... SAMPLES ....        r = SAMPLES x INCREMENT / (full - START)
    batch        START       START + I  START + 2I    full

A run that goes on with other batch sizes has read what it has read: what is left of its budget is counted from there.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BatchRamp:
    """The global batch size over a run.

    Args:
        full_samples: the final global batch size.
        start_samples: the first one; None for a constant batch.
        increment_samples: growth at a time; divides `full_samples - start_samples`.
        ramp_samples: consumed samples from which the batch is full.
        done_steps, done_samples: first steps of the run, taken with other batch sizes, and what they read. Each counts
            as having read the mean.
    """

    full_samples: int
    start_samples: int | None = None
    increment_samples: int = 1
    ramp_samples: int = 0
    done_steps: int = 0
    done_samples: int = 0

    def going_on(self, steps: int, samples: int) -> "BatchRamp":
        """The same for a run that goes on with these batch sizes after so many steps, which have read so many
        samples."""
        if samples == self.samples_after(steps):
            return self
        return replace(self, done_steps=steps, done_samples=samples)

    def at(self, consumed_samples: int) -> int:
        """Samples of the step that starts after `consumed_samples`."""
        if self.start_samples is None or consumed_samples >= self.ramp_samples:
            return self.full_samples
        increments = (self.full_samples - self.start_samples) // self.increment_samples
        # Integer arithmetic: the batch of a step must not depend on floating-point rounding.
        grown = consumed_samples * increments // self.ramp_samples
        return self.start_samples + grown * self.increment_samples

    def sizes(self) -> tuple[int, ...]:
        """Every batch size the ramp can pass through, ascending."""
        start = self.full_samples if self.start_samples is None else self.start_samples
        return (*range(start, self.full_samples, self.increment_samples), self.full_samples)

    def phases(self) -> list[tuple[int, int]]:
        """(steps, samples per step) of each stretch of equal batches before the full one."""
        consumed, growing = self.done_samples, self.sizes()[:-1]
        mean, larger = divmod(consumed, max(1, self.done_steps))
        done = ((self.done_steps - larger, mean), (larger, mean + 1))
        stretches = [(steps, size) for steps, size in done if steps]
        for index, size in enumerate(growing, start=1):
            end = -(-index * self.ramp_samples // len(growing))  # consumed samples at which the batch grows
            steps = max(0, -(-(end - consumed) // size))
            if steps:
                stretches.append((steps, size))
            consumed += steps * size
        return stretches

    def samples_after(self, steps: int) -> int:
        """Samples consumed by the first `steps` steps."""
        consumed = 0
        for length, size in self.phases():
            taken = min(steps, length)
            consumed += taken * size
            steps -= taken
        return consumed + steps * self.full_samples

    def steps_covering(self, samples: int) -> int:
        """The smallest number of steps that consume at least `samples`."""
        return self.steps_within(samples - 1) + 1

    def steps_within(self, samples: int) -> int:
        """The largest number of steps that consume at most `samples`."""
        steps = 0
        for length, size in self.phases():
            taken = min(length, samples // size)
            steps += taken
            samples -= taken * size
            if taken < length:
                return steps
        return steps + samples // self.full_samples
