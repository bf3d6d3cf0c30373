"""Engines behind one protocol: built from ONNX, run, and described by a sidecar file."""
