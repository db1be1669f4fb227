"""The outermost boundary: help without torch, exit codes, one clear message."""

import errno
import subprocess
import sys
import time
from types import ModuleType

import pytest
from rich.cells import cell_len

from lorasmith.cli import demo, main
from lorasmith.cli.flags import Parser
from lorasmith.cli.main import verbs
from lorasmith.errors import DataError
from lorasmith.i18n import using_language

HEAVY = ("torch", "transformers", "datasets", "matplotlib")


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], *([verb, "--help"] for verb in verbs()), ["train", "--rr"]]
)
def test_help_and_usage_errors_load_nothing_heavy(argv):
    code = (
        "import sys; from lorasmith.cli.main import main; code = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if "--rr" in argv else 0), done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Traceback" not in done.stderr


def test_python_runs_it_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lorasmith", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lorasmith ")


def test_help_answers_at_once():
    best = min(seconds_of_help() for _try in range(3))
    assert best < 0.5


def seconds_of_help() -> float:
    start = time.perf_counter()
    code = "from lorasmith.cli.main import main; main(['train', '--help'])"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return time.perf_counter() - start


def test_help_lists_every_verb(capsys):
    assert main.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.split()[:1] == [verb] and len(line) < 80 for line in lines) for verb in verbs())
    assert main.main([]) == 2


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["tran"], "Did you mean 'train'?"),
        (["train", "d", "--r", "0"], "lora.r: invalid value '0': must be greater than 0"),
        (["train", "d", "--r"], "argument --r: expected one argument (see lorasmith train --help)"),
        (["train", "d", "--resume"], "--resume: specify the run to resume with --output RUN"),
        (["train", "d", "--resume", "--overwrite", "--output", "x"], "give only one of them"),
        (["merge", "run"], "the following arguments are required: --output"),
        (["info", "a", "b"], "unexpected argument 'b'"),
        (["demo", "--steps", "0"], "must be a whole number above 0"),
    ],
)
def test_a_usage_error_is_one_message_and_exit_code_2(capsys, argv, text):
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert text in err


def test_unknown_flags_and_wrong_values_come_together(capsys):
    assert main.main(["train", "d", "--rr", "3", "--r", "0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: unknown option --rr.")
    assert second.startswith("error: lora.r: ")


@pytest.mark.parametrize(
    "argv",
    [["--lang", "zh", "tran"], ["tran", "--lang", "zh"], ["--lang=zh", "tran", "--plain"], ["tran", "--lang=zh"]],
)
def test_the_language_may_stand_before_and_behind_the_verb(capsys, monkeypatch, argv):
    for name in ("LORASMITH_LANG", "LORASMITH_PLAIN", "LANGUAGE"):
        monkeypatch.setenv(name, "")
    assert main.main(argv) == 2
    assert capsys.readouterr().err.endswith("plot。你是不是想写 'train'？\n")
    assert main.take_global_options(["generate", "run", "--plain", "--", "--lang", "zh"]) == [
        "generate", "run", "--", "--lang", "zh"
    ]  # fmt: skip
    assert main.os.environ["LORASMITH_PLAIN"] == "1"


@pytest.mark.parametrize("argv", [["train", "--lang", "fr"], ["--lang"], ["--lang=", "train"]])
def test_an_unknown_language_is_refused(capsys, argv):
    assert main.main(argv) == 2
    assert "; choose from zh, en" in capsys.readouterr().err


def test_help_fits_into_a_terminal_in_chinese_too(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with using_language("zh"):
        about = " ".join(["训练、评估和使用语言模型的适配器。"] * 6)
        assert max(map(cell_len, Parser("demo", "", about).format_help().splitlines())) <= 60
        main.show_help(main.sys.stdout)
    assert max(map(cell_len, capsys.readouterr().out.splitlines())) <= 80


def demo_that(monkeypatch, error: BaseException) -> int:
    """The exit code when the work behind `lorasmith demo` raises `error`."""

    def fail(*_args: object, **_more: object) -> None:
        raise error

    module = ModuleType("lorasmith.demo.run")
    module.demo = fail
    monkeypatch.setitem(sys.modules, "lorasmith.demo.run", module)
    return main.main(["demo"])


def test_each_problem_is_a_line(capsys, monkeypatch):
    assert demo_that(monkeypatch, DataError("a.jsonl line 3: no", "a.jsonl line 5: {no}")) == 2
    assert capsys.readouterr().err == "error: a.jsonl line 3: no\nerror: a.jsonl line 5: {no}\n"


def test_what_the_machine_refuses_is_a_message(capsys, monkeypatch):
    assert demo_that(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "run/a")) == 2
    assert capsys.readouterr().err == "error: run/a: No space left on device\n"
    assert demo_that(monkeypatch, PermissionError(errno.EACCES, "Permission denied", "/x")) == 2


def test_ctrl_c_and_our_own_faults(monkeypatch):
    assert demo_that(monkeypatch, KeyboardInterrupt()) == 130
    for fault in (OSError(errno.EBADF, "bad"), ZeroDivisionError()):
        with pytest.raises(type(fault)):
            demo_that(monkeypatch, fault)


def test_a_reader_that_goes_away_is_no_traceback():
    code = "import sys; from lorasmith.cli.main import main; sys.exit(main(['--help']))"
    work = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert work.stdout is not None
    assert work.stderr is not None
    work.stdout.close()
    assert work.stderr.read() == b""
    assert work.wait() == 141
    work.stderr.close()


def test_every_verb_has_its_file():
    assert demo.__name__.rpartition(".")[2] in verbs()
    from importlib import import_module

    for verb in verbs():
        module = import_module(f"lorasmith.cli.{verb}")
        assert callable(module.parser)
        assert callable(module.run)
