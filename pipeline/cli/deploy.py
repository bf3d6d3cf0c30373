"""`maskplan deploy`: an engine to a Triton model repository, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override
from maskplan.pipeline.core.escaping import shell_command
from maskplan.pipeline.core.terminal import print_line

_EXAMPLES = """
maskplan deploy build/r50/engine.plan --repository models --name resnet50
maskplan deploy a100.plan h100.plan --repository models --name resnet50 --preferred-batch 8
maskplan deploy --rollback --repository models --name resnet50
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, deploy, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.triton.config import Serving

    return vars(Serving())


def deploy(
    engines: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ENGINE",
            help="An engine with its sidecar file, or plans of one model for several kinds of GPUs.",
            show_default=False,
        ),
    ] = None,
    *,
    repository: Annotated[Path, typer.Option(help="Triton model repository.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the repository; by default the model's own.")
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Undo the last deployment of --name; takes no engine.")
    ] = False,
    queue_delay_us: Annotated[
        int | None, typer.Option(min=0, help="Longest wait for a fuller batch, in microseconds.")
    ] = None,
    preferred_batch: Annotated[
        list[int] | None, typer.Option(help="Batch size to send without waiting. Repeatable.")
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option("--cuda-graphs/--no-cuda-graphs", help="TensorRT only, where CUDA graphs are on by default."),
    ] = None,
    warmup: Annotated[bool | None, typer.Option(help="Run each profile once when the model is loaded.")] = None,
    keep_versions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of versions to serve; by default the new one and the one before, where one config fits both.",
        ),
    ] = None,
    instances: Annotated[int | None, typer.Option(min=1, help="Instances of the model on each GPU.")] = None,
    allow_untrained: Annotated[bool, typer.Option(help="Deploy random weights too.")] = False,
) -> None:
    """Add an engine to a Triton model repository as the model's next version, or undo the last deployment.

    If the engine runs on this host, a golden input and output are written with it, for `maskplan serve-check`.
    """
    from maskplan.engines.sidecar import read_engine
    from maskplan.pipeline.models.registry import folder_name
    from maskplan.pipeline.triton.config import Serving
    from maskplan.pipeline.triton.deploy import DeployOptions
    from maskplan.pipeline.triton.deploy import deploy as deploy_engines
    from maskplan.pipeline.triton.golden import golden_of
    from maskplan.pipeline.triton.rollback import rollback as roll_back

    if rollback:
        if engines or name is None:
            raise typer.BadParameter("--rollback takes --repository and --name, and no engine")
        previous = roll_back(repository, name)
        print_line(f"{previous.folder}: version {previous.version} is served again")
        return
    if not engines:
        raise typer.BadParameter("Missing argument 'ENGINE'")
    records = [read_engine(path) for path in engines]
    provenance = records[0].provenance
    name = name or (folder_name(provenance.model) if provenance is not None else engines[0].stem)
    serving = override(
        Serving(),
        queue_delay_us=queue_delay_us,
        preferred_batches=tuple(preferred_batch) if preferred_batch else None,
        cuda_graphs=cuda_graphs,
        warmup=warmup,
        instances=instances,
    )
    golden, reason = golden_of(records)
    deploy_options = override(
        DeployOptions(repository, name, allow_untrained, serving=serving), keep_versions=keep_versions
    )
    deployment = deploy_engines(engines, deploy_options, golden)
    print_line(f"{deployment.folder}: version {deployment.version}, {deployment.platform}")
    if golden is None:
        print_line(f"note: without a golden input and output: {reason}")
    else:
        options = ("--url", "localhost:8000", "--repository", repository, "--model", name)
        print_line(f"try it: {shell_command(('maskplan', 'serve-check', *options))}")
    if any(record.version_compatible for record in records):
        print_line(
            "note: a version-compatible plan: start Triton with --backend-config=tensorrt,version-compatible=true"
        )
