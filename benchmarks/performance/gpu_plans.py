"""Plans of TensorRT-RTX on a GPU: do they run, how fast, and with which kernels. Used by benchmarks/gpu.py."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from maskplan.calibration.placement import place
from maskplan.calibration.qdq import insert_qdq
from maskplan.engines.ort import OrtEngine
from maskplan.engines.trt.compile import compile_onnx
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.versions import construct, import_library
from maskplan.exporters.metadata import describe_onnx
from maskplan.exporters.onnx_export import INPUT, trace
from maskplan.exporters.precision import to_fp16
from maskplan.pipeline.core.artifacts import Pattern, Profile
from maskplan.pipeline.core.choices import TENSORRT_RTX
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint

# The largest magnitude of every activation of the INT8 graphs, which are only timed.
_RANGE = 4.0
_RUNS = 50


def measure_plans(
    name: str, size: int, batches: Sequence[int], save: Callable[[dict[str, Any]], None], goes_on: Callable[[], bool]
) -> None:
    """Compile dense and 2:4 graphs with and without the sparse flag, then run each plan while there is time."""
    module, provenance = open_checkpoint(ModelOptions(name, "random", None, 0))
    preprocessing = replace(provenance.preprocessing, height=size, width=size)
    dense = trace(module, replace(provenance, preprocessing=preprocessing))
    sparse = masked(dense)
    graphs = {"sparse fp16": to_fp16(sparse), "dense fp16": to_fp16(dense), "sparse int8": quantized(sparse)}
    found: dict[str, Any] = {}
    profile = Profile(1, max(batches), max(batches))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        plans: dict[str, tuple[Path, Path]] = {}
        for graph, model in graphs.items():
            path = folder / f"{graph}.onnx"
            onnx.save(model, path)
            for flag in (True, False):
                row, plan = f"{graph}, {'with' if flag else 'without'} the flag", folder / f"{graph}.{flag}.plan"
                compiled = compile_onnx(describe_onnx(path), (profile,), sparse_weights=flag, out=plan).result
                found[row] = {
                    "accepted": compiled.accepted,
                    "reason": "; ".join(map(str, compiled.problems)) or None,
                    "build_s": compiled.build_s,
                    "size_bytes": compiled.size_bytes,
                    "sha256": compiled.sha256,
                }
                if compiled.accepted:
                    plans[row] = (path, plan)
                save(found)
        for row, (path, plan) in plans.items():
            if not goes_on():
                return
            try:
                found[row]["ran"] = run_plan(plan, path, size, batches)
            except Exception as error:  # of the library or the driver: the answer to whether plans run here
                found[row]["ran"] = None
                found[row]["error"] = f"{type(error).__name__}: {error}"
            save(found)


def masked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with magnitude masks on every convolution of four or more channels."""
    sparse = onnx.ModelProto()
    sparse.CopyFrom(model)
    for tensor in sparse.graph.initializer:
        if len(tensor.dims) == 4 and tensor.dims[1] % 4 == 0:
            weight = numpy_helper.to_array(tensor)
            kept = np.where(magnitude_mask(weight, Pattern(2, 4)), weight, np.float32(0))
            tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))
    return sparse


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """INT8 with FP16 elsewhere."""
    placement = place(model)
    return to_fp16(insert_qdq(model, placement, {a.tensor: _RANGE for a in placement.activations}))


def run_plan(plan: Path, path: Path, size: int, batches: Sequence[int]) -> dict[str, Any]:
    """Compare with ONNX Runtime, time with events, and record the kernels that ran."""
    trt = import_library(TENSORRT_RTX)
    log_capture = TrtLogCapture(trt)
    runtime = construct(trt.Runtime, log_capture)
    started = time.perf_counter()
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        raise RuntimeError(log_capture.reason())
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - started, 3), "batches": {}}
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    (output,) = (name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT)
    stream = torch.cuda.Stream()
    for batch in batches:
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
        on_gpu = x.cuda()
        context.set_input_shape(INPUT, tuple(x.shape))
        y = torch.empty(tuple(context.get_tensor_shape(output)), device="cuda")
        context.set_tensor_address(INPUT, on_gpu.data_ptr())
        context.set_tensor_address(output, y.data_ptr())

        def run() -> None:
            if not context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError(log_capture.reason())

        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        first_s = time.perf_counter() - started
        reference = OrtEngine(path)
        expected = next(iter(reference.infer({INPUT: x.numpy()}).values()))
        reference.close()
        difference = float(np.abs(y.cpu().numpy() - expected).max() / np.abs(expected).max())
        found["batches"][batch] = {
            "first_run_s": round(first_s, 3),
            "difference": difference,
            "p50_ms": timed(run, stream),
            "kernels": kernels(run),
        }
    return found


def timed(run: Callable[[], None], stream: torch.cuda.Stream) -> float:
    """The median of the GPU's time."""
    took = []
    for _ in range(_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        run()
        end.record(stream)
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end))
    return float(np.median(took))


def kernels(run: Callable[[], None]) -> list[str]:
    """Names of the kernels of one run, in order; whether one is sparse shows in its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return [event.name for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
