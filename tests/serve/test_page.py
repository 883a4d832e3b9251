"""The page in headless Chromium, where there is one, driven by its DevTools protocol."""

import asyncio
import re
import shutil
import subprocess

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-quic", "--remote-debugging-port=0"]


@pytest.fixture
def browser(tmp_path):
    """The address of Chromium's DevTools."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    yield next(found[1] for line in process.stderr if (found := re.search(r"DevTools listening on ws://([^/]+)", line)))
    process.kill()
    process.communicate()


async def visit(browser, url, *, until, width):
    """Opens the page on a screen of this width in pixels. Returns its HTML once the JavaScript `until` is true."""
    async with aiohttp.ClientSession() as http:
        async with http.put(f"http://{browser}/json/new?about:blank") as made:
            address = (await made.json())["webSocketDebuggerUrl"]
        async with http.ws_connect(address, max_msg_size=0) as tab:
            number = 0

            async def call(method, **params):
                nonlocal number
                number += 1
                await tab.send_json({"id": number, "method": method, "params": params})
                while (answer := await tab.receive_json()).get("id") != number:
                    pass
                return answer["result"]

            async def value(expression):
                return (await call("Runtime.evaluate", expression=expression))["result"].get("value")

            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            await call("Emulation.setDeviceMetricsOverride", **screen)
            await call("Page.navigate", url=url)
            async with asyncio.timeout(60):
                while not await value(until):
                    await asyncio.sleep(0.1)
            assert await value("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
            return await value("document.documentElement.outerHTML")


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_vote_is_shown(serve, browser, width):
    """The page lists the models, asks by itself, and shows the tally and the samples, on a phone, too."""
    server = serve()
    until = "document.getElementById('status')?.textContent === 'done'"
    page = asyncio.run(visit(browser, f"{server.url}/?ask", until=until, width=width))
    assert '<option value="small">small</option>' in page
    assert re.search(r"16 samples, \d+ tokens, [\d.]+ s, stopped: \w+", page), page
    assert page.count("<summary>") == 16 and server.idle()
