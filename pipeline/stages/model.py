"""The stages on checkpoints: load, permute, mask, bake, recalibrate."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from maskplan.pipeline.core.artifacts import Checkpoint, MaskSet
from maskplan.pipeline.core.choices import LEARNED, MaskMethod
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.files import read_bytes, sha256_of, write_atomically
from maskplan.pipeline.data.dataset import Dataset, ImageFiles
from maskplan.pipeline.data.image_sets import identify, listing_sha256, require_disjoint
from maskplan.pipeline.data.synthetic import synthetic_dataset
from maskplan.pipeline.learning.few_images import few_image_options, learns_from_few
from maskplan.pipeline.learning.options import LearnerFiles
from maskplan.pipeline.masking.maskset import exclude_layers
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.models.batchnorm import recalibrate
from maskplan.pipeline.models.checkpoint import (
    ModelOptions,
    load_architecture,
    load_checkpoint,
    load_module,
    weights_file,
)
from maskplan.pipeline.models.graph_digest import graph_digest
from maskplan.pipeline.models.registry import is_own_file, model_folder, model_identity, model_sources
from maskplan.pipeline.models.sources import all_found, code_sha256, unchanged
from maskplan.pipeline.models.synthesize import synthesize_images
from maskplan.pipeline.models.weight_files import weights_digest
from maskplan.pipeline.pruning.bake import bake
from maskplan.pipeline.pruning.mask import choose_masks, masks_from_file, needs_images, policy_of
from maskplan.pipeline.stages.job import Images, ImageSets, Job, Loaded, PermuteResult, SyntheticImages
from maskplan.pipeline.stages.refine import RAN_DENSE

log = logging.getLogger(__name__)

_STATE, _LOG = "learning.safetensors", "learning"


def load(job: Job) -> tuple[Checkpoint, Job]:
    """Load the dense checkpoint; the job is the same, with the digest of the model's code.

    Weights that a library downloads are identified by their name, those of a file by its digest. A model in a file is
    identified by the graph of its module: it is built in each run, since that file may read anything.
    """
    model = job.model
    file = weights_file(model)
    identity, folder = model_identity(model.model), model_folder(model.model)

    def work() -> Loaded:
        checkpoint = load_checkpoint(model, job.ws.path("dense.safetensors"))
        graph = graph_digest(load_architecture(model, checkpoint)) if is_own_file(model.model) else None
        return Loaded(checkpoint, model_sources(model.model), graph)

    loaded = job.ws.stage(
        "load",
        Loaded,
        {
            "model": identity,
            "weights": weights_digest(file) if file is not None else model.weights,
            "classes": model.classes,
            # Only random weights depend on the seed.
            "seed": model.seed if file is None and model.weights != "pretrained" else None,
            **({} if model.ema is None else {"ema": model.ema}),
            **({"fuse": True} if model.fuse else {}),
            **({"outputs": model.outputs} if model.outputs else {}),
        },
        work,
        intact=lambda known: unchanged(known.sources, folder) and _has_same_graph(model, known),
    )
    return loaded.checkpoint, replace(job, code=_code(loaded, identity))


def _has_same_graph(model: ModelOptions, known: Loaded) -> bool:
    if known.graph is None or not all_found(known.sources, model_folder(model.model)):
        return True
    try:
        graph = graph_digest(load_architecture(model, known.checkpoint))
    except InputError:
        return False  # the stage itself reports it
    except HostError:
        return True  # without PyTorch, only stages that build no module can follow
    return graph == known.graph or graph.torch_version != known.graph.torch_version


def _code(loaded: Loaded, identity: Sequence[str]) -> str:
    """Digest of what the module of the user's own file computes; of the code itself where its graph is unknown."""
    if loaded.graph is None:
        return ""
    text = "" if loaded.graph.exported else code_sha256(identity, loaded.sources)
    return loaded.graph.sha256 + text


def identify_images(job: Job, data: Dataset, dense: Checkpoint) -> Images:
    """Compute the digests of the images; a folder whose listing has not changed is not read again.

    Raises:
        InputError: An image of `val` also shaped an artifact.
    """
    listing = [listing_sha256(s.images) for s in (data.train, data.val) if isinstance(s.images, ImageFiles)]
    sets = job.ws.stage(
        "images",
        ImageSets,
        {
            "listing": listing or "bundled",
            "classes": data.classes,
            "seed": job.model.seed,
            "images": [len(data.train), len(data.select)],
        },
        lambda: ImageSets(*(identify(part, data.classes) for part in (data.train, data.select, data.val))),
    )
    require_disjoint(sets.val, (*sets.shaping, *dense.provenance.image_sets))
    return Images(data, sets)


def synthesize(job: Job, dense: Checkpoint) -> Images:
    """Make images from the statistics of the dense network, in place of images of the user.

    Raises:
        InputError: The network has random weights or no BatchNorm.
    """
    provenance, options, out = dense.provenance, job.recipe.synthesize, job.ws.hidden("synthetic.npy")

    def work() -> SyntheticImages:
        pixels = synthesize_images(load_module(job.model, dense), provenance, options, job.device)
        buffer = io.BytesIO()
        np.save(buffer, pixels, allow_pickle=False)
        return SyntheticImages(out, write_atomically(out, buffer.getvalue()))

    inputs = {"checkpoint": dense.sha256, "options": options, **job.code_key}
    made = job.ws.stage("synthesize", SyntheticImages, inputs, work)
    pixels = np.load(made.path, allow_pickle=False)
    data = synthetic_dataset(pixels, provenance.preprocessing, provenance.labels)
    return Images(data, ImageSets(*(identify(part) for part in (data.train, data.select, data.val))))


def permute(job: Job, dense: Checkpoint, method: MaskMethod) -> PermuteResult:
    """Write `permuted.safetensors`: the same function with its channels in an order of which N:M masks keep more.

    A model whose graph cannot be exported keeps its order; the result says why.
    """
    policy, options = policy_of(job.recipe.mask, method), job.recipe.mask

    def work() -> PermuteResult:
        from maskplan.pipeline.permutation.groups import UnexportableError
        from maskplan.pipeline.permutation.permute import permute as permute_stage

        module, provenance = load_module(job.model, dense), dense.provenance
        files = job.ws.path("permuted.safetensors"), job.ws.path("permutation.safetensors")
        try:
            done = permute_stage(module, provenance, parse_pattern(options.pattern), policy, job.recipe.permute, *files)
        except UnexportableError as error:
            log.warning("%s; the channels keep their order", error.what)
            return PermuteResult(None, f"{error.what}: {error.found}")
        return PermuteResult(done, None)

    inputs = {
        "checkpoint": dense.sha256,
        "pattern": options.pattern,
        "policy": policy,
        "options": job.recipe.permute,
        **job.code_key,
    }
    return job.ws.stage("permute", PermuteResult, inputs, work)


def mask(job: Job, dense: Checkpoint, method: MaskMethod | Path, images: Images | None) -> MaskSet:
    """Choose masks by a method, or take them from a file."""
    out = job.ws.path("masks.safetensors")
    if isinstance(method, Path):
        return job.ws.stage(
            "mask",
            MaskSet,
            {"checkpoint": dense.sha256, "file": sha256_of(method), **job.code_key},
            lambda: _copy_masks(
                masks_from_file(load_module(job.model, dense), dense.provenance, method, converted=out), out
            ),
        )
    options = replace(job.recipe.mask, method=method)
    uses_images = needs_images(options, method)
    data, sets = (images.data, images.sets.shaping) if images and uses_images else (None, ())
    files = LearnerFiles(job.ws.hidden(_STATE), log_dir=job.ws.hidden(_LOG))
    inputs = {"checkpoint": dense.sha256, "options": options, "images": [s.key for s in sets], **job.code_key}
    if method == LEARNED and data is not None and learns_from_few(options.few_images, data):
        # Its defaults replace those of the options.
        inputs["few_images"] = few_image_options(options.learn, len(data.train), options.set_in_recipe)
    return job.ws.stage(
        "mask",
        MaskSet,
        inputs,
        lambda: choose_masks(
            load_module(job.model, dense),
            dense.provenance,
            options,
            out,
            data,
            sets,
            files=files,
            device=job.device,
        ),
    )


def restore_dense(job: Job, masks: MaskSet, names: tuple[str, ...]) -> MaskSet:
    """Write a mask set without the masks of the layers that the engine runs dense."""
    out = job.ws.path("masks.safetensors")
    inputs = {"masks": masks.sha256, "restored": names}
    return job.ws.stage("mask", MaskSet, inputs, lambda: exclude_layers(masks, names, RAN_DENSE, out))


def _copy_masks(masks: MaskSet, out: Path) -> MaskSet:
    if masks.path == out:
        return masks
    return replace(masks, path=out, sha256=write_atomically(out, read_bytes(masks.path)))


def recalibrates(job: Job, images: Images | None) -> bool:
    """Whether BatchNorm statistics are recalibrated: there are images, and the recipe uses some."""
    return images is not None and job.recipe.recalibrate.images > 0


def bake_masks(job: Job, dense: Checkpoint, masks: MaskSet, name: str, out: Path) -> Checkpoint:
    """Bake the masks into the weights."""
    return job.ws.stage(
        f"bake-{name}",
        Checkpoint,
        {"checkpoint": dense.sha256, "masks": masks.sha256, **job.code_key},
        lambda: bake(load_module(job.model, dense), dense.provenance, masks, out),
    )


def recalibrate_statistics(
    job: Job, dense: Checkpoint, baked: Checkpoint, images: Images, name: str, out: Path
) -> Checkpoint:
    """Recalibrate the BatchNorm statistics on training images; `dense` is the checkpoint that the masks were baked into."""
    recipe, train, shaping = job.recipe.recalibrate, images.data.train, (images.sets.train,)
    return job.ws.stage(
        f"recalibrate-{name}",
        Checkpoint,
        {
            "checkpoint": baked.sha256,
            "dense": dense.sha256,
            "images": images.sets.train.key,
            "options": recipe,
            **job.code_key,
        },
        lambda: recalibrate(
            load_module(job.model, baked),
            baked.provenance,
            train,
            recipe,
            out,
            shaping,
            load_module(job.model, dense),
        ),
    )
