"""Loads the models, listens, and drains after SIGTERM or Ctrl-C."""

import logging
import socket

import uvicorn
from fastapi import FastAPI

from m1.engine import LLM
from m1.engine.engine import DEFAULT_MAX_MODEL_LEN
from m1.errors import UserError
from m1.grading import Grader
from m1.serve.app import make_app
from m1.serve.connection import Connection
from m1.serve.loop import EngineLoop
from m1.serve.settings import ServeOptions

KEEP_ALIVE_SECONDS = 30

logger = logging.getLogger(__name__)


def run(models: dict[str, str], options: ServeOptions, keys: list[str]) -> None:
    """Serves until SIGTERM or Ctrl-C. Open requests then have `options.drain` seconds to finish.

    Args:
        models: checkpoint folders or Hub ids, by the names that they are served under.
        options: how to listen, and limits.
        keys: any of them opens; everyone gets in if there are none.

    Raises:
        UserError: a model that can't be loaded, or an address that can't be used.
    """
    listening = listen(options.host, options.port)
    with Grader() as grader:
        grader.start()
        loops = {name: EngineLoop(load(folder, options), options.max_waiting) for name, folder in models.items()}
        app = make_app(loops, options, keys, grader)
        server = server_of(app, options.drain)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        logger.info("serving %s at http://%s:%d/v1", ", ".join(models), shown, port)
        server.run(sockets=[listening])


def server_of(app: FastAPI, drain: float) -> uvicorn.Server:
    """The HTTP server of an application. After a signal its open requests have `drain` seconds to finish."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(drain),
        server_header=False,
    )
    return uvicorn.Server(config)


def load(folder: str, options: ServeOptions) -> LLM:
    """A model with an engine of a fixed length. Raises UserError."""
    llm = LLM.from_pretrained(
        folder, options.dtype or "auto", max_num_seqs=options.max_num_seqs, quantize=options.quantize
    )
    context = getattr(llm.model.config, "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN
    llm.max_model_len = options.max_model_len or min(context, DEFAULT_MAX_MODEL_LEN)
    return llm


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, before models are loaded. Raises UserError if it can't be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(f"can't listen on {host}:{port}: {error}") from None
    return made
