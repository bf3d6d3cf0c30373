"""How far each layer of one model departs from the same layer of another: the record."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerDifference:
    """How far one layer's output departs from the dense model's, over the fixed images.

    Attributes:
        node: The layer that makes it, as both graphs call it.
        op: Its ONNX op.
        tensor: The output's name in the dense graph.
        relative: Norm of the difference over norm of the dense output, all images together; None where not finite.
        cosine_min: Smallest cosine similarity of one image's output; None where not finite.
        channel: Largest norm of one channel's difference, over what a channel's dense output measures on average: one bad
            filter of a wide layer shows here; None where not finite.
    """

    node: str
    op: str
    tensor: str
    relative: float | None
    cosine_min: float | None
    channel: float | None = None


@dataclass(frozen=True)
class DepthReport:
    """Where two models begin to differ.

    Attributes:
        images: How many of the fixed images both ran on.
        tolerance: The relative difference beyond which an output counts as another.
        layers: From input to output, those that both graphs have.
        first: Node of the first layer beyond the tolerance; None where there is none.
        unmatched: Layers that only one of the graphs has.
    """

    images: int
    tolerance: float
    layers: tuple[LayerDifference, ...]
    first: str | None
    unmatched: tuple[str, ...]
