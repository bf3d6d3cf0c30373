"""What NVIDIA's compiler made of ONNX files, in lines of text: for the end of `engine`, and for `check --compile`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from maskplan.pipeline.core.choices import CONVERSIONS
from maskplan.pipeline.core.compilation import CompiledProfile, CompileReport, CompileResult

WHAT_IT_SHOWS = "it shows acceptance, types and fusions; not sparse kernels, not speed, and not TensorRT itself"


def refusals(report: CompileReport) -> list[str]:
    """One line for each problem of both files."""
    return [line for result in (report.dense, report.sparse) for line in refusal_lines(result)]


def refusal_lines(result: CompileResult) -> list[str]:
    """One line for each problem of one file."""
    return [f"{result.compiler} refuses {result.onnx}: {problem}; {problem.fix}" for problem in result.problems]


def verdict_line(report: CompileReport) -> str:
    """One line about both files of a run."""
    sparse = report.sparse
    name = f"{sparse.compiler} {sparse.version}"
    if not report.accepted:
        return f"REFUSED by {name}: {'; '.join(refusals(report))}"
    return f"{name} accepts both {sparse.precision.upper()} files: {_layers(sparse.profiles[-1:])}"


def result_lines(result: CompileResult) -> Iterator[str]:
    """What became of one file: its verdict, each profile's layers, and warnings."""
    name = f"{result.compiler} {result.version}"
    if not result.accepted:
        yield f"refused by {name}"
        for problem in result.problems:
            yield f"  {problem}"
            yield f"    fix: {problem.fix}"
    else:
        yield f"accepted by {name}: {result.size_bytes:,} bytes in {result.build_s:.1f} s; {WHAT_IT_SHOWS}"
        for profile in result.profiles:
            label = "fixed shapes" if profile.profile is None else f"profile {profile.profile}"
            yield f"  {label}: {len(profile.layers)} layers ({_counts(profile.kinds)}); {_layers((profile,))}"
            for layer in profile.conversions:
                nodes = ", ".join(layer.nodes) or "no node of the graph"
                yield f"    {layer.role} kernel of its own: {'+'.join(layer.operations)}, of {nodes}"
    for warning in result.warnings:
        yield f"  warning ({warning.count} times): {warning.text}"
    if result.unread_lines:
        yield f"  {len(result.unread_lines)} layers in the compiler's log could not be read, and are not counted"


def _layers(profiles: tuple[CompiledProfile, ...]) -> str:
    if not profiles:
        return "its log does not show the layers"
    profile = profiles[0]
    products = ", ".join(f"{count} in {dtype}" for dtype, count in profile.products.items()) or "none"
    parts = [f"convolutions and matrix products: {products}"]
    conversions: dict[str, int] = {role: count for role, count in profile.roles.items() if role in CONVERSIONS}
    parts.append(f"kernels that only convert: {_counts(conversions) or 'none'}")
    return "; ".join(parts)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
