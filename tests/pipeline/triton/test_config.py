"""Configs for engines, read with Triton's own message where tritonclient is at hand, and held against the ONNX file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from deployable import built, record
from triton_messages import MISSING, environment, kind_of, parsed, read_by_triton

from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.triton.config import Serving, config_text, model_files

ORT = {"backend": "onnxruntime", "compute_capability": None}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float16", "TYPE_FP16"),
        ("float32", "TYPE_FP32"),
        ("float64", "TYPE_FP64"),
        ("bfloat16", "TYPE_BF16"),
        ("int8", "TYPE_INT8"),
        ("uint8", "TYPE_UINT8"),
        ("int32", "TYPE_INT32"),
        ("int64", "TYPE_INT64"),
        ("bool", "TYPE_BOOL"),
    ],
)
def test_types_have_tritons_names(dtype: str, name: str) -> None:
    engine = record(inputs=(TensorSpec("input", dtype, (None, 3)),), outputs=(TensorSpec("y", dtype, (None, 5)),))
    config = parsed(config_text([engine], "net"))
    assert {kind_of(t) for t in (*config.input, *config.output)} == {name}


def test_a_type_that_triton_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="Triton does not support the data type"):
        config_text([record(outputs=(TensorSpec("y", "complex64", (None, 5)),))], "net")


def test_several_inputs_and_inner_dynamic_axes_are_described() -> None:
    engine = record(
        inputs=(TensorSpec("image", "float16", (None, 3, None, None)), TensorSpec("gain", "float32", (None, 1))),
        outputs=(TensorSpec("logits", "float32", (None, 5)), TensorSpec("features", "float16", (None, 7))),
    )
    config = parsed(config_text([engine], "net"))
    assert [(t.name, list(t.dims)) for t in config.input] == [("image", [3, -1, -1]), ("gain", [1])]
    assert [(t.name, list(t.dims)) for t in config.output] == [("logits", [5]), ("features", [7])]
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 16)


@pytest.mark.skipif(environment() is None, reason=MISSING)
@pytest.mark.parametrize("shape", [{}, {"batch": 4}, {"name": 'a "quoted\\ näme\n'}, {"classes": 7}])
def test_tritons_own_message_agrees_with_the_onnx_file(shape: dict[str, Any], tmp_path: Path) -> None:
    engine = built(tmp_path / "engine", **shape)
    config = read_by_triton(config_text([read_engine(engine)], "net"))
    graph = onnx.load(engine).graph
    batched = config.get("max_batch_size", 0) > 0
    assert batched is ("batch" not in shape)
    for written, values in ((config["input"], graph.input), (config["output"], graph.output)):
        for tensor, value in zip(written, values, strict=True):
            dims = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
            assert tensor["name"] == value.name
            assert tensor["data_type"] == {onnx.TensorProto.FLOAT: "TYPE_FP32"}[value.type.tensor_type.elem_type]
            assert [*([-1] if batched else []), *map(int, tensor["dims"])] == dims


@pytest.mark.skipif(environment() is None, reason=MISSING)
def test_tritons_own_message_refuses_what_it_has_no_field_for() -> None:
    """The test above would pass as well if anything were read."""
    with pytest.raises(AssertionError, match="max_batches"):
        read_by_triton("max_batches: 3")


def test_names_are_quoted() -> None:
    name = 'a "quoted\\" näme\n'
    engine = record(inputs=(TensorSpec(name, "float32", (None, 3)),))
    config = parsed(config_text([engine], "net", labels="lab'els.txt"))
    assert config.input[0].name == name
    assert config.model_warmup[0].inputs[name].zero_data
    assert config.output[0].label_filename == "lab'els.txt"


def test_a_plan_is_served_with_every_profile_it_has() -> None:
    """By default Triton uses only the first profile, which here takes single images."""
    config = parsed(config_text([record(profiles=(Profile(1, 1, 1), Profile(1, 8, 32)))], "net"))
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.profile)) == (1, 1, ["0", "1"])
    assert config.max_batch_size == 32
    (group,) = parsed(config_text([record()], "net")).instance_group
    assert list(group.profile) == []
    (group,) = parsed(config_text([record(**ORT)], "net", Serving(instances=3))).instance_group
    assert (group.count, group.kind, list(group.profile)) == (3, 0, [])


def test_warm_up_runs_every_tuned_batch_and_the_largest_on_zeros() -> None:
    engine = record(
        profiles=(Profile(1, 1, 1), Profile(1, 8, 32)),
        inputs=(TensorSpec("image", "float16", (None, 3, 8, 8)), TensorSpec("gain", "float32", (None, 1))),
    )
    samples = parsed(config_text([engine], "net")).model_warmup
    assert [sample.batch_size for sample in samples] == [1, 8, 32]
    assert len({sample.name for sample in samples}) == 3
    for sample in samples:
        assert {k: (kind_of(v), list(v.dims), v.zero_data) for k, v in sample.inputs.items()} == {
            "image": ("TYPE_FP16", [3, 8, 8], True),
            "gain": ("TYPE_FP32", [1], True),
        }


def test_a_fixed_batch_is_warmed_up_whole() -> None:
    engine = record(
        inputs=(TensorSpec("input", "float32", (4, 3, 8, 8)),), outputs=(TensorSpec("logits", "float32", (4, 5)),)
    )
    config = parsed(config_text([engine], "net"))
    (sample,) = config.model_warmup
    assert (sample.batch_size, list(sample.inputs["input"].dims)) == (1, [4, 3, 8, 8])
    assert not config.HasField("dynamic_batching")


def test_warm_up_is_left_out_when_asked_and_where_no_size_is_known() -> None:
    free = record(inputs=(TensorSpec("input", "float32", (None, 3, None, None)),))
    assert not parsed(config_text([free], "net")).model_warmup
    assert not parsed(config_text([record()], "net", Serving(warmup=False))).model_warmup


def test_cuda_graphs_are_for_plans() -> None:
    def graphs(asked: bool | None, **changed: Any) -> bool:
        return bool(
            parsed(config_text([record(**changed)], "net", Serving(cuda_graphs=asked))).optimization.cuda.graphs
        )

    assert [graphs(asked) for asked in (None, True, False)] == [True, True, False]
    assert [graphs(asked, **ORT) for asked in (None, False)] == [False, False]
    with pytest.raises(InputError, match="CUDA graphs require a TensorRT plan"):
        graphs(True, **ORT)


def test_the_queue_delay_is_written() -> None:
    batching = parsed(config_text([record()], "net", Serving(0, (16, 4)))).dynamic_batching
    assert (batching.max_queue_delay_microseconds, list(batching.preferred_batch_size)) == (0, [4, 16])
    assert list(parsed(config_text([record()], "net")).dynamic_batching.preferred_batch_size) == []


@pytest.mark.parametrize("sizes", [(17,), (0,), (8, 400, -3)])
def test_a_batch_that_the_engine_does_not_take_is_not_preferred(sizes: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=f"{max(sizes) if max(sizes) > 16 else min(sizes)}.*: the engine accepts from 1 to 16"
    ):
        config_text([record()], "net", Serving(preferred_batches=sizes))


def test_nothing_is_preferred_of_a_fixed_batch() -> None:
    fixed = {"inputs": (TensorSpec("x", "float32", (4, 3)),), "outputs": (TensorSpec("y", "float32", (4, 5)),)}
    with pytest.raises(InputError, match="none, as the batch is fixed"):
        config_text([record(**fixed)], "net", Serving(preferred_batches=(4,)))


@pytest.mark.parametrize("wrong", [{"queue_delay_us": -1}, {"instances": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Serving(**wrong)  # type: ignore[arg-type]


def test_a_plan_that_refuses_batches_which_triton_makes_is_refused() -> None:
    gaps = record(profiles=(Profile(2, 2, 2), Profile(5, 8, 16)))
    with pytest.raises(InputError, match="from 1 to 16, but no profile covers 1, 3, 4"):
        config_text([gaps], "net")
    config_text([record(**ORT, profiles=gaps.profiles)], "net")  # any batch will do


def test_all_reasons_against_serving_are_reported_at_once() -> None:
    engine = record(**ORT, outputs=(TensorSpec("y", "complex64", (None, 5)), TensorSpec("z", "string", (None, 5))))
    with pytest.raises(InputError) as refused:
        config_text([engine], "net", Serving(cuda_graphs=True, preferred_batches=(99,)))
    for part in ("CUDA graphs", "99", "y complex64", "z string"):
        assert part in str(refused.value)


def test_a_backend_that_triton_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="Triton has no backend"):
        config_text([record(backend="openvino")], "net")


def test_the_files_of_a_backend_that_triton_does_not_know_are_refused() -> None:
    with pytest.raises(InputError, match="Triton has no backend"):
        model_files([record(backend="openvino")])


def test_a_single_number_for_the_whole_batch_makes_triton_batch_nothing() -> None:
    config = parsed(config_text([record(**ORT, outputs=(TensorSpec("y", "float32", ()),))], "net"))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, 3, 8, 8]
    assert list(config.output[0].dims) == [1]
    assert not config.output[0].HasField("reshape")


def test_a_number_for_each_image_is_reshaped() -> None:
    """Without the batch nothing is left, and Triton refuses empty dims."""
    for outputs in (
        (TensorSpec("y", "int64", (None,)),),
        (TensorSpec("y", "int64", (None,)), TensorSpec("z", "int64", (None, 2))),
    ):
        config = parsed(config_text([record(outputs=outputs)], "net"))
        assert config.max_batch_size == 16
        assert list(config.output[0].dims) == [1]
        assert config.output[0].HasField("reshape")
        assert list(config.output[0].reshape.shape) == []
        assert not any(tensor.HasField("reshape") for tensor in (*config.input, *config.output[1:]))


@pytest.mark.parametrize(("shape", "found"), [((), "give y the shape \\[1\\]"), ((None, 0), "y: a dimension is 0")])
def test_what_triton_has_no_shape_for_is_refused(shape: tuple[int | None, ...], found: str) -> None:
    with pytest.raises(InputError, match=found):
        config_text([record(outputs=(TensorSpec("y", "float32", shape),))], "net")


def test_outputs_with_other_rows_than_images_are_not_batched() -> None:
    """Triton would split the detections of a batch among its requests."""
    engine = record(outputs=(TensorSpec("detections", "float32", (None, 7)),), batched=False)
    config = parsed(config_text([engine], "net"))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, 3, 8, 8]
    assert list(config.output[0].dims) == [-1, 7]
    # Images arrive in batches as before, so every profile is open.
    engine = replace(engine, profiles=(Profile(1, 1, 1), Profile(1, 8, 16)))
    (group,) = parsed(config_text([engine], "net")).instance_group
    assert list(group.profile) == ["0", "1"]


def test_a_fixed_batch_has_no_profiles_to_open() -> None:
    fixed = {"inputs": (TensorSpec("x", "float32", (4, 3)),), "outputs": (TensorSpec("y", "float32", (4, 5)),)}
    engine = record(**fixed, profiles=(Profile(4, 4, 4), Profile(4, 4, 4)))
    (group,) = parsed(config_text([engine], "net")).instance_group
    assert list(group.profile) == []


def test_the_versions_to_serve_are_named() -> None:
    assert list(parsed(config_text([record()], "net", versions=(3, 7))).version_policy.specific.versions) == [3, 7]
