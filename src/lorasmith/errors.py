"""Every error that a user can cause. Imports nothing.

    LorasmithError
    ├── ConfigError          an option or a key of the configuration is wrong
    ├── DataError            a file of examples cannot be read, or a row cannot be learned from
    ├── ModelError           a base model cannot be found, read or trusted
    ├── AdapterError         an adapter folder does not fit: its base, its keys, its effect
    ├── RunError             a run folder exists already, is unfinished, or cannot be resumed
    ├── TrainingError        a training stopped itself: the loss is no longer a number
    ├── OutOfMemoryError     an allocation failed; what it was for is given up, the rest goes on
    └── MissingExtraError    an optional package is needed; the text says how to install it

The command line prints the problems, without traceback, and exits with `exit_code`.
"""


class LorasmithError(Exception):
    """One or several problems, each a whole sentence that says where, what was found and what to do."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(LorasmithError):
    """An option or a key of the configuration is wrong."""


class DataError(LorasmithError):
    """A file of examples cannot be read, or a row cannot be learned from."""


class ModelError(LorasmithError):
    """A base model cannot be found, read or trusted."""


class AdapterError(LorasmithError):
    """An adapter folder does not fit: its base, its keys or its effect."""


class RunError(LorasmithError):
    """A run folder exists already, is unfinished or cannot be resumed."""


class TrainingError(LorasmithError):
    """A training stopped itself before it could do harm."""


class OutOfMemoryError(LorasmithError):
    """An allocation failed: of the machine's memory, of a container's, or of a card's."""


class MissingExtraError(LorasmithError):
    """An optional package is needed; the text says how to install it."""


# What a library raises where it cannot do what it is given. Caught only around calls of one, and told in a sentence.
LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came and the work was saved; the text says where. The command line exits with 130."""


def first_line(error: BaseException) -> str:
    """What a library says, which may be many lines: the first that is not empty, or else the kind of the error."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
