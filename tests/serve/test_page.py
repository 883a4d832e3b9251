"""The page in headless Chromium, where there is one."""

import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-quic", "--virtual-time-budget=20000"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.long
def test_a_vote_is_shown(serve, tmp_path):
    """The page lists the models, asks by itself, and shows the tally and the samples."""
    server = serve()
    page = f"{server.url}/?ask"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", "--dump-dom", page]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert '<option value="small">small</option>' in dom
    assert re.search(r"16 samples, \d+ tokens, [\d.]+ s, stopped: \w+", dom), dom
    assert dom.count("<summary>") == 16 and 'role="status">done' in dom and server.idle()
