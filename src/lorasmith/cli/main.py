"""The command line: finds the verb, and is the only place where an error becomes a message. Loads no torch."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from io import TextIOWrapper
from typing import TextIO

from lorasmith.cli.streams import open_closed, outliving_readers, silence_unread
from lorasmith.errors import ConfigError, LorasmithError
from lorasmith.i18n import LANGUAGES, _, foreign, lend_to_argparse, listed
from lorasmith.system.memory import enough_memory
from lorasmith.version import installed_version

# The machine says no.
OUR_FAULT_IS_NOT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EIO)
LASTING = ("train", "demo", "merge", "serve")  # what they do is there for itself, whoever reads what they say


# Threads of libgomp that wait for each other spin 300,000 turns before they sleep: beside one other busy program that
# made a training ten times slower. Must be set before torch is loaded; see docs/decisions.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# oneDNN keeps up to 1,024 kernels, one for every shape: half a GiB in a training, whose rows have many lengths. A step
# needs fifty to a hundred, and fewer than it needs would be made again in every layer.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "160")


def verbs() -> dict[str, str]:
    """Every verb with what it does; a function, because the language is chosen after this file is read."""
    return {
        "init": _("Suggest a training configuration from your data"),
        "train": _("Train an adapter on your data"),
        "check": _("Check data, model, memory and time before training"),
        "demo": _("Fine-tune a small model on real conversations in minutes"),
        "chat": _("Chat with adapters and compare them with the base model"),
        "generate": _("Answer a prompt, a file of prompts or standard input"),
        "serve": _("Serve adapters with an OpenAI-compatible API"),
        "eval": _("Compare adapters with their base model: loss, answers, forgetting"),
        "merge": _("Merge an adapter into its base model"),
        "info": _("Show what a run or adapter folder contains"),
        "list": _("List the runs in a folder with state, data, losses and size"),
        "plot": _("Plot loss curves in the terminal or to a file"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0: done, 2: the user can mend it, 130: Ctrl-C, 141: the reader of our pipe went away."""
    open_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a reply may hold what this terminal cannot write
    try:
        code = dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except LorasmithError as error:
        tell(*error.problems)
        return error.exit_code
    except KeyboardInterrupt as stop:  # Interrupted has a text: where the work was saved
        with suppress(OSError):  # the terminal may be gone
            print(stop, end="\n" if str(stop) else "", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        if error.errno not in OUR_FAULT_IS_NOT:
            raise
        why = foreign(error.strerror)
        tell(
            _("{path}: {why}", path=error.filename, why=why)
            if error.filename
            else _("could not write the output: {why}", why=why)
        )
        return 2
    finally:
        silence_unread()


def tell(*problems: str) -> None:
    """Each problem on standard error, wrapped at words in a terminal."""
    from lorasmith.cli.screen import Screen  # rich is for those who see something of it: not for every --version

    with outliving_readers():
        screen = Screen(json=True)
        for problem in problems:
            screen.fail(problem)


def dispatch(argv: list[str]) -> int:
    """The verb's exit code. Raises LorasmithError, and what the verb raises."""
    argv = everywhere(argv)
    lend_to_argparse()
    if not argv or argv[0] in ("-h", "--help"):
        show_help(sys.stdout)
        return 0 if argv else 2
    if argv[0] == "--version":
        print("lorasmith", installed_version() or _("(not installed; running from the source folder)"))
        return 0
    verb = argv[0]
    if verb not in verbs():
        raise ConfigError(_unknown_verb(verb))
    module = import_module(f"lorasmith.cli.{verb}")
    try:
        args, problems = module.parser().read(argv[1:])
    except SystemExit as done:  # argparse leaves this way after --help
        return int(done.code or 0)
    if problems:
        raise ConfigError(*problems, *import_module("lorasmith.cli.flags").config_problems(args))
    with enough_memory(), outliving_readers() if verb in LASTING else nullcontext():
        return int(module.run(args))


def everywhere(argv: list[str]) -> list[str]:
    """`argv` without --lang and --plain, which any verb takes; they become variables, for programs started from here.

    Must come before a verb is imported: its options' texts are made then. Raises ConfigError for an unknown language.
    """
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif word == "--plain":
            os.environ["LORASMITH_PLAIN"] = "1"
        elif flag == "--lang":
            os.environ["LORASMITH_LANG"] = _known_language(value if equals else next(words, ""))
        else:
            rest.append(word)
    return rest


def _known_language(name: str) -> str:
    if name not in LANGUAGES:
        raise ConfigError(
            _("--lang: unknown language {name!r}; choose from {known}", name=name, known=listed(LANGUAGES))
        )
    return name


def show_help(file: TextIO) -> None:
    """Every verb in one line."""
    print(_("usage: lorasmith COMMAND ...      lorasmith COMMAND --help"), end="\n\n", file=file)
    print(_("Train, evaluate and serve LoRA adapters for language models."), end="\n\n", file=file)
    for verb, text in verbs().items():
        print(f"  {verb:<10}{text}", file=file)
    print(file=file)
    for flag, text in (
        ("--lang zh|en", _("Display language (default: from LORASMITH_LANG or LANG)")),
        ("--plain", _("Plain output for screen readers: no bars, boxes or colours")),
        ("--version", _("Show the version")),
    ):
        print(f"  {flag:<14}{text}", file=file)


def _unknown_verb(verb: str) -> str:
    from lorasmith.config.values import closest

    return _("unknown command {verb!r}; available commands: {verbs}.", verb=verb, verbs=listed(verbs())) + closest(
        verb, verbs()
    )
