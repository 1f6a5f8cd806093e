"""Talks to a running ComfyUI: prompts, their progress, their pictures."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .console import SetupError

Progress = Callable[[int, int], None]


class PromptError(SetupError):
    """ComfyUI refused a prompt or failed while it ran. The message is ComfyUI's own."""

    def __init__(self, message: str, status: int = 0, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body or {}


@dataclass
class Result:
    """A prompt that ran: what it put out, and how long each node took, as told by the server's messages."""

    prompt_id: str
    outputs: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)


class ComfyClient:
    """The HTTP interface of the ComfyUI at `url`."""

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex
        # A proxy named in the environment must not be asked for a loopback address.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """GET `path`, or POST `body` as JSON. Raises PromptError with the server's message."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raw = error.read()
            told: Any = None
            with suppress(ValueError):
                told = json.loads(raw)
            told = told if isinstance(told, dict) else {}
            message = _refusal(told) or raw.decode(errors="replace")[:500] or error.reason
            raise PromptError(f"ComfyUI answered {error.code}: {message}", error.code, told) from error
        except (urllib.error.URLError, OSError) as error:
            raise PromptError(f"ComfyUI at {self.url} did not answer: {error}") from error

    def get(self, path: str) -> Any:
        """GET `path` and read the answer as JSON."""
        return json.loads(self.request(path))

    def node(self, name: str) -> dict[str, Any]:
        """What the server knows about the node `name`. Raises PromptError when it has none."""
        known = self.get(f"/object_info/{urllib.parse.quote(name)}")
        if name not in known:
            raise PromptError(f'ComfyUI has no node "{name}"')
        return known[name]

    def post_prompt(self, workflow: dict[str, Any]) -> str:
        """Queue a workflow in API format and return its prompt_id."""
        body = {"prompt": workflow, "client_id": self.client_id}
        return json.loads(self.request("/prompt", body))["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600.0) -> Result:
        """Wait until a prompt is done. Raises PromptError when it failed or took longer than `timeout`."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                _raise_failure(entry)
                return Result(prompt_id, entry["outputs"])
            time.sleep(0.1)
        raise PromptError(f"ComfyUI was not done with a prompt after {timeout:.0f} s")

    def run(self, workflow: dict[str, Any], progress: Progress | None = None, timeout: float = 600.0) -> Result:
        """Run a workflow and time its nodes by the messages the server sends as each of them begins.

        progress(step, steps) is called during sampling. Raises PromptError.
        """
        import websocket  # of the demo's requirements; the rest of this file needs the standard library alone

        address = f"ws{self.url.removeprefix('http')}/ws?clientId={self.client_id}"
        try:
            channel = websocket.create_connection(address, timeout=timeout)
        except (OSError, websocket.WebSocketException) as error:
            raise PromptError(f"ComfyUI at {self.url} did not answer: {error}") from error
        try:
            prompt_id = self.post_prompt(workflow)
            seconds = self._follow(channel, prompt_id, progress)
        except (OSError, websocket.WebSocketException) as error:
            raise PromptError(f"the connection to ComfyUI broke: {error}") from error
        finally:
            channel.close()
        result = self.wait(prompt_id, timeout=30)
        result.seconds = seconds
        return result

    @staticmethod
    def _follow(channel: Any, prompt_id: str, progress: Progress | None) -> dict[str, float]:
        """Seconds of each node: ComfyUI says "executing" as a node begins, and once more at the end."""
        seconds: dict[str, float] = {}
        current, began = None, 0.0
        while True:
            raw = channel.recv()
            now = time.perf_counter()
            if not isinstance(raw, str):
                if not raw:
                    raise OSError("closed by the server")
                continue  # a preview picture
            message = json.loads(raw)
            kind, data = message.get("type"), message.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            if kind in ("executing", "execution_error", "execution_interrupted", "execution_success"):
                if current is not None:
                    seconds[current] = seconds.get(current, 0.0) + now - began
                current, began = data.get("node") if kind == "executing" else None, now
                if current is None:
                    return seconds
            elif kind == "progress" and progress is not None:
                progress(data["value"], data["max"])

    def images(self, result: Result) -> list[bytes]:
        """The files of all pictures that a prompt put out, in the order of its nodes."""
        outputs = [result.outputs[node] for node in sorted(result.outputs)]
        images = [image for output in outputs for image in output.get("images", [])]
        return [self.request("/view?" + urllib.parse.urlencode(image)) for image in images]


def _refusal(told: dict[str, Any]) -> str:
    """ComfyUI's reasons for a refused prompt, in one text."""
    error = told.get("error") or ""
    lines = [str(error)]
    if isinstance(error, dict):
        lines = [" ".join(filter(None, (error.get("message"), error.get("details"))))]
    for node, entry in (told.get("node_errors") or {}).items():
        for reason in entry.get("errors", []):
            lines.append(f"{entry.get('class_type', node)}: {reason.get('message')}: {reason.get('details')}")
    return "\n  ".join(line.strip() for line in lines if line.strip())


def _raise_failure(entry: dict[str, Any]) -> None:
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return
    for kind, data in status.get("messages", []):
        if kind == "execution_error":
            reason = str(data.get("exception_message", "")).strip()
            raise PromptError(f"{data.get('node_type')} failed: {reason}", body=data)
        if kind == "execution_interrupted":
            raise PromptError("the prompt was interrupted")
    raise PromptError("the prompt failed")
