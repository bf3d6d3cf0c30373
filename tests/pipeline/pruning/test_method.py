"""Which mask method a name resolves to, with and without images."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from maskplan.pipeline.core.choices import AUTO, DANHOFER2024, LAYERWISE, LEARNED, MAGNITUDE, TRANSPOSABLE
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.pruning.method import DEPLOYABLE, method_or_file, resolve_method


def test_auto_is_learned_with_images_and_magnitude_with_a_warning_without(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve_method(AUTO, has_images=True) == LEARNED
        assert not caplog.records
        assert resolve_method(AUTO, has_images=False) == MAGNITUDE
    assert "no images: magnitude masks" in caplog.text


@pytest.mark.parametrize("method", [MAGNITUDE, TRANSPOSABLE])
def test_methods_without_images_do_not_depend_on_them(method: str) -> None:
    assert resolve_method(method, has_images=True) == resolve_method(method, has_images=False) == method


@pytest.mark.parametrize("method", [LEARNED, LAYERWISE, DANHOFER2024])
def test_methods_that_need_images_are_refused_without(method: str) -> None:
    assert resolve_method(method, has_images=True) == method
    with pytest.raises(InputError, match=f"{method} masks need images"):
        resolve_method(method, has_images=False)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown mask method 'random'") as raised:
        resolve_method("random", has_images=True)
    assert all(method in str(raised.value.fix) for method in (AUTO, *DEPLOYABLE, DANHOFER2024))


def test_masks_are_a_deployable_method_or_a_file(tmp_path: Path) -> None:
    for method in (AUTO, *DEPLOYABLE):
        assert method_or_file(method) == method
    assert method_or_file("masks.safetensors") == Path("masks.safetensors")
    (tmp_path / "masks").touch()
    assert method_or_file(str(tmp_path / "masks")) == tmp_path / "masks"
    for text in (DANHOFER2024, "lerned"):
        with pytest.raises(InputError, match=f"unknown mask method '{text}'"):
            method_or_file(text)
