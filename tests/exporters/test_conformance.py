"""Which weights the 2:4 check requires to conform, files that it refuses, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from conformance_models import DENSE, SPARSE, Array, convolutions, model_of, saved, three
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.conformance import CheckOptions, ConformanceError, check_2to4, require_2to4
from maskplan.pipeline.core.choices import CONFORMING, DENSE_BY_CHOICE, FAIL, INELIGIBLE, PASS, UNKNOWN, VIOLATING
from maskplan.pipeline.core.errors import InputError


def verdicts(model: onnx.ModelProto, **options: Any) -> tuple[str, dict[str, str]]:
    report = check_2to4(model, CheckOptions(**options))
    counts = [report.conforming, report.violating, report.dense_by_choice, report.ineligible]
    names = [CONFORMING, VIOLATING, DENSE_BY_CHOICE, INELIGIBLE]
    assert counts == [sum(w.verdict == name for w in report.weights) for name in names]
    assert report.eligible == sum(counts[:3])
    assert (report.reason is None) == (report.verdict == PASS)
    return report.verdict, {w.name: w.verdict for w in report.weights}


def test_without_a_list_every_eligible_weight_must_conform() -> None:
    expected = {"a": CONFORMING, "b": VIOLATING, "c": CONFORMING}
    assert verdicts(three()) == (FAIL, expected)
    assert verdicts(three(masked=())) == (FAIL, expected)


def test_with_a_list_the_others_are_dense_by_choice() -> None:
    expected = {"a": CONFORMING, "b": DENSE_BY_CHOICE, "c": CONFORMING}
    assert verdicts(three(masked=("a", "c"))) == (PASS, expected)
    assert verdicts(three(), masked=("a", "c")) == (PASS, expected)


def test_a_list_given_overrules_the_files_own() -> None:
    assert verdicts(three(masked=("a", "b")), masked=("a", "c"))[0] == PASS
    assert verdicts(three(masked=("a", "c")), masked=("a", "b"))[0] == FAIL


def test_a_listed_weight_that_violates_fails() -> None:
    expected = {"a": CONFORMING, "b": VIOLATING, "c": DENSE_BY_CHOICE}
    assert verdicts(three(masked=("a", "b"))) == (FAIL, expected)


def test_strict_demands_every_eligible_weight() -> None:
    expected = {"a": CONFORMING, "b": VIOLATING, "c": CONFORMING}
    assert verdicts(three(masked=("a", "c")), strict=True) == (FAIL, expected)
    assert verdicts(three(masked=("a", "c"), b=SPARSE), strict=True)[0] == PASS


@pytest.mark.parametrize("glob", ["b", "?", "[b]"])
@pytest.mark.parametrize("strict", [False, True])
def test_what_may_be_dense_does_not_fail_and_what_conforms_still_counts(glob: str, strict: bool) -> None:
    expected = {"a": CONFORMING, "b": DENSE_BY_CHOICE, "c": CONFORMING}
    assert verdicts(three(), strict=strict, allow_dense=(glob,)) == (PASS, expected)


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"(?s)no node and no weight has such a name.*found: B, bb"):
        verdicts(three(), allow_dense=("B", "b", "bb"))


def test_a_masked_weight_may_be_excused_too() -> None:
    """Who lets a weight be dense means it, whether or not the file lists it."""
    expected = {"a": CONFORMING, "b": DENSE_BY_CHOICE, "c": CONFORMING}
    assert verdicts(three(masked=("a", "b", "c")), allow_dense=("b",)) == (PASS, expected)


def test_a_masked_weight_that_is_not_in_the_file_fails() -> None:
    report = check_2to4(three(masked=("a", "gone", "c", "lost")))
    assert report.verdict == FAIL
    assert "gone" in str(report.reason)
    assert "2" in str(report.reason)


def test_a_masked_weight_that_became_ineligible_fails() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["m"]),
        helper.make_node("Conv", ["m", "g"], ["y"], group=2),
    ]
    model = model_of(nodes, {"a": SPARSE, "g": np.zeros((8, 4, 1, 1), np.float32)})
    report = check_2to4(model, CheckOptions(masked=("a", "g")))
    assert report.verdict == FAIL
    assert "g" in str(report.reason).split()
    assert check_2to4(model, CheckOptions(masked=("a",))).passed


@pytest.mark.parametrize(
    ("weight", "attributes"),
    [((8, 3, 1, 1), {}), ((8, 1, 3, 3), {"group": 8})],
    ids=["three channels", "depthwise"],
)
def test_a_file_without_an_eligible_weight_fails(weight: tuple[int, ...], attributes: dict[str, int]) -> None:
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], {"w": np.zeros(weight, np.float32)})
    report = check_2to4(model)
    assert (report.verdict, report.reason, report.eligible, report.ineligible) == (
        FAIL,
        "no weight is eligible",
        0,
        1,
    )


def test_a_file_without_weights_is_unknown() -> None:
    report = check_2to4(model_of([helper.make_node("Relu", ["x"], ["y"])], {}))
    assert (report.verdict, report.reason, report.weights) == (UNKNOWN, "no weight was found", ())


def test_excusing_every_weight_does_not_pass() -> None:
    assert check_2to4(convolutions(a=DENSE), CheckOptions(allow_dense=("*",))).verdict == FAIL


def test_an_ineligible_weight_has_a_reason_and_no_counts() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], "stem"),
        helper.make_node("Conv", ["a", "deep"], ["b"], "deep", group=8),
        helper.make_node("ConvTranspose", ["b", "up"], ["c"], "up"),
        helper.make_node("Mul", ["k", "c"], ["computed"]),
        helper.make_node("Conv", ["c", "computed"], ["d"], "made"),
        helper.make_node("Conv", ["d", "good"], ["y"], "good"),
    ]
    tensors = {
        "stem": np.ones((8, 3, 1, 1), np.float32),
        "deep": np.ones((8, 1, 1, 1), np.float32),
        "up": np.ones((8, 8, 1, 1), np.float32),
        "k": DENSE,
        "good": SPARSE,
    }
    report = check_2to4(model_of(nodes, tensors))
    assert report.verdict == PASS
    assert {w.node: (w.verdict, w.reason, w.axis, w.groups) for w in report.weights} == {
        "stem": (INELIGIBLE, "channels_not_multiple_of_4", None, 0),
        "deep": (INELIGIBLE, "grouped", None, 0),
        "up": (INELIGIBLE, "unsupported_op", None, 0),
        "made": (INELIGIBLE, "not_constant", None, 0),
        "good": (CONFORMING, None, 1, 16),
    }


def test_a_weight_in_a_branch_is_judged_too() -> None:
    for own, verdict in ((SPARSE, PASS), (DENSE, FAIL)):
        branches = {
            f"{name}_branch": helper.make_graph(
                [helper.make_node("Conv", ["x", weight], [f"{name}_out"], name)],
                name,
                [],
                [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
                [numpy_helper.from_array(own, "own")] if weight == "own" else [],
            )
            for name, weight in (("then", "outer"), ("else", "own"))
        }
        model = model_of(
            [helper.make_node("If", ["flag"], ["y"], **branches)], {"outer": SPARSE, "flag": np.array(True)}
        )
        report = check_2to4(model)
        assert (report.verdict, {w.name for w in report.weights}) == (verdict, {"outer", "own"})


def test_a_weight_used_twice_is_judged_along_the_axis_of_each_use() -> None:
    """Conforming along the rows and violating along the columns."""
    weight = np.zeros((8, 8), np.float32)
    weight[:, [0, 5]] = 1
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], "rows", transB=1),
        helper.make_node("Gemm", ["a", "w"], ["y"], "columns"),
    ]
    report = check_2to4(model_of(nodes, {"w": weight}, (1, 8)), CheckOptions(masked=("w",)))
    assert {w.node: w.verdict for w in report.weights} == {"rows": CONFORMING, "columns": VIOLATING}
    assert (report.verdict, report.eligible) == (FAIL, 2)


@pytest.mark.parametrize(
    ("shape", "likely"), [((256, 256, 1, 1), True), ((252, 256, 1, 1), False), ((256, 252, 3, 3), False)]
)
def test_only_wide_layers_are_likely_to_win(shape: tuple[int, ...], likely: bool) -> None:
    (verdict,) = check_2to4(convolutions(w=np.zeros(shape, np.float32))).weights
    assert verdict.likely_speedup is likely


def external(folder: Path, weight: Array, location: str, data: bytes | None = None) -> Path:
    """A file whose weight lies in `location`, relative to it; `data` is what lies there, nothing if None."""
    model = convolutions(w=weight)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(weight.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    if data is not None:
        (folder / location).write_bytes(data)
    return saved(folder, model)


def test_external_data_in_the_folder_of_the_file_is_read(tmp_path: Path) -> None:
    assert check_2to4(external(tmp_path, SPARSE, "w.bin", SPARSE.tobytes())).passed
    report = check_2to4(external(tmp_path, DENSE, "w.bin", DENSE.tobytes()))
    assert report.weights[0].violating_groups == 16


@pytest.mark.parametrize("kind", ["above", "absolute", "link"])
def test_external_data_outside_the_folder_is_refused(kind: str, tmp_path: Path) -> None:
    outside, inside = tmp_path / "secret.bin", tmp_path / "inside"
    inside.mkdir()
    outside.write_bytes(SPARSE.tobytes())
    if kind == "link":
        (inside / "w.bin").symlink_to(outside)
    location = {"above": "../secret.bin", "absolute": str(outside), "link": "w.bin"}[kind]
    path = external(inside, SPARSE, location)
    with pytest.raises(InputError, match="cannot be read"):
        check_2to4(path)


@pytest.mark.parametrize("data", [None, b"", SPARSE.tobytes()[:-1]], ids=["missing", "empty", "short"])
def test_external_data_that_is_not_all_there_is_refused(data: bytes | None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        check_2to4(external(tmp_path, SPARSE, "w.bin", data))


def test_a_tensor_with_too_few_bytes_is_refused(tmp_path: Path) -> None:
    model = convolutions(w=SPARSE)
    model.graph.initializer[0].raw_data = SPARSE.tobytes()[:-4]
    with pytest.raises(InputError, match="cannot be read"):
        check_2to4(saved(tmp_path, model))


@pytest.mark.parametrize(
    "data",
    [b"", b"not an ONNX file\n", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(100), b"<html><body>404</body></html>"],
    ids=["empty", "text", "png", "zeros", "html"],
)
def test_a_file_that_is_not_onnx_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not an ONNX file"):
        check_2to4(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = convolutions(w=SPARSE).SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            check_2to4(path)
    path.write_bytes(whole)
    assert check_2to4(path).passed


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(InputError):
            check_2to4(path)


def test_require_raises_an_error_with_the_report_and_the_violating_weights(tmp_path: Path) -> None:
    assert require_2to4(three(masked=("a", "c"))).passed
    with pytest.raises(
        ConformanceError, match=r"bad\.onnx is not 2:4(?s:.)*b \(8, 8, 1, 1\): 16 of 16 groups"
    ) as caught:
        require_2to4(saved(tmp_path, three(), "bad.onnx"))
    assert caught.value.report.violating == 1
    assert not isinstance(caught.value, InputError)


# The command.


def test_the_command_prints_verdict_and_violations(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    good, bad = saved(tmp_path, three(masked=("a", "c"))), saved(tmp_path, three(), "bad.onnx")
    ran = cli("check", good, "--report", tmp_path / "good.json")
    assert ran.code == 0
    assert "pass: 2 conforming, 0 violating, 1 dense by choice, 0 ineligible" in ran.out
    ran = cli("check", bad, "--report", tmp_path / "bad.json")
    assert ran.code == 1
    assert "16 of 16 groups, first at [0, 0, 0, 0]" in " ".join(ran.out.split())
    assert ran.err.startswith("failed: ")
    for name, verdict in (("good", PASS), ("bad", FAIL)):
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["verdict"] == verdict
        assert {"eligible", "conforming", "violating", "dense_by_choice", "ineligible", "weights"} <= set(report)
        fields = {"name", "node", "op", "shape", "axis", "dtype", "verdict", "reason", "groups"}
        fields |= {"violating_groups", "negative_zeros", "first_violation", "likely_speedup"}
        assert all(fields <= set(w) for w in report["weights"])
    (weight,) = [w for w in report["weights"] if w["verdict"] == VIOLATING]
    assert weight["first_violation"] == {"index": [0, 0, 0, 0], "values": [1, 1, 1, 1]}


def test_the_command_takes_its_list_from_a_mask_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    model = saved(tmp_path, three())
    for names, code in ((("a", "c"), 0), (("a", "b"), 1), (("a", "elsewhere"), 1)):
        masks = tmp_path / "masks.safetensors"
        safetensors.numpy.save_file(dict.fromkeys(names, SPARSE != 0), masks)
        assert cli("check", model, "--masks", masks).code == code
    assert cli("check", model, "--masks", tmp_path / "none.safetensors").code == 3


def test_the_options_of_the_command_reach_the_check(cli: Callable[..., Any], tmp_path: Path) -> None:
    listed = saved(tmp_path, three(masked=("a", "c")))
    assert cli("check", listed, "--strict").code == 1
    assert cli("check", listed, "--strict", "--allow-dense", "b").code == 0
    assert cli("check", listed, "--strict", "--allow-dense", "node_[b]", "--allow-dense", "b*").code == 0
    assert cli("check", listed, "--pattern", "1:4").code == 1
    assert cli("check", listed, "--pattern", "4:4", "--strict").code == 0
    for pattern in ("2-4", "5:4", "0:4", ""):
        ran = cli("check", listed, "--pattern", pattern)
        assert (ran.code, ran.err.splitlines()[0]) == (3, "error: not an N:M pattern")


def test_the_command_refuses_what_is_not_onnx(cli: Callable[..., Any], tmp_path: Path) -> None:
    path, report = tmp_path / "model.onnx", tmp_path / "report.json"
    path.write_bytes(b"no model at all")
    for model in (path, tmp_path / "missing.onnx"):
        ran = cli("check", model, "--report", report)
        assert (ran.code, ran.out) == (3, "")
        assert ran.err.startswith("error: ")
        assert "Traceback" not in ran.err
        assert not report.exists()
