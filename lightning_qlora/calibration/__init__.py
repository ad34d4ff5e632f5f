"""The start that waits for data: looking at the first training batch without leaving a trace."""

from lightning_qlora.calibration.calibration import Calibration, calibration_of, close_calibrations, start_from
from lightning_qlora.calibration.report import CalibrationReport

__all__ = ["Calibration", "CalibrationReport", "calibration_of", "close_calibrations", "start_from"]
