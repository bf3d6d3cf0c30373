"""What a checkpoint's provenance says of a network's outputs, and how the user corrects it."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskplan.pipeline.core.artifacts import OutputKind, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.checkpoint import (
    ModelOptions,
    load_checkpoint,
    open_checkpoint,
    read_checkpoint,
    rebuild_module,
)

SOURCE = """
import torch
from torch import nn

PREPROCESSING = {"height": 8, "width": 8, "resize": 0}
LABELS = ["a", "b", "c"]


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.stem, self.conv, self.make = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), make

    def forward(self, x):
        return self.make(self.conv(torch.relu(self.stem(x))))


def pixels():
    return Net(lambda y: {"out": y, "score": y.mean((1, 2, 3))})


def classes():
    return Net(lambda y: {"scores": y.mean((2, 3))[:, :3]})


def score():
    return Net(lambda y: y.mean((1, 2, 3))[:, None])


def table():
    return Net(lambda y: y[0].flatten(1))
"""
PIXELS = (OutputKind("out", "logits"), OutputKind("score", "values"))


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(SOURCE)
    return f"{tmp_path / 'nets.py'}:"


def provenance(model: str, *outputs: str, classes: int | None = None) -> Provenance:
    return open_checkpoint(ModelOptions(model, "random", classes, outputs=outputs))[1]


def test_a_classifier_has_classes_whatever_holds_its_logits(spec: str) -> None:
    found = provenance(f"{spec}classes")
    assert (found.classes, found.outputs, found.labels) == (3, (), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("factory", "outputs"),
    [("pixels", PIXELS), ("score", (OutputKind("logits", "values"),)), ("table", (OutputKind("logits", "values"),))],
)
def test_other_networks_have_kinds_of_outputs(spec: str, factory: str, outputs: tuple[OutputKind, ...]) -> None:
    found = provenance(f"{spec}{factory}")
    assert (found.classes, found.outputs, found.labels) == (0, outputs, ())


def test_the_user_says_what_an_output_holds(spec: str) -> None:
    embedding = provenance(f"{spec}classes", "scores:values")
    assert (embedding.classes, embedding.outputs) == (0, (OutputKind("scores", "values"),))
    rows = provenance(f"{spec}pixels", "out:logits:2", "score:values")
    assert rows.outputs == (OutputKind("out", "logits", 2), PIXELS[1])
    for text, told in (("aux:values", "no output is called 'aux'"), ("score:logits", "score:logits of float32 with 1")):
        with pytest.raises(InputError, match="invalid --outputs") as caught:
            provenance(f"{spec}pixels", text)
        assert told in str(caught.value.found)


def test_a_checkpoint_keeps_its_kinds_unless_they_are_given_again(spec: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    load_checkpoint(ModelOptions(f"{spec}pixels", "random", outputs=("out:values",)), file)
    values = (OutputKind("out", "values"), PIXELS[1])
    assert read_checkpoint(file).provenance.outputs == values
    for given, expected in (((), values), (("out:logits",), PIXELS)):
        _, found = open_checkpoint(ModelOptions(f"{spec}pixels", str(file), outputs=given))
        assert found.outputs == expected


def test_the_number_of_classes_is_that_of_the_pixels_too(spec: str) -> None:
    assert provenance(f"{spec}pixels", classes=6).outputs == PIXELS
    for factory in ("pixels", "classes"):
        with pytest.raises(InputError, match="another number of classes"):
            provenance(f"{spec}{factory}", classes=5)


@pytest.mark.slow
def test_torchvision_segmentation_by_name(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    made = load_checkpoint(ModelOptions("lraspp_mobilenet_v3_large", "random"), file)
    assert made.provenance.outputs == (OutputKind("out", "logits"),)
    assert (made.provenance.preprocessing.height, made.provenance.preprocessing.resize) == (512, 0)
    assert rebuild_module(made).state_dict().keys()
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large"):
        found = provenance(name, classes=5)
        assert found.outputs == (OutputKind("out", "logits"), OutputKind("aux", "logits"))
