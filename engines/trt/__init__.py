"""TensorRT. Only this package imports `tensorrt`, and only inside functions."""
