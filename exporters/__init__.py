"""PyTorch to ONNX, the walk from an ONNX op to its weight, the 2:4 check, and precision."""
