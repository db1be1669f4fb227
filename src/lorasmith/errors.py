"""The exceptions for everything that a user can cause or fix. Imports nothing.

    LorasmithError
    ├── ConfigError          an option or a key of the configuration is wrong
    ├── DataError            a data file cannot be read, or a row cannot be trained on
    ├── ModelError           a base model cannot be found, read or trusted
    ├── AdapterError         an adapter is invalid, does not match its base model, or has no effect
    ├── RunError             a run folder already exists, is unfinished, or cannot be resumed
    ├── TrainingError        training cannot continue, such as after a NaN loss
    ├── OutOfMemoryError     an allocation failed; other requests or runs can go on
    └── MissingExtraError    an optional package is not installed; the message says how to install it

The command line prints the problems without a traceback and exits with `exit_code`.
"""


class LorasmithError(Exception):
    """One or several problems. Each is a full sentence that says where the problem is and how to fix it."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(LorasmithError):
    """An option or a key of the configuration is wrong."""


class DataError(LorasmithError):
    """A data file cannot be read, or a row cannot be trained on."""


class ModelError(LorasmithError):
    """A base model cannot be found, read or trusted."""


class AdapterError(LorasmithError):
    """An adapter is invalid, does not match its base model, or has no effect."""


class RunError(LorasmithError):
    """A run folder already exists, is unfinished or cannot be resumed."""


class TrainingError(LorasmithError):
    """Training cannot continue or would not succeed."""


class OutOfMemoryError(LorasmithError):
    """An allocation failed, in the memory of the machine, of a container or of a GPU."""


class MissingExtraError(LorasmithError):
    """An optional package is not installed; the message says how to install it."""


# What libraries raise for input that they cannot handle. Caught only around a call of a library, to turn it into a
# message.
LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class Interrupted(KeyboardInterrupt):
    """The user pressed Ctrl-C and the work was saved; the message says where. The command line exits with 130."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of a library's error message, or the type of the error if the message is empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
