"""The address, and how the server ends."""

import signal
import socket
from pathlib import Path

import openai
import pytest

from lorasmith.cli.main import main
from lorasmith.serve.server import is_public
from tests.support import tiny
from tests.support.commands import server_process
from tests.support.serving import LONG, running, slow


def test_the_second_signal_tells_those_who_listen(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs, context=120) as served:
        slow(served, monkeypatch)
        stream = served.client().chat.completions.create(model="loud", **LONG, stream=True)
        next(iter(stream))
        for _time in range(2):
            served.manager.worker._loop.call_soon_threadsafe(served.server.handle_exit, signal.SIGINT, None)
        with pytest.raises(openai.APIError, match="the server shut down"):
            list(stream)


def test_a_public_address_needs_keys(runs: Path, tmp_path: Path, capsys):
    assert main(["serve", str(runs), "--host", "0.0.0.0"]) == 2
    assert "--keys" in capsys.readouterr().err
    (tmp_path / "keys").write_text("hello\n")
    assert main(["serve", str(runs), "--keys", str(tmp_path / "keys")]) == 2
    assert "line 1" in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_end(runs: Path):
    """The start screen says what there is; SIGTERM lets a running stream finish, then 0."""
    words = ["serve", str(runs), "--model", str(tiny.model_folder()), "--port", "0", "--context", "120"]
    program, shown = server_process(*words)
    assert "calm" in shown
    assert "not valid JSON" in shown
    assert "not finished" in shown
    url = next(word for word in shown.split() if word.startswith("http://"))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    stream = client.chat.completions.create(model="loud", **LONG, stream=True)
    next(iter(stream))
    program.send_signal(signal.SIGTERM)
    pieces = list(stream)
    assert pieces[-1].choices[0].finish_reason
    assert program.wait(15) == 0


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_and_ctrl_c_say_what_is_waited_for(runs: Path, sent: signal.Signals):
    words = ["serve", str(runs), "--model", str(tiny.model_folder()), "--port", "0", "--context", "120"]
    program, shown = server_process(*words)
    url = next(word for word in shown.split() if word.startswith("http://"))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    stream = client.chat.completions.create(model="loud", **LONG, stream=True)
    next(iter(stream))
    program.send_signal(sent)
    assert list(stream)[-1].choices[0].finish_reason
    assert program.wait(15) == 0
    assert program.stdout is not None
    text = program.stdout.read()
    assert "waiting up to 30 s for 1 running requests. Press Ctrl-C again to stop at once." in text
    assert "POST /v1/chat/completions 200" in text
    assert "Traceback" not in text


def test_an_address_that_is_taken(runs: Path, refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = refused(runs, "--port", port)
    assert line.startswith(
        f"127.0.0.1:{port}: cannot listen on this address: Address already in use. Use another --port, "
    )


@pytest.mark.parametrize(
    ("host", "public"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("192.0.2.1", True)],
)
def test_an_address_that_others_can_reach(host: str, public: bool) -> None:
    assert is_public(host) == public
