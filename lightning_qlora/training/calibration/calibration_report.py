"""CalibrationReport: the status of adapters that are initialized from data."""

from dataclasses import dataclass, field

WORST = 5  # layers that the report names


@dataclass(repr=False)
class CalibrationReport:
    """The status of every adapter that is initialized from data.

    Attributes:
        waiting: Names of the layers without an input yet; they have the default initialization.
        calibrated: Names of the layers whose adapter is initialized from their inputs.
        unseen: Names of the layers whose inputs were all zero; they keep the default initialization.
        rows: Most rows (tokens) used for one layer, on all ranks.
        host_bytes: Dense weights kept in host memory (or mapped from a file) until the calibration.
        seconds: Time of the calibration.
        errors: Name -> share of the layer's output that its 4 bits still change, ||(W - Q - s B A) diag(d)|| / ||W
            diag(d)||.
    """

    waiting: list[str]
    host_bytes: int
    calibrated: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    rows: int = 0
    seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        if not self.calibrated and self.waiting:
            return (
                f"{len(self.waiting)} adapters will be calibrated on the first training batch; until then "
                f"{self.host_bytes:,} bytes of dense weights stay in host memory"
            )
        parts = [
            f"{len(self.calibrated)} adapters calibrated on {self.rows:,} rows of data in {self.seconds:.1f} s",
            f"{self.host_bytes:,} bytes of dense weights were kept until then",
        ]
        worst = sorted(self.errors, key=lambda name: -self.errors[name])[:WORST]
        for what, names in (
            ("largest errors left", [f"{name} {self.errors[name]:.1%}" for name in worst]),
            ("default initialization, because all inputs were zero", self.unseen),
            ("waiting for a first input", self.waiting),
        ):
            parts += [f"{what}: {', '.join(names)}"] if names else []
        return "; ".join(parts)
