"""`anepy fuse`: a model with an adapter becomes a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .common import (
    ModelArgument,
    ModelOption,
    adapted_model,
    distinct,
    guarded,
    model_path,
    path_option,
)


@guarded
def fuse(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    adapter: Annotated[
        Path | None,
        path_option(metavar="FOLDER", help="LoRA adapter in PEFT's format.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        path_option("--output", "-o", metavar="MODEL", help="Result: .bin, .gguf, else a folder."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Weights: f32, f16, bf16 or q8_0 (.gguf).")] = "f32",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
) -> None:
    """Merge a LoRA adapter into the weights of its model."""
    path = model_path(model, model_option)
    if adapter is None or output is None:
        raise typer.BadParameter("name an adapter and a result: --adapter FOLDER -o MODEL")
    distinct({"the result": output}, {"the model": path, "the adapter": adapter})
    if output.exists() and not force:
        raise ConfigError(f"{output} exists: name another file, or add --force to replace it")
    from ..models import formats

    fused = adapted_model(path, adapter)
    formats.check_writable(fused.config, output)
    nbytes = fused.save(output, dtype)
    print(f"{output}: {path.name} with {adapter.name}, {nbytes / 1e6:.1f} MB")
