"""Compare two files of a network, whatever it returns: classifiers of images by class, other networks by output."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from maskplan.pipeline.core.artifacts import ImageSet
from maskplan.pipeline.core.reports import ParityReport
from maskplan.pipeline.data.image_sets import identify, require_disjoint
from maskplan.pipeline.parity.compare import compare
from maskplan.pipeline.parity.compare_networks import NetworkOptions, compare_networks, compares_outputs
from maskplan.pipeline.parity.model_files import as_classifier, image_preprocessing, open_network, val_images
from maskplan.pipeline.parity.options import CompareOptions


def compare_files(
    dense: Path, sparse: Path, network_options: NetworkOptions, options: CompareOptions, used: Sequence[ImageSet] = ()
) -> ParityReport:
    """Open both and compare them.

    Args:
        dense: The reference.
        sparse: The file that is to replace it.
        network_options: Data, outputs and metric.
        options: The limits.
        used: Samples that the sparse network was made from.

    Raises:
        InputError: The files cannot be compared, or the data shares samples with `used`.
    """
    with contextlib.ExitStack() as stack:
        networks = [stack.enter_context(open_network(path)) for path in (dense, sparse)]
        if compares_outputs(networks, network_options, options):
            return compare_networks(networks[0], networks[1], network_options, options, used)
        sides = [as_classifier(network) for network in networks]
        preprocessing = image_preprocessing(sides, network_options.images)
        val = val_images(network_options.data, sides)
        image_set = identify(val) if val is not None else None
        if image_set is not None:
            require_disjoint(
                image_set, [*used, *(s for side in sides if side.provenance for s in side.provenance.image_sets)]
            )
        provenances = [side.provenance for side in sides]
        parity = compare(sides[0].classifier, sides[1].classifier, preprocessing, provenances, val, options)
    return replace(parity, images_sha256=image_set.sha256 if image_set is not None else None)
