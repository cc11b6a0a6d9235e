"""A headless Chromium, driven through its DevTools protocol over two pipes: no driver, no library, no port.

Chromium reads commands from file descriptor 3 and writes answers and events to 4, JSON texts that end with a zero byte
(`--remote-debugging-pipe`).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
SECONDS = 60  # until an answer must have come: a cold start on a busy machine takes ten
# Moves the two pipes to the descriptors that Chromium looks at, then becomes Chromium.
LAUNCH = """
import os, sys
read, write = (os.dup(int(number)) for number in sys.argv[1:3])
high = os.dup(read), os.dup(write)
os.dup2(high[0], 3), os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
# A phone's window grows with what overflows it, so the width that was asked for is compared, not innerWidth.
OVERFLOWING = """
[...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect(), hidden = getComputedStyle(e).position == "absolute";
  return box.width > 0 && !hidden && (box.right > WIDTH + 0.5 || box.left < -0.5);
}).slice(0, 5).map(e => e.tagName + "." + e.getAttribute("class") + ": " + e.textContent.slice(0, 40))
"""


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Browser:
    """One page. messages: everything that the console and the network said against it, since it was opened."""

    send_to: int
    read_from: int
    session: str = ""
    number: int = 0
    buffer: bytes = b""
    messages: list[str] = field(default_factory=list)
    loaded: bool = False
    width: int = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result. Raises: RuntimeError with Chromium's words, TimeoutError."""
        self.number += 1
        number = self.number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            if not select([self.read_from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self.read_from, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Log.entryAdded":
                self.messages.append(f"{told['entry']['level']}: {told['entry']['text']}")
            case "Runtime.consoleAPICalled":
                self.messages.append(f"console.{told['type']}")
            case "Runtime.exceptionThrown":
                self.messages.append(f"exception: {told['exceptionDetails']['text']}")
            case "Network.requestWillBeSent":
                if not told["request"]["url"].startswith(("file:", "data:")):
                    self.messages.append(f"request: {told['request']['url']}")
            case "Page.javascriptDialogOpening":
                self.messages.append(f"dialog: {told['message']}")

    def start(self) -> None:
        """Open an empty page and listen to it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def open(self, path: Path, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Show a file in a window of width x height CSS pixels; returns when it is loaded."""
        phone, self.width = width < 500, width
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.messages.clear()
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._next()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page. Raises: RuntimeError where it throws."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def overflow(self) -> list[str]:
        """What stands out of the page to the left or right, and the page itself when it scrolls sideways."""
        wide = self.value("document.documentElement.scrollWidth") - self.width
        elements = self.value(OVERFLOWING.replace("WIDTH", str(self.width)))
        return [*([f"the page is {wide} pixels too wide"] if wide > 0 else []), *elements]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as a PNG file."""
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Browser]:
    """A running browser with an empty profile; it ends with the block."""
    commands, send_to = os.pipe()
    read_from, answers = os.pipe()
    options = ["--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += ["--disable-dev-shm-usage", "--disable-extensions", f"--user-data-dir={profile}"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # which Chromium refuses to set up for root
    command = [sys.executable, "-c", LAUNCH, str(commands), str(answers), program, *options]
    with subprocess.Popen(
        command, pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(commands)
        os.close(answers)
        browser = Browser(send_to, read_from)
        try:
            browser.start()
            yield browser
        finally:
            os.close(send_to)  # Chromium ends when nobody can command it any more
            os.close(read_from)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
