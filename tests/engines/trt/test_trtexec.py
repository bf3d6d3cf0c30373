"""trtexec's command lines, and its plans taken in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from fake_tensorrt import Control
from small_net import small_net

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine, write_sidecar
from maskplan.engines.trt.build import FP32_NOTE
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.trtexec import trtexec_lines
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.cli.app import main
from maskplan.pipeline.core.artifacts import LayerSparsity, Profile
from maskplan.pipeline.core.errors import InputError

PLAN = b"a plan" * 200
# A user's, for a convolution 3x3.
SPARSE_KERNEL = (
    "sm80_xmma_fprop_avdt_sparse_int8int8_tilesize64x64x64_tapsperload3_threadspercta128_r3s3_u1v1_scalebias_relu"
)
PROFILES = (Profile(1, 1, 1), Profile(1, 8, 16))
DEFAULTS_OF_11 = {"--useCudaGraph", "--useSpinWait", "--separateProfileRun", "--noDataTransfers"}


def lines(source: Path, major: int, *, sparse: bool = True, **options: object) -> list[list[str]]:
    chosen = TrtOptions(**options)  # type: ignore[arg-type]
    found = trtexec_lines(describe_onnx(source), PROFILES, sparse, chosen, source.with_name("e.plan"), major)
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("major", [10, 11])
def test_a_line_for_each_profile(source: Path, major: int) -> None:
    first, second = lines(source, major)
    assert first[:2] == ["trtexec", f"--onnx={source}"]
    assert f"--saveEngine={source.with_name('e.b1.plan')}" in first
    assert f"--exportLayerInfo={source.with_name('e.b8.plan')}.layers.json" in second
    shapes = ["--minShapes=input:1x3x8x8", "--optShapes=input:8x3x8x8", "--maxShapes=input:16x3x8x8"]
    assert set(shapes) <= set(second)
    assert {"--sparsity=enable", "--noTF32", "--profilingVerbosity=detailed", "--builderOptimizationLevel=3"} <= set(
        first
    )
    assert not any("force" in word for word in first)


def test_versions_have_their_own_spelling_and_time_alike(source: Path) -> None:
    older, newer = (set(lines(source, major)[0]) for major in (10, 11))
    assert older - newer == {"--stronglyTyped", *DEFAULTS_OF_11}
    assert newer <= older


@pytest.mark.parametrize("given", [[], ["--profile", "4"], ["--profile", "4", "--profile", "4:4:4"]])
def test_a_fixed_batch_has_one_line_without_shapes(
    given: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Static graphs take no shapes; the plan has the name given."""
    fixed = small_net(source.with_name("fixed.onnx"), "float16", batch=4)
    command = ["build", str(fixed), "--print-trtexec", "11", "-o", str(source.with_name("e.plan"))]
    assert main([*command, *given]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert f"--saveEngine={source.with_name('e.plan')}" in words
    assert not [word for word in words if "Shapes" in word]


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"size": "side"}, r"input is \(None, 3, None, None\): only the batch may be dynamic"),
        ({"batch": 4}, "input has a fixed batch of 4, not 1:1:1, 1:8:16"),
    ],
)
def test_a_graph_that_our_builder_would_refuse_has_no_line(shape: dict[str, Any], says: str, source: Path) -> None:
    model = small_net(source.with_name("other.onnx"), "float16", **shape)
    with pytest.raises(InputError, match=says):
        lines(model, 10)


def test_profiles_tuned_for_one_batch_have_plans_of_their_own(source: Path) -> None:
    profiles = (Profile(1, 8, 8), Profile(1, 8, 32), Profile(1, 1, 1))
    found = trtexec_lines(describe_onnx(source), profiles, True, TrtOptions(), Path("e.plan"), 11)
    saved = [word for line in found for word in shlex.split(line) if word.startswith("--saveEngine=")]
    assert saved == [f"--saveEngine=e.b{label}.plan" for label in ("1-8-8", "1-8-32", "1")]


@pytest.mark.parametrize("sparse", [True, False])
def test_a_graph_in_fp32_carries_the_builders_warning(sparse: bool, source: Path) -> None:
    model = describe_onnx(small_net(source.with_name("wide.onnx"), "float32"))
    found = trtexec_lines(model, PROFILES, sparse, TrtOptions(), Path("e.plan"), 10)
    assert [line for line in found if not line.startswith("trtexec ")] == ([f"# {FP32_NOTE}"] if sparse else [])
    assert found[0].startswith("#") == sparse


@pytest.mark.parametrize("refittable", [True, False])
def test_a_plan_without_weights_takes_the_same_ones_back_unless_any_are_to_do(refittable: bool, source: Path) -> None:
    """trtexec's help: --stripWeights is for identical weights, with --refit for others. Tinstalled is nothing to time."""
    found = set(lines(source, 10, strip_plan=True, refittable=refittable)[0])
    assert {"--stripWeights", "--skipInference"} <= found
    assert ("--refit" in found) == refittable
    assert not found & DEFAULTS_OF_11


def test_options_become_flags(source: Path) -> None:
    found = set(
        lines(
            source,
            10,
            sparse=False,
            tf32=True,
            optimization_level=5,
            workspace_bytes=3 * 2**20,
            timing_cache=Path("a b.cache"),
            version_compatible=True,
            hardware_compatible=True,
            refittable=True,
            strip_plan=True,
        )[0]
    )
    assert "--noTF32" not in found
    assert {
        "--sparsity=disable",
        "--builderOptimizationLevel=5",
        "--memPoolSize=workspace:3M",
        "--timingCacheFile=a b.cache",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--refit",
        "--stripWeights",
    } <= found


def test_the_command_prints_them_and_builds_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(source), "--print-trtexec", "10", "--profile", "1:4:8", "--sparse"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("trtexec ")
    assert "--stronglyTyped" in line
    assert {p.name for p in source.parent.iterdir()} == {source.name}
    assert main(["build", str(source), "--print-trtexec", "9"]) == 3


def test_all_builds_of_three_kinds_are_printed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = small_net(source.with_name("dense.onnx"), "float16"), source.with_name("out")
    command = ["build", str(source), "--three-way", str(dense), "--print-trtexec", "10", "-o", str(out)]
    assert main([*command, "--profile", "1:8:8"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"mkdir -p {out}"
    kinds = {"dense": (dense, "disable"), "pruned": (source, "disable"), "sparse": (source, "enable")}
    expected = [
        {f"--onnx={model}", f"--sparsity={flag}", f"--saveEngine={out / f'{kind}.{number}.plan'}"}
        for number in range(3)
        for kind, (model, flag) in kinds.items()
    ]
    found = [set(shlex.split(line)) for line in rest]
    assert len(found) == len(expected)
    assert all(words <= line for words, line in zip(expected, found, strict=True))
    assert not out.exists()
    assert main(command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("mkdir")] == [f"mkdir -p {out}/b{opt}" for opt in (1, 8)]
    assert len(shown) == 20
    assert main([*command, "--timing-cache", "c"]) == 3
    assert "show no spread" in capsys.readouterr().err


def layer(**changed: Any) -> dict[str, Any]:
    """Written by hand in the documented keys."""
    return {
        "Name": "mix",
        "LayerType": "CaskConvolution",
        "OutMaps": 16,
        "Groups": 1,
        "TacticName": SPARSE_KERNEL,
        "HasSparseWeights": 1,
        "Metadata": "[ONNX Layer: mix]",
        "Inputs": [{"Name": "b", "Dimensions": [1, 16, 8, 8], "Format/Datatype": "Int8"}],
        **changed,
    }


@pytest.fixture
def take_in(source: Path) -> Callable[..., int]:
    """Run the import of a plan into `e.plan`: with the layers given, and options in place of the usual ones."""

    def run(*layers: Any, model: Path = source, text: str | None = None, plan: bytes = PLAN, **changed: Any) -> int:
        paths = source.with_name("theirs.plan"), source.with_name("theirs.json")
        paths[0].write_bytes(plan)
        paths[1].write_text(text or json.dumps({"Layers": list(layers), "Bindings": ["input", "logits"]}))
        usual = {"import": paths[0], "layer_info": paths[1], "trt_version": "10.13.3.9", "profile": "1:8:16"}
        told = {**usual, "compute_capability": "9.0", "output": source.with_name("e.plan"), **changed}
        options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in told.items() if value is not None]
        return main(["build", str(model), *(word for option in options for word in option)])

    return run


def test_a_plan_of_trtexec_is_taken_in_with_its_evidence(
    take_in: Callable[..., int], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take_in(layer()) == 0
    record = read_engine(source.with_name("e.plan"))
    assert record.path.read_bytes() == PLAN
    assert (record.runtime_version, record.compute_capability) == ("10.13.3.9", "9.0")
    assert record.profiles == (Profile(1, 8, 16),)
    assert [(x.name, x.state, x.kernel) for x in record.layers] == [("mix", "sparse", SPARSE_KERNEL)]
    assert (record.refittable, record.strip_plan) == (False, False)
    assert main(["inspect", str(record.path)]) == 0
    text = capsys.readouterr().out
    assert "1 layers sparse, 0 dense, 0 unknown" in text
    assert "note       built by trtexec: the build options are as stated, not verified" in text
    assert main(["build", str(source), "--import", str(source.with_name("theirs.plan"))]) == 3
    assert "no --layer-info, --trt-version, --profile" in capsys.readouterr().err


def test_what_trtexec_was_given_comes_into_the_record(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, info = source.with_name("theirs.plan"), source.with_name("theirs.json")
    plan.write_bytes(PLAN)
    info.write_text(json.dumps({"Layers": [layer(LayerType="CaskConvolution")]}))
    told = ["--import", str(plan), "--layer-info", str(info), "--trt-version", "10.3.0", "--profile", "8"]
    flags = ["--strip-plan", "--refittable", "--hardware-compatible", "--version-compatible", "--no-sparse"]
    assert main(["build", str(source), *told, *flags]) == 0
    record = read_engine(source.with_name("net.engine.plan"))
    assert (record.strip_plan, record.refittable, record.sparse_weights) == (True, True, False)
    assert (record.hardware_compatible, record.version_compatible, record.compute_capability) == (True, True, None)
    capsys.readouterr()
    assert main(["inspect", str(record.path)]) == 0
    flags_line = "version compatible, hardware compatible, refittable, stripped of weights"
    assert f"flags      {flags_line}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"trt_version": "10.13"}, "TensorRT version '10.13'"),
        ({"trt_version": "v10.13.3"}, "TensorRT version 'v10.13.3'"),
        ({"trt_version": "10.13.3.9.1"}, "TensorRT version '10.13.3.9.1'"),
        ({"compute_capability": "90"}, "compute capability '90'"),
        (
            {"compute_capability": "sm_90", "trt_version": "latest"},
            "'latest', expected a form such as 10.13.3.9; compute",
        ),
        ({"profile": None}, "found: no --profile"),
        ({"plan": b"a plan"}, "too small for a plan"),
        ({"text": '{"Layers": '}, "the layer information cannot be read"),
        ({"text": "{}"}, "the layer information cannot be read"),
        ({"text": "[]"}, "the layer information cannot be read"),
        ({"text": '{"Layers": []}'}, "belongs to another model: it has no node of this one"),
        ({"text": json.dumps({"Layers": [layer(Name="other", Metadata="")]})}, "found: other; "),
    ],
)
def test_what_cannot_be_is_not_taken_in(
    changed: dict[str, Any],
    says: str,
    take_in: Callable[..., int],
    source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert take_in(layer(), **changed) == 3
    message = capsys.readouterr().err
    assert says in message
    if "text" in changed:
        assert f"where: {source.with_name('theirs.json')}" in message
    assert not source.with_name("e.plan").exists()
    assert not source.with_name("e.plan.json").exists()


def test_several_profiles_are_not_one_plan_of_trtexec(
    take_in: Callable[..., int], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take_in(layer()) == 0
    source.with_name("e.plan").unlink()
    told = ["--import", "theirs.plan", "--layer-info", "theirs.json", "--trt-version", "10.13.3.9"]
    assert main(["build", str(source), *told, "--profile", "1", "--profile", "1:8:8"]) == 3
    assert "profiles 1:1:1, 1:8:8, expected exactly one" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "other"), [("import", "layer_info"), ("layer_info", "import")])
def test_a_missing_file_is_named(
    missing: str, other: str, take_in: Callable[..., int], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = source.with_name("gone")
    assert take_in(layer(), **{missing: gone}) == 3
    message = capsys.readouterr().err
    assert f"file not found\n  where: {gone}" in message
    assert "use the files that trtexec wrote" in message
    assert not source.with_name("e.plan").exists()


@pytest.mark.parametrize(
    ("shape", "profile", "code"),
    [
        ({"batch": 4}, None, 0),
        ({"batch": 4}, "4", 0),
        ({"batch": 4}, "1:8:16", 3),
        ({"size": "side"}, "1:8:16", 3),
    ],
)
def test_the_profile_must_be_one_that_the_graph_takes(
    shape: dict[str, Any], profile: str | None, code: int, take_in: Callable[..., int], source: Path
) -> None:
    model = small_net(source.with_name("other.onnx"), "float16", **shape)
    assert take_in(layer(), model=model, profile=profile) == code
    if code == 0:
        assert read_engine(source.with_name("e.plan")).profiles == (Profile(4, 4, 4),)


@pytest.mark.parametrize(
    "name",
    ["node_of_c", "node_of_b + node_of_c", "{ForeignNode[node_of_a...node_of_d]}", "{ForeignNode[x...node_of_d]}"],
)
def test_nodes_without_names_and_whole_subgraphs_are_known_again(
    name: str, take_in: Callable[..., int], source: Path
) -> None:
    """TensorRT's parser names such a node after its first output."""
    model = onnx.load(source)
    for node in model.graph.node:
        node.ClearField("name")
    nameless = source.with_name("nameless.onnx")
    onnx.save(model, nameless)
    assert take_in(layer(Name=name, Metadata=""), model=nameless) == 0
    assert take_in(layer(Name=name, Metadata="")) == 3


# --- options of TensorRT where another backend builds

TENSORRT_ONLY = {
    "--tf32": [],
    "--optimization-level": ["5"],
    "--workspace-mib": ["3"],
    "--timing-cache": ["c"],
    "--version-compatible": [],
    "--hardware-compatible": [],
    "--refittable": [],
    "--strip-plan": [],
}


def test_options_of_tensorrt_are_refused_where_another_backend_was_asked_for(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(source), "--backend", "onnxruntime", "-o", str(source.with_name("e.onnx"))]
    for name, value in TENSORRT_ONLY.items():
        assert main([*command, name, *value]) == 3
        assert capsys.readouterr().err.startswith(f"error: {name}: only for TensorRT")
    every = [word for name, value in TENSORRT_ONLY.items() for word in (name, *value)]
    assert main([*command, *every]) == 3
    assert capsys.readouterr().err.startswith(f"error: {', '.join(TENSORRT_ONLY)}: only for TensorRT")
    for task in (["--print-trtexec", "10"], ["--import", "x.plan"]):
        assert main([*command, *task]) == 3
        assert capsys.readouterr().err.startswith(f"error: {task[0]}: only for TensorRT")
    assert not source.with_name("e.onnx").exists()
    assert main([*command, "--optimization-level", "3"]) == 0


def test_where_the_backend_was_chosen_for_them_they_are_told_to_do_nothing(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    every = [word for name, value in TENSORRT_ONLY.items() for word in (name, *value)]
    assert main(["build", str(source), *every, "-o", str(source.with_name("e.onnx"))]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warning == f"warning: {', '.join(TENSORRT_ONLY)}: only for TensorRT, ignored on onnxruntime"
    assert main(["build", str(source), *every, "--print-trtexec", "10"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--layer-info", "x"], "--layer-info without --import"),
        (["--trt-version", "10.3.0", "--compute-capability", "9.0"], "--trt-version, --compute-capability without"),
        (["--import", "x", "--print-trtexec", "10"], "--import with --print-trtexec"),
        (["--import", "x", "--three-way", "y"], "--import with --three-way"),
    ],
)
def test_options_that_have_nothing_to_do_with_each_other_are_refused(
    given: list[str], says: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(source), *given]) == 3
    assert says in capsys.readouterr().err


# --- what `build` and `inspect` say of plans of our own


def test_without_a_profile_a_graph_is_built_for_its_own_batch(source: Path, trt: Control) -> None:
    fixed = small_net(source.with_name("fixed.onnx"), "float16", batch=4)
    for model, profiles in ((fixed, (Profile(4, 4, 4),)), (source, (Profile(1, 1, 1), Profile(1, 8, 8)))):
        out = source.with_name("e.plan")
        assert main(["build", str(model), "--backend", "tensorrt", "-o", str(out)]) == 0
        assert read_engine(out).profiles == profiles


def test_inspect_counts_a_layer_once_for_all_profiles(
    source: Path, trt: Control, capsys: pytest.CaptureFixture[str]
) -> None:
    one = LayerSparsity("mix", SPARSE_KERNEL, "sparse", 16, 16, ("mix",))
    layers = (one, replace(one, name="mix [profile 1]"), replace(one, name="head", state="unknown"))
    assert "1 layers sparse, 0 dense, 1 unknown" in inspected(source, capsys, layers=layers)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sparse_weights": True}, "the plan could not be inspected"),
        ({"sparse_weights": True, "notes": (FP32_NOTE,)}, "the plan could not be inspected"),
        ({"sparse_weights": False}, "the sparse flag was off"),
        ({"sparse_weights": False, "backend": "onnxruntime"}, "the backend gives none"),
    ],
)
def test_why_there_is_no_evidence_is_told_as_far_as_it_is_known(
    changed: dict[str, Any], says: str, source: Path, trt: Control, capsys: pytest.CaptureFixture[str]
) -> None:
    text = inspected(source, capsys, layers=(), **changed)
    assert f"no evidence of layers: {says}\n" in text
    assert [line for line in text.splitlines() if line.startswith("note ")] == [
        f"note       {note}" for note in changed.get("notes", ())
    ]


def inspected(source: Path, capsys: pytest.CaptureFixture[str], **changed: Any) -> str:
    """What `inspect` says of a plan whose record is changed."""
    built = build_engine(describe_onnx(source), BuildOptions("tensorrt", PROFILES), source.with_name("e.plan"))
    write_sidecar(replace(built, **changed))
    capsys.readouterr()
    assert main(["inspect", str(built.path)]) == 0
    return capsys.readouterr().out
