"""The longest sequence that a card has memory for: `lightning-qlora plan MODEL --sequence_length longest`.

A step is counted at a few lengths. Its peak is the largest of some sums, each of which grows along a straight line, so
the next length to try is where the line between one that fits and one that does not meets the memory.
"""

from typing import Any, NamedTuple

from lightning_qlora.config import StrategyName
from lightning_qlora.texts import size_text
from lightning_qlora.tools.activations import positions_of
from lightning_qlora.tools.memory_estimate import PlannedRun, bytes_of_process

FIRST = 16_384  # the first length that is counted
CLOSE = 0.005  # share by which an answer may be too short
MOST_COUNTS = 12
DEVICE, HOST, POSITIONS = "memory of the device", "memory of the host", "positions of the model"


class LongestSequence(NamedTuple):
    """The longest sequence with one kind of gradient checkpointing, in tokens; 0: none fits."""

    gradient_checkpointing: Any
    tokens: int
    limit: str
    host_bytes: int  # of inputs that wait on the host

    def __str__(self) -> str:
        name = f"gradient_checkpointing={str(self.gradient_checkpointing).lower()}"
        host = f"{size_text(self.host_bytes)} on the host" if self.host_bytes else ""
        return f"{name:32}{self.tokens:>11,} tokens  limit: {self.limit:23} {host}".rstrip()


def longest_sequences(
    run: PlannedRun, batch_size: int, available: float, devices: int = 1, strategy: StrategyName = "ddp"
) -> list[LongestSequence]:
    """The longest sequences of a run that may use so many bytes on each device.

    "auto" has that of "offload", because it does the same where nothing else fits.

    Raises:
        ValueError: If the activations can't be counted.
    """
    recomputed = _longest(run, True, batch_size, available, devices, strategy)
    offload = _longest(run, "offload", batch_size, available, devices, strategy)
    return [recomputed, offload._replace(gradient_checkpointing="auto"), offload]


def _longest(
    run: PlannedRun, setting: Any, batch_size: int, available: float, devices: int, strategy: StrategyName
) -> LongestSequence:
    run.set_gradient_checkpointing(setting)
    positions = positions_of(run.model)
    longest = LongestSequence(setting, 0, DEVICE, 0)
    # Lengths that fit and do not fit, with their bytes:
    shorter: tuple[int, float] | None = None
    longer: tuple[int, float] | None = None
    length = min(FIRST, positions or FIRST)
    for _ in range(MOST_COUNTS):
        estimate = run.estimate(batch_size, length)
        if not estimate.counted_activations:
            raise ValueError("sequence_length='longest': the activations of this model can't be counted.")
        needed = bytes_of_process(run, estimate, devices, strategy)
        before = longer
        shorter = start = shorter or (0, needed - estimate.parts["activations"])
        if needed <= available:
            limit = POSITIONS if length == positions else HOST if run.is_host_full else DEVICE
            longest = LongestSequence(setting, length, limit, estimate.host_bytes)
            shorter = length, needed
        else:
            longer = length, needed
        other = longer or start
        per_token = (other[1] - shorter[1]) / (other[0] - shorter[0])
        # A bit less than the line says, so that the count of it fits.
        next_length = (shorter[0] + (available - shorter[1]) / per_token) * (1 - CLOSE / 2)
        if before is not None and longer is not before:  # two in a row did not fit: there is a step in the line
            next_length = (shorter[0] + next_length) / 2
        length = min(int(next_length), positions or int(next_length))
        if (length if longer is None else min(length, longer[0])) <= shorter[0] * (1 + CLOSE):
            break
    return longest
