"""A server with a small hybrid, on a free port."""

import socket
import threading
import time

import pytest
import uvicorn
from openai import OpenAI

from m1.engine import LLM
from m1.grading import Grader
from m1.serve.app import make_app
from m1.serve.loop import EngineLoop
from m1.serve.settings import ServeOptions

KEY = "sk-of-the-tests"


class Running:
    """A server in a thread of its own."""

    def __init__(self, llm, keys, **options):
        self.options = ServeOptions(**{"max_num_seqs": 8, "timeout": 60.0} | options)
        self.loop, self.grader = EngineLoop(llm, self.options.max_waiting), Grader()
        app = make_app({"small": self.loop}, self.options, keys, self.grader)
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key=KEY):
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def idle(self):
        """Whether everything has ended and all slots are free, after some seconds at most."""
        for _ in range(200):
            if not self.loop.jobs and not self.loop.engine.busy and not self.loop._load:
                return True
            time.sleep(0.05)
        return False

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.grader.close()


@pytest.fixture(scope="module")
def llm(hybrid_dir):
    return LLM.from_pretrained(hybrid_dir, max_num_seqs=8, max_model_len=512)


@pytest.fixture(scope="module")
def server(llm):
    made = Running(llm, [KEY])
    yield made
    made.close()


@pytest.fixture
def serve(llm):
    """Starts a server with other options; its engine is the module's."""
    made = []

    def start(keys=(), **options):
        made.append(Running(llm, list(keys), **options))
        return made[-1]

    yield start
    for one in made:
        one.close()
