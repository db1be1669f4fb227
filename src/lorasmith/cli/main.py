"""The entry point of the command line: runs a command and turns errors into messages and exit codes. Loads no torch."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from io import TextIOWrapper
from typing import TextIO

from lorasmith.cli.streams import discard_unwritable_output, ignoring_write_errors, reopen_closed_streams
from lorasmith.errors import ConfigError, LorasmithError
from lorasmith.i18n import LANGUAGES, _, foreign, listed, translate_argparse
from lorasmith.system.memory import convert_memory_errors
from lorasmith.version import installed_version

# Errors of the system that are reported as a message; any other OSError is a bug and gets a traceback.
SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EIO)
IGNORE_BROKEN_PIPE = (
    "train",
    "study",
    "demo",
    "merge",
    "export",
    "import",
    "push",
    "combine",
    "report",
    "serve",
)  # commands that finish even if nobody reads their output


# Waiting threads of libgomp spin 300,000 times before they sleep, which made training ten times slower beside one
# other busy process. Must be set before torch is loaded; see docs/decisions.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# oneDNN caches up to 1,024 kernels, one per shape: half a GiB in training, where rows have many lengths. A step needs
# 50 to 100; a smaller cache would rebuild kernels in every layer.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "160")


def verbs() -> dict[str, str]:
    """Every command with its description. A function, because the language is chosen after this module is imported."""
    return {
        "init": _("Suggest a training configuration from your data"),
        "train": _("Train an adapter on your data"),
        "check": _("Check data, model, memory and time before training"),
        "demo": _("Fine-tune a small model on real conversations in minutes"),
        "chat": _("Chat with adapters and compare them with the base model"),
        "generate": _("Answer a prompt, a file of prompts or standard input"),
        "serve": _("Serve adapters with an OpenAI-compatible API"),
        "eval": _("Compare adapters with their base model: loss, answers, forgetting"),
        "report": _("Report what a run learned and forgot, and what to try next"),
        "study": _("Train a grid of options and compare the runs"),
        "merge": _("Merge an adapter into its base model"),
        "export": _("Write the trained model for other programs, compared with it"),
        "push": _("Upload an adapter or an exported model to Hugging Face"),
        "verify": _("Check an exported file against its certificate or its run"),
        "import": _("Import an adapter that another program trained"),
        "combine": _("Combine several adapters of one base model into one"),
        "info": _("Show what a run or adapter folder contains"),
        "list": _("List the runs in a folder with state, data, losses and size"),
        "plot": _("Plot loss curves in the terminal or to a file"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: success; 2: a problem that the user can fix; 130: Ctrl-C; 141: the reader of our output closed the pipe.
    """
    reopen_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a reply may contain characters that this terminal cannot encode
    try:
        code = dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except LorasmithError as error:
        print_errors(*error.problems)
        return error.exit_code
    except KeyboardInterrupt as stop:  # Interrupted also says where the work was saved
        with suppress(OSError):  # the terminal may be closed
            print(stop, end="\n" if str(stop) else "", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        why = foreign(error.strerror)
        print_errors(
            _("{path}: {why}", path=error.filename, why=why)
            if error.filename
            else _("could not write the output: {why}", why=why)
        )
        return 2
    finally:
        discard_unwritable_output()


def print_errors(*problems: str) -> None:
    """Print each problem to standard error."""
    from lorasmith.cli.screen import Screen  # here, because rich would slow down --version

    with ignoring_write_errors():
        screen = Screen(json=True)
        for problem in problems:
            screen.fail(problem)


def dispatch(argv: list[str]) -> int:
    """Run the command in `argv` and return its exit code. Raises whatever the command raises."""
    argv = take_global_options(argv)
    translate_argparse()
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
    except SystemExit as done:  # argparse exits after --help
        return int(done.code or 0)
    if problems:
        raise ConfigError(*problems, *import_module("lorasmith.cli.flags").config_problems(args))
    with convert_memory_errors(), ignoring_write_errors() if verb in IGNORE_BROKEN_PIPE else nullcontext():
        return int(module.run(args))


def take_global_options(argv: list[str]) -> list[str]:
    """Remove --lang and --plain from `argv` and set their environment variables, which child processes inherit.

    Call this before importing a command, because its help texts are translated on import. Raises ConfigError for an
    unknown language.
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
    """Print the usage and one line per command."""
    print(_("usage: lorasmith COMMAND ...      lorasmith COMMAND --help"), end="\n\n", file=file)
    print(_("Train, evaluate and serve LoRA adapters for language models."), end="\n\n", file=file)
    for verb, text in verbs().items():
        print(f"  {verb:<10}{text}", file=file)
    print(file=file)
    for flag, text in (
        ("--lang zh|en", _("Display language (default: from LORASMITH_LANG or LANG)")),
        ("--plain", _("Plain output for screen readers: no bars, boxes or colors")),
        ("--version", _("Show the version")),
    ):
        print(f"  {flag:<14}{text}", file=file)


def _unknown_verb(verb: str) -> str:
    from lorasmith.config.values import did_you_mean

    return _("unknown command {verb!r}; available commands: {verbs}.", verb=verb, verbs=listed(verbs())) + did_you_mean(
        verb, verbs()
    )
