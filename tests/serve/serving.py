"""A server in a thread of the tests."""

import socket
import threading
import time

from openai import OpenAI

from m1.grading import Grader
from m1.serve.app import make_app
from m1.serve.loop import EngineLoop
from m1.serve.server import server_of
from m1.serve.settings import ServeOptions

KEY = "sk-of-the-tests"


class Running:
    """A server in a thread of its own."""

    def __init__(self, llm, keys, **options):
        self.options = ServeOptions(**{"max_num_seqs": 8, "timeout": 60.0} | options)
        self.loop, self.grader = EngineLoop(llm, self.options.max_waiting), Grader()
        app = make_app({"small": self.loop}, self.options, keys, self.grader)
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # a client that doesn't read is felt soon
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = server_of(app, drain=1)
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def connect(self):
        """A socket to it, with a small buffer, too."""
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        made.connect(("127.0.0.1", int(self.url.rpartition(":")[2])))
        return made

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
