"""Calibration: from activation ranges to an ONNX file with explicit Q/DQ whose weights are still 2:4."""
