"""Calibration: activation ranges to an ONNX file with explicit Q/DQ that is still 2:4."""
