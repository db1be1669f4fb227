"""lorasmith generate: answers to a prompt, to a file of prompts, or to lines from a pipe."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.cli.flags import Parser, base_of, given
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen, printable
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.values import check
from lorasmith.data.read.prompts import as_record, parse_prompts, read_prompts
from lorasmith.data.rows.conversation import Conversation, Record
from lorasmith.errors import ConfigError
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.engine.request import Event

Events = Callable[
    [Sequence[Conversation]], Iterator["Event"]
]  # answers to prompts; a prompt's last message is a placeholder for the answer


def parser() -> Parser:
    """The options: adapter, prompts, sampling."""
    about = _("Generate answers to a prompt, to the prompts in a file, or to lines from standard input.")
    parser = Parser("generate", "RUN [PROMPT]", about)
    parser.own.add_argument("run", metavar="RUN", help=_("Run or adapter folder"))
    parser.own.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help=_("The prompt (default: read from standard input)")
    )
    parser.own.add_argument(
        "--file", metavar="FILE", help=_("File of prompts: one per line, or rows as for training (.jsonl, .csv)")
    )
    parser.add_switch("--json", _("Print one line of JSON per prompt, with prompt, reply, finish and tokens"))
    parser.add_base()
    parser.add_section("sampling")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print one answer for each prompt. Raises LorasmithError."""
    model, settings = base_of(args), check(SamplingConfig, given(args).get("sampling", {}), "sampling")
    records = prompts_of(args)
    with importing():
        from lorasmith.adapters.session import open_adapters
        from lorasmith.engine.engine import Engine, generate
        from lorasmith.engine.request import Request

    with Screen(json=True) as screen:  # standard output is for the answers
        session = open_adapters([args.run], model, screen)
        template, adapter = session.template, next(iter(session.names), None)
        prompts = [template.conversation(record) for record in records]

        def events(conversations: Sequence[Conversation]) -> Iterator["Event"]:
            ids = [template.encode_prompt(one.messages[:-1], one.tools, one.source) for one in conversations]
            requests = [Request(one, settings, adapter, template.stop_ids) for one in ids]
            return generate(Engine(session.base, prepack=True), requests)

        if len(prompts) == 1 and not args.json:
            answer_one(prompts[0], events)
        else:
            answer_all(prompts, events, args.json, screen)
    return 0


def prompts_of(args: argparse.Namespace) -> list[Record]:
    """The prompts from the command line, --file or standard input: JSON if it begins with '{', else one per line.

    Raises LorasmithError.
    """
    if args.file is not None and args.prompt is not None:
        raise ConfigError(_("a prompt and --file cannot be used together; give only one of them"))
    if args.prompt is not None and not args.prompt.strip():
        raise ConfigError(_("the prompt is empty: give one after RUN, with --file, or on standard input"))
    if args.prompt is not None:
        return [as_record(args.prompt)]
    if args.file is not None:
        return read_prompts(Path(args.file))
    if sys.stdin.isatty():
        print(_("Enter one prompt per line, then press Ctrl-D to get the answers."), file=sys.stderr)
    text = sys.stdin.read()
    found = parse_prompts(text.split("\n"), text.lstrip()[:1] == "{", _("standard input"))
    if not found:
        raise ConfigError(_("no prompt given: add one after RUN, with --file, or on standard input"))
    return found


def answer_one(prompt: Conversation, events: Events) -> None:
    """Print the answer alone, as it is generated."""
    clean = printable if sys.stdout.isatty() else str
    for event in events([prompt]):
        print(clean(event.text), end="", flush=True)
    print()


def answer_all(prompts: Sequence[Conversation], events: Events, as_json: bool, screen: Screen) -> None:
    """Print the answers in the order of the prompts, each as soon as all before it are complete."""
    texts, tokens, finish = [""] * len(prompts), [0] * len(prompts), [""] * len(prompts)
    shown, start = 0, time.monotonic()
    wait = screen.live and sys.stdout.isatty()  # a live progress bar and answers would overwrite each other
    for event in events(prompts):
        texts[event.key] += event.text
        tokens[event.key] += 1
        finish[event.key] = event.finish or ""
        if event.finish:
            speed = sum(tokens) / max(time.monotonic() - start, 1e-9)
            done = sum(end != "" for end in finish)
            screen.progress(_("answers"), done, len(prompts), tokens_per_second=speed)
        while shown < len(prompts) and finish[shown] and not (wait and not all(finish)):
            print_answer(prompts[shown], texts[shown], finish[shown], tokens[shown], as_json)
            shown += 1


def print_answer(prompt: Conversation, text: str, finish: str, tokens: int, as_json: bool) -> None:
    """Print one prompt and its answer, as a line of JSON or as text."""
    question = prompt.messages[-2].content
    if as_json:
        answer = {"prompt": question, "reply": text, "finish": finish, "tokens": tokens}
        print(json.dumps(answer, ensure_ascii=False), flush=True)
        return
    clean = printable if sys.stdout.isatty() else str
    print(clean(f"> {question}\n{text}\n"), flush=True)
