"""What a run is told of the starts that waited for data."""

from dataclasses import dataclass, field


@dataclass
class CalibrationReport:
    """What became of the adapters that start from data.

    Attributes:
        waiting: Names of the layers that have not met a training batch yet; they start as by default.
        calibrated: Names of those that started from their inputs.
        unseen: Names of those that no input but zeros reached when their module ran; they keep the default start.
        rows: Most rows (tokens) that one layer saw, on all ranks.
        host_bytes: Dense weights kept in host memory (or in the file they are mapped from) until the start.
        seconds: Time of looking and starting.
    """

    waiting: list[str]
    host_bytes: int
    calibrated: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    rows: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.calibrated and self.waiting:
            return (
                f"{len(self.waiting)} adapters start with the first training batch; until then {self.host_bytes:,} "
                "bytes of dense weights stay in host memory"
            )
        wait = f"; {', '.join(self.waiting)}: no input yet, will start when one comes" if self.waiting else ""
        unseen = f"; no input but zeros reached {', '.join(self.unseen)}: default start" if self.unseen else ""
        return (
            f"{len(self.calibrated)} adapters started from {self.rows:,} rows of data in {self.seconds:.1f} s, "
            f"{self.host_bytes:,} bytes of dense weights held until then{unseen}{wait}"
        )
