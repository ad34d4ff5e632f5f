"""The start that waits for data: looking at the first training batch without leaving a trace."""

from lightning_qlora.calibration.calibration import (
    Calibration,
    CalibrationReport,
    calibration_of,
    close_calibrations,
    start_from,
)

__all__ = ["Calibration", "CalibrationReport", "calibration_of", "close_calibrations", "start_from"]
