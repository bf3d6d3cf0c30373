"""Checks, before anything is certified, that the network as read computes what the module computes.

Bounds hold for the network as read off the exported operators. If an operator were read wrongly, its certificates would be
certificates of another network. So both are evaluated in float64 on the user's images, and any difference beyond rounding is
an error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from maskplan.pipeline.core.errors import InputError, PipelineError
from maskplan.pipeline.models.module_outputs import named_tensors
from maskplan.pipeline.stability.bounds import Floats

if TYPE_CHECKING:
    import torch
    from torch import nn

# A difference of logits counts as rounding up to this share of the image's largest logit, ...
_RELATIVE = 1e-9
# ... plus this share of the norm of the largest values in the network, which biases may have cancelled.
_OF_SIZES = 1e-13


class ReadingCheck:
    """Compares the network as read with the module, batch by batch.

    Attributes:
        largest_difference: Over all batches so far, relative to the largest logit of the image.
    """

    def __init__(self, module: nn.Module, state: Mapping[str, torch.Tensor], *, where: object = None) -> None:
        """Prepare a float64 copy of the module.

        Args:
            module: The architecture; not modified.
            state: The weights and statistics to evaluate it with.
            where: The model's name, for the message.
        """
        self._module = copy.deepcopy(module).cpu().double().eval()
        self._module.load_state_dict({name: value.detach().cpu() for name, value in state.items()})
        self._where = where
        self.largest_difference = 0.0

    def require_equal(self, images: torch.Tensor, logits: Floats, sizes: Floats) -> None:
        """Require the module to compute the same logits.

        Args:
            images: (N, C, H, W).
            logits: (N, K), computed by the network as read on the whole batch.
            sizes: (nodes, N), norms of all values that it computed.

        Raises:
            InputError: The module cannot run on the images.
            PipelineError: The logits differ.
        """
        expected = self._logits(images)
        if expected.shape != logits.shape:
            self._fail(f"logits of shape {logits.shape} instead of {expected.shape}")
        # NaN and infinity would pass every comparison with a bound.
        if not np.isfinite(expected).all() or not np.isfinite(logits).all():
            self._fail("logits that are not finite")
        difference, largest = np.abs(logits - expected).max(axis=1), np.abs(expected).max(axis=1)
        wrong = difference > _RELATIVE * largest + _OF_SIZES * sizes.max(axis=0)
        if wrong.any():
            worst = int((difference - _RELATIVE * largest).argmax())
            self._fail(
                f"logits of {np.count_nonzero(wrong)} of {len(logits)} images differ, by up to {difference[worst]:.3g} where"
                f" the largest is {largest[worst]:.3g}"
            )
        relative = difference / np.maximum(largest, np.finfo(np.float64).tiny)
        self.largest_difference = max(self.largest_difference, float(relative.max(initial=0.0)))

    def _logits(self, images: torch.Tensor) -> Floats:
        import torch

        x = images.detach().cpu().double()
        # In other groups than the network as read: a module whose result for one image depends on the others must not pass.
        # Never alone: many modules drop the batch axis of a single image (`squeeze`).
        groups = [x[:2], x[2:]] if len(x) > 3 else [torch.cat([x, x[:1], x[:1]])]
        try:
            with torch.no_grad():
                # A network that the bounds cover has one output, which its forward may return in a container.
                logits = torch.cat([one for g in groups for one in named_tensors(self._module(g)).values()])
        except Exception as error:  # the module is the user's code
            raise InputError(
                f"the model cannot run on batches of {' and '.join(str(len(group)) for group in groups)} images in float64",
                where=self._where,
                found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                fix="rewrite code that depends on the number of images or on the data type",
            ) from error
        result: Floats = logits.numpy()
        return result[: len(x)] if len(groups) == 1 else result

    def _fail(self, found: str) -> None:
        raise PipelineError(
            "the network as read for the bounds differs from the model, so nothing can be certified",
            where=self._where,
            found=found,
            fix="report the model's operators as a bug of maskplan; measurements of `compare` are not affected",
        )
