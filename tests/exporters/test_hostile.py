"""Two thousand spoiled files: each gives a clear error or a true verdict, soon, in little memory, from its own folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SWEEP = r'''
import math, random, resource, signal, sys, warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.pipeline.core.errors import InputError

FOLDER, COUNT = Path(sys.argv[1]), int(sys.argv[2])
SECRET = FOLDER.parent / "secret.bin"
SECRET.write_bytes(bytes(1 << 16))
(FOLDER / "link.bin").symlink_to(SECRET)
generator = np.random.default_rng(0)


def sparse(*shape, axis=1):
    weight = generator.standard_normal(shape).astype(np.float32) + 3
    moved = np.moveaxis(weight, axis, -1)
    moved[..., 0::4] = 0
    moved[..., 3::4] = 0
    return weight


def tensor(values, name, external=None):
    stored = numpy_helper.from_array(values, name)
    if external is not None:
        with external.open("ab") as file:
            offset = file.tell()
            file.write(stored.raw_data)
        length = len(stored.raw_data)
        stored.ClearField("raw_data")
        stored.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external.name), ("offset", str(offset)), ("length", str(length))):
            entry = stored.external_data.add()
            entry.key, entry.value = key, value
    return stored


def model(external=None):
    """Every way in which the walk goes from an op to its weight, in one graph; all weights are 2:4."""
    int8 = (sparse(8, 8) * 10).astype(np.int8)
    inner = helper.make_graph(
        [helper.make_node("Conv", ["x", "c1"], ["inner"])], "branch", [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    body = helper.make_function(
        "own", "Linear", ["a", "w"], ["b"], [helper.make_node("MatMul", ["a", "w"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    nodes = [
        helper.make_node("Conv", ["x", "c1"], ["h1"], "conv1"),
        helper.make_node("Conv", ["h1", "c2"], ["h2"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("If", ["flag"], ["h3"], "if", then_branch=inner, else_branch=inner),
        helper.make_node("Flatten", ["h2"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "g1"], ["g"], "gemm", transB=1),
        helper.make_node("Transpose", ["m1"], ["mt"], "transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["g", "mt"], ["m"], "matmul"),
        helper.make_node("DequantizeLinear", ["q1", "scale", "zero"], ["qf"], "dequantize"),
        helper.make_node("Reshape", ["qf", "shape"], ["qr"], "reshape"),
        helper.make_node("Conv", ["h1", "qr"], ["h4"], "conv3"),
        helper.make_node("Linear", ["m", "l1"], ["y"], "linear", domain="own"),
        helper.make_node("Constant", [], ["k"], "constant", value=numpy_helper.from_array(sparse(8, 8, 1, 1), "k")),
        helper.make_node("Conv", ["h1", "k"], ["h5"], "conv4"),
    ]
    tensors = [
        tensor(sparse(8, 8, 1, 1), "c1", external), tensor(sparse(8, 8, 3, 3), "c2", external),
        tensor(sparse(8, 8), "g1", external), tensor(sparse(8, 8), "m1", external), tensor(int8, "q1", external),
        tensor(np.array(0.1, np.float32), "scale"), tensor(np.array(0, np.int8), "zero"),
        tensor(np.array([8, 8, 1, 1]), "shape"), tensor(sparse(8, 8, axis=0), "l1", external),
        tensor(np.array(True), "flag"), tensor(sparse(32, 64, 3, 3), "big", external),
    ]
    nodes.append(helper.make_node("Conv", ["x", "big"], ["h6"], "conv5"))
    graph = helper.make_graph(
        nodes, "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[body])


DIMS = [[], [0], [-1, 8], [8], [8, 8, 8], [2**31, 2**31], [2**62, 4], [8, 2**40, 1, 1], [4, 16, 1, 1], [1] * 70]
PLACES = ["../secret.bin", str(SECRET), "link.bin", "", ".", "..", "missing.bin", "a\0b", "x" * 5000, "./../secret.bin"]
NUMBERS = ["-1", "99999999999999999999", "4096", "", "0x10", "1e3", "255"]


def spoil(random, base):
    """One seeded mutation: of the bytes, or of the message."""
    data = bytearray(base)
    kind = random.randrange(14)
    if kind == 0:
        return bytes(data[: random.randrange(len(data))])
    if kind in (1, 2, 3):
        for _ in range(random.choice([1, 2, 8, 64])):
            data[random.randrange(len(data))] = random.randrange(256)
        return bytes(data)
    if kind == 4:
        at = random.randrange(len(data))
        return bytes(data[:at] + random.randbytes(random.randrange(1, 40)) + data[at:])
    m = onnx.load_model_from_string(bytes(data))
    g = m.graph
    node, t = random.choice(g.node), random.choice(g.initializer)
    if kind in (5, 6):
        t.ClearField("dims")
        t.dims.extend(random.choice(DIMS))
    elif kind == 7:
        for n in random.sample(list(g.node), 3):
            if n.input:
                n.input[random.randrange(len(n.input))] = random.choice(random.choice(g.node).output)
    elif kind == 8:
        g.initializer.remove(t)
    elif kind == 9:
        t.data_type = random.randrange(-2, 30)
    elif kind == 10:
        entries = {e.key: e for e in t.external_data}
        if not entries:
            t.data_location = TensorProto.EXTERNAL
            entries["location"] = t.external_data.add()
            entries["location"].key = "location"
        if random.random() < 0.6:
            entries["location"].value = random.choice(PLACES).replace("\0", "")
        elif "offset" in entries:
            entries[random.choice(["offset", "length"])].value = random.choice(NUMBERS)
    elif kind == 11:
        for a in node.attribute:
            if a.ints:
                a.ints[random.randrange(len(a.ints))] = random.choice([-9, 7, 2**40, 0])
            elif a.type == onnx.AttributeProto.INT:
                a.i = random.choice([-9, 7, 2**40, 0])
        node.op_type = random.choice(["Conv", "Gemm", "MatMul", "Transpose", "Reshape", "Squeeze", "If", "Linear"])
    elif kind == 12:
        m.functions[0].node[0].op_type, m.functions[0].node[0].domain = "Linear", "own"
        if random.random() < 0.5:
            m.functions[0].node[0].input[0] = "b"
    else:
        other = random.choice(g.initializer)
        t.name = other.name
    return m.SerializeToString()


def reference(path):
    """Names of weights that a slow look at the plainly parsed file finds 2:4 along some axis that some op may reduce."""
    m = onnx.load(path, load_external_data=False)
    found = {}
    graphs = [m.graph]
    tensors = list(m.graph.initializer)
    for n in m.graph.node:
        for a in n.attribute:
            if a.HasField("t"):
                a.t.name = n.output[0] if n.output else ""
                tensors.append(a.t)
    for t in tensors:
        try:
            if t.data_location == TensorProto.EXTERNAL and "length" not in {e.key for e in t.external_data}:
                # Optional by the standard; onnx itself would read to the end of the file.
                entry = t.external_data.add()
                entry.key = "length"
                entry.value = str(math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize)
            values = numpy_helper.to_array(t, str(path.parent))
        except Exception:
            found.setdefault(t.name, []).append(None)
            continue
        axes = []
        for axis in range(values.ndim):
            if values.shape[axis] % 4 == 0:
                groups = (np.moveaxis(values, axis, -1) != 0).reshape(-1, 4)
                axes.append(not groups.size or groups.sum(axis=1).max() <= 2)
        found.setdefault(t.name, []).append(any(axes))
    return found


def computes_2to4(path, name):
    """Whether ONNX's own evaluation of a computed weight, from stored tensors alone, is 2:4 along some axis."""
    m = onnx.load(path)
    wanted, nodes = {name}, []
    for n in reversed(m.graph.node):
        if wanted.intersection(n.output):
            nodes.insert(0, n)
            wanted.update(n.input)
    tensors = [t for t in m.graph.initializer if t.name in wanted]
    part = helper.make_graph(nodes, "part", [], [onnx.ValueInfoProto(name=name)], tensors)
    whole = helper.make_model(part, opset_imports=m.opset_import, functions=m.functions)
    (values,) = ReferenceEvaluator(whole).run(None, {})
    axes = [np.moveaxis(values, a, -1).reshape(-1, 4) for a in range(values.ndim) if values.shape[a] % 4 == 0]
    return any(not groups.size or (groups != 0).sum(axis=1).max() <= 2 for groups in axes)


warnings.simplefilter("ignore")
opened = []
watching = False


def audit(event, arguments):
    if watching and event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()))


sys.addaudithook(audit)


def too_long(*_):
    raise TimeoutError


signal.signal(signal.SIGALRM, too_long)
bases = [model().SerializeToString(), model(FOLDER / "weights.bin").SerializeToString()]
for base in bases:
    whole = FOLDER / "whole.onnx"
    whole.write_bytes(base)
    assert check_2to4(whole, CheckOptions(strict=True)).conforming == 10, "the sound file must pass"

with open("/proc/self/status") as status:
    virtual = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**30, virtual + 2**30))

outcomes = {"error": 0, "pass": 0, "fail": 0, "unknown": 0}
for seed in range(COUNT):
    path = FOLDER / "spoiled.onnx"
    path.write_bytes(spoil(random.Random(seed), bases[seed % 2]))
    opened.clear()
    signal.alarm(10)
    watching = True
    try:
        report = check_2to4(path, CheckOptions(strict=True))
    except InputError as error:
        outcomes["error"] += 1
        assert len(str(error)) < 3000 and "\n  found:" in str(error), (seed, str(error))
    else:
        watching = False
        outcomes[report.verdict] += 1
        conforming = [w.name for w in report.weights if w.verdict == "conforming"]
        if conforming:
            truth = reference(path)
            for name in conforming:
                true = truth[name][-1] if truth.get(name) else computes_2to4(path, name)
                assert true, f"seed {seed}: {name} is called conforming"
    finally:
        watching = False
        signal.alarm(0)
    outside = [p for p in opened if FOLDER not in p.resolve().parents and p.suffix in (".bin", ".onnx", "")]
    assert not outside, f"seed {seed}: read {outside}"
print(outcomes)
assert outcomes["error"] and outcomes["pass"] and outcomes["fail"]
'''


def test_a_spoiled_file_gives_an_error_or_a_true_verdict(tmp_path: Path) -> None:
    script, folder = tmp_path / "sweep.py", tmp_path / "model"
    folder.mkdir()
    script.write_text(SWEEP)
    ran = subprocess.run(
        [sys.executable, script, folder, "1000"], capture_output=True, text=True, timeout=500, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
