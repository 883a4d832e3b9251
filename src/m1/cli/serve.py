"""The command serve: models over HTTP."""

import os
from typing import Annotated, Any

import typer

from m1.cli.arguments import options_of
from m1.errors import UserError
from m1.options import build
from m1.serve.settings import KEY_VARIABLE, ServeOptions

app = typer.Typer()


@app.command()
@options_of(ServeOptions)
def serve(
    models: Annotated[list[str], typer.Argument(help="Checkpoint folders or Hub ids.")],
    **options: Any,
) -> None:
    """Serve models over HTTP: OpenAI's API, and votes."""
    chosen = build(ServeOptions, options, "serve")
    keys = [key for key in chosen.api_key or [os.environ.get(KEY_VARIABLE, "").strip()] if key]
    chosen.check_access(keys)
    names = chosen.served_model_name or models
    if len(names) != len(models) or len(set(names)) != len(names):
        raise UserError(f"{len(models)} models and the names {', '.join(names)}: give each a different name")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"m1 serve needs {error.name}: pip install 'm1-reasoning[serve]'") from None
    from m1.serve.server import run

    run(dict(zip(names, models, strict=True)), chosen, keys)
