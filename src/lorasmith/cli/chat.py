"""lorasmith chat: chat with an adapter in the terminal, or through a pipe."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING

from lorasmith.cli.flags import Parser, base_of, given
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen, printable
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.values import check, did_you_mean
from lorasmith.data.rows.conversation import Message
from lorasmith.errors import LorasmithError
from lorasmith.i18n import _, listed

if TYPE_CHECKING:
    from lorasmith.engine.request import Event

StreamAnswer = Callable[[Sequence[Message], str | None], Iterator["Event"]]
COMMANDS = {
    "/adapter": _("NAME: switch to this adapter; without NAME, list the adapters"),
    "/base": _("Switch to the base model, without an adapter"),
    "/again": _("Answer the last message again, for example after switching"),
    "/reset": _("Clear the conversation"),
    "/help": _("Show this list; to send a message that starts with /, type //"),
    "/exit": _("Quit (same as Ctrl-D)"),
}


def parser() -> Parser:
    """The options: adapters, base model, sampling."""
    parser = Parser(
        "chat",
        "RUN ...",
        _(
            "Chat with an adapter. /adapter NAME switches adapters, /base switches to the base model, /help "
            "lists all commands."
        ),
    )
    parser.own.add_argument(
        "runs", metavar="RUN", nargs="+", help=_("Run or adapter folders; all must share one base model")
    )
    parser.own.add_argument("--system", metavar="TEXT", help=_("System message at the start of the conversation"))
    parser.add_base()
    parser.add_section("sampling")
    return parser


def run(args: argparse.Namespace) -> int:
    """Chat until the end of input or /exit. Raises LorasmithError."""
    model, settings = base_of(args), check(SamplingConfig, given(args).get("sampling", {}), "sampling")
    with importing():
        from lorasmith.adapters.session import open_adapters
        from lorasmith.engine.engine import Engine, generate
        from lorasmith.engine.request import Request

    with Screen(json=True) as screen:  # standard output is for the answers
        session = open_adapters(args.runs, model, screen)
        engine, template, answers = Engine(session.base, slots=1, prepack=True), session.template, count()

        def answer(messages: Sequence[Message], adapter: str | None) -> Iterator["Event"]:
            # a new seed for each answer, or /again would repeat it
            sampling = settings.model_copy(update={"seed": (settings.seed + next(answers)) % 2**32})
            request = Request(template.encode_prompt(messages), sampling, adapter, template.stop_ids)
            return generate(engine, [request])

        Chat(answer, session.names, args.system, screen).talk()
    return 0


class Chat:
    """One conversation. Answers go to standard output, everything else to `screen`."""

    def __init__(self, answer: StreamAnswer, names: Sequence[str], system: str | None, screen: Screen) -> None:
        self.answer, self.names, self.screen = answer, names, screen
        self.adapter: str | None = next(iter(names), None)
        self.start = [Message("system", system)] if system else []
        self.messages = list(self.start)
        self.interactive = sys.stdin.isatty()
        self.clean = printable if sys.stdout.isatty() else str

    def talk(self) -> None:
        """Read lines until the end of input or /exit. An error ends it in a pipe; at a terminal it is shown."""
        if self.interactive:
            with suppress(ImportError):  # Windows has its own line editing
                import_module("readline")  # once imported, input() has line editing and history
            self.screen.say(_("Chatting with {name}. Type /help for commands, Ctrl-D to quit.", name=self._who()))
        while True:
            try:
                line = self._line()
                if line is None or not self.take(line):
                    return
            except KeyboardInterrupt:  # between two replies: discards the line, as in a shell
                if not self.interactive:
                    raise
                print()
            except LorasmithError as error:
                if not self.interactive:
                    raise
                self.screen.warn(str(error))

    def take(self, line: str) -> bool:
        """Handle one line, a command or a message. Returns False to quit."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            return self._command(*text.split(maxsplit=1))
        if text:
            self._reply(text.removeprefix("/") if text.startswith("//") else text)
        return True

    def _command(self, word: str, rest: str = "") -> bool:
        if word in ("/exit", "/quit"):
            return False
        if word == "/help":
            self.screen.say("\n".join(f"{name:<9} {text}" for name, text in COMMANDS.items()))
        elif word == "/reset":
            self.messages = list(self.start)
            self.screen.say(_("Conversation cleared."))
        elif word == "/base":
            self._switch(None)
        elif word == "/adapter" and rest in self.names:
            self._switch(rest)
        elif word == "/adapter":
            text = _("Available adapters: {names}.", names=listed(self.names))
            if rest:
                text += " " + _("Unknown adapter {name!r}.", name=rest) + did_you_mean(rest, self.names)
            self.screen.say(text)
        elif word == "/again":
            self._again()
        else:
            self.screen.say(
                _("Unknown command {word}.", word=word)
                + did_you_mean(word, COMMANDS)
                + " "
                + _("Type /help for a list.")
            )
        return True

    def _switch(self, adapter: str | None) -> None:
        self.adapter = adapter
        self.screen.say(_("Now chatting with {name}.", name=self._who()))

    def _who(self) -> str:
        if not self.names:
            return _("the model")
        return _("the base model") if self.adapter is None else self.adapter

    def _again(self) -> None:
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            self.screen.say(_("There is no message to answer again yet."))
            return
        text = self.messages[asked[-1]].content
        self.messages = self.messages[: asked[-1]]
        self._reply(text)

    def _reply(self, text: str) -> None:
        """Stream the answer. If it is empty, the message is not kept in the conversation."""
        messages = [*self.messages, Message("user", text)]
        parts: list[str] = []
        finish = None
        with self._stoppable() as is_stopped:
            for event in self.answer(messages, self.adapter):
                print(self.clean(event.text), end="", flush=True)
                parts.append(event.text)
                finish = event.finish
                if is_stopped():
                    break
        print(flush=True)
        if finish == "length" and self.interactive:
            self.screen.say(_("(truncated at the length limit; raise it with --max-new-tokens)"))
        reply = "".join(parts)
        if reply.strip():
            self.messages = [*messages, Message("assistant", reply)]

    @contextmanager
    def _stoppable(self) -> Iterator[Callable[[], bool]]:
        """At a terminal, Ctrl-C ends the reply and a second one the program; in a pipe, the first ends the program."""
        pressed: list[int] = []
        if not self.interactive:
            yield lambda: False
            return

        def once(number: int, _frame: object) -> None:
            if pressed:
                raise KeyboardInterrupt
            pressed.append(number)

        before = signal.signal(signal.SIGINT, once)
        try:
            yield lambda: bool(pressed)
        finally:
            signal.signal(signal.SIGINT, before)

    def _line(self) -> str | None:
        """The next line; None at the end of input, or after Ctrl-D at a terminal."""
        if not self.interactive:
            return sys.stdin.readline() or None
        try:
            return input("> ")
        except EOFError:
            print()
            return None
