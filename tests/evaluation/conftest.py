"""Fixtures of the evaluation's tests."""

import threading

import pytest
from openai_server import Server


@pytest.fixture
def serve():
    """`serve(answer)` starts a Server."""
    servers = []

    def start(answer):
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
