"""CalibrationReport: the status of adapters that are initialized from data."""

from dataclasses import dataclass, field

from torch import Tensor

WORST = 5  # layers that the text names


@dataclass(repr=False)
class CalibrationReport:
    """The status of every adapter that is initialized from data.

    Attributes:
        waiting: Names of the layers before their first step; they have the default initialization.
        host_bytes: Dense weights kept in host memory (or mapped from a file) until the first step.
        calibrated: Names of the layers whose adapter is initialized from their inputs.
        unseen: Names of the layers without an input in the first step, or with inputs of zeros alone; they keep the
            default initialization.
        input_rms: Name -> root mean square of each input, fp32 [in].
        rows: Most rows (tokens) used for one layer, on all ranks; those that checkpointing computes again count twice.
        seconds: Time that the initialization took.
        errors: Name -> share of the layer's output that its 4 bits still change, ||(W - Q - s B A) diag(d)|| / ||W
            diag(d)||.
    """

    waiting: list[str]
    host_bytes: int
    calibrated: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    input_rms: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        if self.waiting and not self.calibrated:
            return (
                f"{len(self.waiting)} adapters will be calibrated in the first step; until then {self.host_bytes:,} "
                "bytes of dense weights stay in host memory"
            )
        worst = sorted(self.errors, key=lambda name: -self.errors[name])[:WORST]
        lists = {
            "largest errors left": [f"{name} {self.errors[name]:.1%}" for name in worst],
            "default initialization, because the first step had no input for them": self.unseen,
            "waiting for the first step of their optimizer": self.waiting,
        }
        parts = [
            f"{len(self.calibrated)} adapters calibrated on {self.rows:,} rows of data in {self.seconds:.1f} s",
            f"{self.host_bytes:,} bytes of dense weights were kept until then",
        ]
        parts += [f"{title}: {', '.join(names)}" for title, names in lists.items() if names]
        return "; ".join(parts)
