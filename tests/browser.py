"""A real browser: headless Chromium, spoken to over its DevTools protocol by pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
# The browser wants its pipes as descriptors 3 and 4.
_START = """
import os, sys
ends = [os.dup2(int(end), 100 + number) for number, end in enumerate(sys.argv[1:3])]
for number, end in enumerate(ends):
    os.dup2(end, 3 + number)
os.execv(sys.argv[3], sys.argv[3:])
"""
# Seconds until a browser that does not answer fails the test.
PATIENCE = 60


class Page:
    """A page in a browser.

    Attributes:
        requests: The URLs of what it asked for.
        messages: What its console, or the browser about it, said.
    """

    def __init__(self, to_browser: int, from_browser: int):
        self.requests: list[str] = []
        self.messages: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._buffer, self._serial, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict[str, Any]:
        """Calls a method of the protocol; returns its result."""
        self._serial += 1
        message = {"id": self._serial, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._serial:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path) -> None:
        """Opens a file and waits until all of it is there."""
        self.call("Page.navigate", url=path.absolute().as_uri())
        end = time.monotonic() + PATIENCE
        while self.run("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, "the page is not loaded"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """Returns what an expression of JavaScript gives, or a promise of it."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def width(self, pixels: int, dark: bool = False) -> None:
        """Gives the window a width; and the user a taste for dark pages."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=pixels, height=900, deviceScaleFactor=1, mobile=pixels < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shoot(self, path: Path) -> None:
        """Writes the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Ends the browser, which does not leave anything half-written then."""
        self._session = {}
        self.call("Browser.close")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            received = os.read(self._from, 1 << 20)
            assert received, "the browser has gone"
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\0", 1)
        event = json.loads(line)
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            case "Log.entryAdded" | "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.messages.append(json.dumps(event["params"]))
        return event


@contextlib.contextmanager
def page(profile: Path) -> Iterator[Page]:
    """Starts a browser that keeps its things in a folder; ends it afterwards."""
    (commands, to_browser), (from_browser, answers) = os.pipe(), os.pipe()
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", _START, str(commands), str(answers), *command],
        pass_fds=(commands, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        for descriptor in (commands, answers):
            os.close(descriptor)
        try:
            opened = Page(to_browser, from_browser)
            yield opened
            opened.close()
            process.wait(PATIENCE)
        finally:
            process.kill()
            for descriptor in (to_browser, from_browser):
                os.close(descriptor)
