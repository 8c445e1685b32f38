"""Features as numbers of few bytes, and back: formats, reduction, calibration, fidelity."""
