"""The server around a `with`: up inside, gone after, words when it fails. ComfyUI is a few lines here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from installer.client import ComfyClient, PromptError
from installer.console import SetupError
from installer.paths import ROOT
from installer.server import ComfyServer

WEB = """
    import http.server, json, subprocess, sys
    port = int(sys.argv[sys.argv.index("--port") + 1])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)

    class Web(http.server.BaseHTTPRequestHandler):
        def answer(self, status, body):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self):
            self.answer(200, {"argv": sys.argv, "system": {}})

        def do_POST(self):
            error = {"message": "Prompt outputs failed validation", "details": "", "type": "x"}
            reason = {"message": "Value 3 bigger than max of 1", "details": "ratio"}
            nodes = {"4": {"class_type": "ToMe", "errors": [reason]}}
            self.answer(400, {"error": error, "node_errors": nodes})

    http.server.ThreadingHTTPServer(("127.0.0.1", port), Web).serve_forever()
"""


def host(folder: Path, code: str) -> Path:
    folder.mkdir()
    (folder / "main.py").write_text(textwrap.dedent(code))
    return folder


def server(tmp_path: Path, code: str, **options) -> ComfyServer:
    return ComfyServer(host(tmp_path / "host", code), tmp_path / "base", pack=None, **options)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
        return False  # ended, and waiting for whoever started it to look
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def gone(pid: int, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def child_of(running: ComfyServer) -> int:
    return int(running.log.read_text().partition("child ")[2].split()[0])


posix = pytest.mark.skipif(os.name == "nt", reason="looks processes up by POSIX signals")


def test_is_up_inside_and_gone_after(tmp_path):
    running = server(tmp_path, WEB)
    with running as client:
        process = running.process
        argv = client.get("/system_stats")["argv"]
        assert argv[argv.index("--listen") + 1] == "127.0.0.1"
        assert argv[argv.index("--base-directory") + 1] == str(tmp_path / "base")
        child = child_of(running)
    assert process.poll() is not None
    assert os.name == "nt" or gone(child)
    running.stop()


@posix
@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_is_gone_after_an_exception(tmp_path, failure):
    running = server(tmp_path, WEB)
    with pytest.raises(failure), running:
        pid, child = running.process.pid, child_of(running)
        raise failure
    assert gone(pid) and gone(child)


@posix
def test_is_gone_when_the_program_that_started_it_is_killed(tmp_path):
    folder = host(tmp_path / "host", WEB)
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from installer.server import ComfyServer
        running = ComfyServer(Path({str(folder)!r}), Path({str(tmp_path / "base")!r}), pack=None)
        running.start()
        print(running.process.pid, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)
    child = int((tmp_path / "base/server.log").read_text().partition("child ")[2].split()[0])
    os.kill(child, 9)  # whoever is killed outright can take only the server itself along


@posix
def test_one_that_ignores_the_polite_signal_is_ended(tmp_path):
    running = server(tmp_path, "    import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WEB)
    with running:
        pid = running.process.pid
    assert gone(pid)


def test_a_failed_start_shows_the_log_and_leaves_nothing(tmp_path):
    running = server(tmp_path, "    raise SystemExit('no module named flux_capacitor')")
    with pytest.raises(SetupError, match="flux_capacitor") as failed, running:
        pass
    assert "exit code 1" in str(failed.value) and failed.value.hint
    assert running.process is None


@posix
def test_one_that_never_answers_is_ended(tmp_path, monkeypatch):
    running = server(tmp_path, "    import time; time.sleep(600)", timeout=3)
    stop, pids = running.stop, []
    monkeypatch.setattr(running, "stop", lambda: (pids.append(running.process.pid), stop()))
    with pytest.raises(SetupError, match="did not answer within"), running:
        pass
    assert gone(*pids)


def test_a_python_that_is_none_is_told(tmp_path):
    with pytest.raises(SetupError, match="could not be started"), server(tmp_path, WEB, python="/no/python"):
        pass


def test_a_refused_prompt_carries_the_servers_words(tmp_path):
    with server(tmp_path, WEB) as client, pytest.raises(PromptError) as refused:
        client.post_prompt({})
    assert refused.value.status == 400
    assert "ToMe: Value 3 bigger than max of 1: ratio" in str(refused.value)


def test_nobody_there_is_told():
    with pytest.raises(PromptError, match="did not answer"):
        ComfyClient("http://127.0.0.1:9", timeout=2).get("/system_stats")


def test_a_proxy_is_not_asked_for_a_loopback_address(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server(tmp_path, WEB) as client:
        assert client.get("/system_stats")["system"] == {}
