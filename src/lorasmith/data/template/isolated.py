"""Renders chat templates that come with an adapter in a process of their own, which has limits on time and memory.

A template is a program: a few characters of Jinja can loop for ever, or multiply a text until memory ends, and nothing
inside a thread of Python can stop a single operation that does so. A process can be killed. This one reads one JSON
object per line, answers with one per line, and ends with its standard input.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterError
from lorasmith.i18n import _

SECONDS = 5.0  # for one text; a good template takes milliseconds
START_SECONDS = 120.0  # until the process is ready
EXTRA_MIB = 1024  # memory that the process may take once it is ready
GROWTH = 4  # a text may be so many times as long as its messages,
LEAST_TEXT = 2**21  # or have so many characters
_MEMORY, _LENGTH = "memory", "length"  # answers other than a text or the reason of an error


class IsolatedRenderer:
    """Renders one text at a time, in a process that starts with the first one. Safe to call from several threads.

    trusted: the chat templates that need no such process, such as the base model's own.
    """

    def __init__(self, trusted: frozenset[str]) -> None:
        self.trusted = trusted | {""}
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        """The text of `messages`. options: the other variables and arguments of transformers' `apply_chat_template`.

        Raises AdapterError if the template exceeds a limit, and ValueError if it rejects the messages.
        """
        with self._lock:
            answer = self._answer(json.dumps({"template": template, "messages": messages, "options": dict(options)}))
        if "text" in answer:
            return str(answer["text"])
        if answer.get("limit") == _MEMORY:
            raise AdapterError(_("the chat template takes more than {mib} MiB of memory.", mib=EXTRA_MIB))
        if answer.get("limit") == _LENGTH:
            raise AdapterError(_("the chat template makes a text that is far longer than the messages."))
        raise ValueError(answer["error"])

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _answer(self, question: str) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = _start()
        began = time.monotonic()
        line = _ask(self._process, question + "\n", SECONDS)
        if not line and time.monotonic() - began >= SECONDS:
            self.close()
            raise AdapterError(_("the chat template takes longer than {seconds:g} s.", seconds=SECONDS))
        answer: dict[str, Any] = json.loads(line or json.dumps({"limit": _MEMORY}))  # killed for its memory
        if "limit" in answer:  # what it has allocated goes with it
            self.close()
        return answer


def _start() -> "subprocess.Popen[str]":
    """A process that is ready. Raises AdapterError if it does not get ready."""
    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
        start_new_session=True,  # so that Ctrl-C in a terminal does not reach it
    )
    if not _ask(process, "", START_SECONDS):
        process.kill()
        process.communicate()
        raise AdapterError(_("the process that renders chat templates of adapters could not be started."))
    return process


def _ask(process: "subprocess.Popen[str]", line: str, seconds: float) -> str:
    """The line that the process answers; empty if it takes longer, or ends. It is then killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
        return answer if answer.endswith("\n") else ""
    except BrokenPipeError:
        return ""
    finally:
        timer.cancel()


# --- in the other process ---------------------------------------------------------------------------------------------


def main() -> None:
    """Answer the questions of standard input until it ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _say({})
    for line in sys.stdin:
        question = json.loads(line)
        _limit_time()
        try:
            found: Any = render_jinja_template(  # its annotation is wrong: it returns texts and spans
                conversations=[question["messages"]], chat_template=question["template"], **question["options"]
            )
            text: str = found[0][0]
            is_long = len(text) > max(LEAST_TEXT, GROWTH * len(line))
            answer = {"limit": _LENGTH} if is_long else {"text": text}
        except MemoryError:
            answer = {"limit": _MEMORY}
        except Exception as error:  # noqa: BLE001 (a template may raise anything; raised again in the server)
            answer = {"error": str(error)[:2000] or type(error).__name__}
        _say(answer)


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _limit_memory() -> None:
    """Let this process take at most EXTRA_MIB more than now, where the system can."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = pages * resource.getpagesize() + EXTRA_MIB * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _limit_time() -> None:
    """Let this process end by itself soon after its time, in case the server has been killed."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(usage.ru_utime + usage.ru_stime + 2 * SECONDS) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
