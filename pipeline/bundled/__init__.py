"""The bundled example: a small residual CNN, its trained weights, and scikit-learn's handwritten digits."""

from pathlib import Path


def weights_path() -> Path:
    """The shipped checkpoint of `digits_resnet`; `python -m pipeline.bundled.train` makes it."""
    return Path(__file__).with_name("digits_resnet.safetensors")
