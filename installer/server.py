"""A real ComfyUI server that is up inside a `with` and gone after it, whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files, link
from .client import ComfyClient, PromptError
from .console import SetupError, or_failed, stage
from .paths import ROOT

FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
SMALL_MACHINE = 4  # cores


def device(stats: Mapping[str, Any]) -> str:
    """The name of the device that a server computes on. stats: what it answers to /system_stats."""
    first = stats["devices"][0]
    return f"CPU, {os.cpu_count()} cores" if first["type"] == "cpu" else first.get("name", first["type"])


def machine(stats: Mapping[str, Any]) -> str:
    """The device, threads and versions that are measured."""
    system = stats["system"]
    return f"ComfyUI {system.get('comfyui_version')}, torch {system.get('pytorch_version')}, {device(stats)}"


@dataclass
class ComfyServer:
    """Starts `comfyui`'s main.py with `python` on a free loopback port, with this pack in its custom_nodes.

    base: a folder of the server's own for models, pictures and custom nodes; made when it is not there.
    Entering returns a ComfyClient. Raises SetupError, with the end of the log, when it does not start.
    """

    comfyui: Path
    base: Path
    python: Path = Path(sys.executable)
    pack: Path | None = ROOT
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 180.0
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.comfyui, self.base = self.comfyui.resolve(), self.base.resolve()
        self.log = self.base / "server.log"

    def __enter__(self) -> ComfyClient:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def start(self) -> ComfyClient:
        """Start the server and wait until it answers; `with` is the better way, as it stops it too."""
        for name in FOLDERS:
            files.make_folder(self.base / name)
        if self.pack is not None:
            put_pack(self.base / "custom_nodes", self.pack)
        with socket.socket() as probe:  # a port that is free now
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        runner = Path(__file__).with_name("serve.py")
        command = [
            str(self.python), str(runner), str(self.comfyui / "main.py"),
            "--listen", "127.0.0.1", "--port", str(port),
            "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
            "--disable-auto-launch", "--disable-api-nodes", "--use-pytorch-cross-attention",
            *self.arguments,
        ]  # fmt: skip
        own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
        with or_failed(f"{self.log} could not be written"):
            log = self.log.open("wb")
        with log:
            try:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                    cwd=self.comfyui, env=self._environment(), start_new_session=os.name != "nt", **own_group,
                )  # fmt: skip
            except OSError as error:
                raise SetupError(f"ComfyUI could not be started with {self.python}: {error}") from error
        client = ComfyClient(f"http://127.0.0.1:{port}")
        self._wait_until_up(client)
        return client

    def stop(self) -> None:
        """Stop the server and all that it started. Harmless when there is none."""
        process, self.process = self.process, None
        if process is None:
            return
        _end_group(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=5)
        _end_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        environment["HF_HUB_OFFLINE"] = environment["TRANSFORMERS_OFFLINE"] = "1"
        # On few cores, one of them busy, threads that spin while they wait made a step 3 to 6 times slower;
        # threads that sleep cost nothing there, and use all cores where they are free.
        if (os.cpu_count() or 1) <= SMALL_MACHINE:
            environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0", **environment}
        environment.pop("PYTHONPATH", None)
        return {**environment, **self.environment}

    def _wait_until_up(self, client: ComfyClient) -> None:
        assert self.process is not None
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            if (code := self.process.poll()) is not None:
                what = f"ComfyUI stopped while it started (exit code {code})."
                break
            with suppress(PromptError):
                client.get("/system_stats")
                return
            time.sleep(0.2)
        else:
            what = f"ComfyUI did not answer within {self.timeout:.0f} s."
        raise SetupError(f"{what}\n{self.log_end()}", HINT)

    def log_end(self) -> str:
        """The end of the log, for an error message."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        except OSError:
            lines = []
        return f"The end of {self.log}:\n" + "\n".join(f"  | {line}" for line in lines)


HINT = (
    "If a package is missing, that ComfyUI wants another set than ours: install its own requirements.txt,\n"
    "or leave --comfyui and COMFYUI_DIR out to use the version that is known to work."
)


@contextmanager
def running(server: ComfyServer, hint: str) -> Iterator[tuple[ComfyClient, dict[str, Any]]]:
    """A server that is started with a line on it: its client, and its /system_stats.

    A prompt that fails is a SetupError with the end of the log and this hint.
    """
    with ExitStack() as stack:
        with stage("Starting ComfyUI") as current:
            client = stack.enter_context(server)
            stats = client.get("/system_stats")
            current.result = machine(stats)
        try:
            yield client, stats
        except PromptError as error:
            raise SetupError(f"{error}\n{server.log_end()}", hint) from error


def put_pack(custom_nodes: Path, pack: Path, name: str = link.COMFYUI.name) -> None:
    """Link (or copy) the pack into a custom_nodes folder of our own making."""
    place = custom_nodes / name
    if files.is_link(place) and not (place.exists() and place.samefile(pack)):
        files.unlink(place)  # this repository was moved
    link.put(place, pack)


def _end_group(process: subprocess.Popen[bytes], how: int) -> None:
    """Signal the server and what it started; they share a group of their own."""
    if os.name == "nt":
        if process.poll() is None:
            tree = ["taskkill", "/T", "/F", "/PID", str(process.pid)]
            subprocess.run(tree, capture_output=True, check=False)
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)
