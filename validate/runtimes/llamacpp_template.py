"""The process that renders chat templates: `python -m llmx.validate.runtimes.llamacpp_template`.

llama.cpp's C interface knows only a list of fixed templates; its own jinja engine is reached through its server. That
server is started here on a Unix socket in a private folder (no network port), without a warm-up and with the smallest
context, and asked `/apply-template`, which renders and runs nothing.
"""

from __future__ import annotations

import http.client
import importlib
import json
import socket
from collections.abc import Callable
from typing import Any

from llmx.errors import CheckFailed
from llmx.validate.runtimes.worker_loop import Answer, answer_frames

ERRORS_ONLY = 1
SECONDS = 60.0


class Renderer:
    """The server, and where it listens."""

    def __init__(self) -> None:
        self._server: object = None
        self._address = ""

    def commands(self) -> dict[str, Callable[..., Answer]]:
        """Return each command by its name."""
        return {"open": self.open, "render": self.render}

    def open(self, artifact: str, address: str) -> Answer:
        """Start llama.cpp's server for the artifact on the Unix socket at address."""
        package: Any = importlib.import_module("xllamacpp")
        params = package.CommonParams()
        params.model.path = artifact
        params.hostnames = [address]
        for name, value in _SETTINGS.items():
            setattr(params, name, value)
        try:
            self._server = package.Server(params)
        except RuntimeError as error:
            raise CheckFailed("llama.cpp's server does not start with this file and its chat template") from error
        self._address = address
        return {}, None

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> Answer:
        """Answer with the conversation as text."""
        asked = json.dumps({"messages": messages, "add_generation_prompt": add_generation_prompt})
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(SECONDS)
            channel.connect(self._address)
            connection = http.client.HTTPConnection("localhost")
            connection.sock = channel
            connection.request("POST", "/apply-template", asked, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            body = json.loads(answer.read())
        if answer.status != http.client.OK:
            message = body.get("error", {}).get("message", body)
            raise CheckFailed(f"llama.cpp's template engine refuses the conversation: {message}")
        return {"text": body["prompt"]}, None


_SETTINGS: dict[str, object] = {
    "n_ctx": 64,
    "n_batch": 32,
    "n_ubatch": 32,
    "n_parallel": 1,
    "n_threads_http": 1,
    "n_gpu_layers": 0,
    "cache_ram_mib": 0,
    "warmup": False,
    "fit_params": False,
    # Repacked weights would be a second copy in memory of a model that never runs.
    "no_extra_bufts": True,
    "offline": True,
    "ui": False,
    "use_jinja": True,
    # An assistant's turn at the end is a turn, as in transformers, not a text to be continued.
    "prefill_assistant": False,
    "verbosity": ERRORS_ONLY,
}


if __name__ == "__main__":
    answer_frames(Renderer().commands())
