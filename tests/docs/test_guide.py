"""docs/start.md, guide.md, concepts.md, serving.md, scale.md, their Chinese twins: every block is held, and holds."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lorasmith.cli.flags import config_of
from lorasmith.cli.main import verbs
from lorasmith.config.lora import LoraConfig
from lorasmith.config.study import load_study
from lorasmith.config.toml import Config, load_config
from lorasmith.data.rows.formats import recognize_format, row_problem
from lorasmith.engine.kv_cache import KVCache
from lorasmith.i18n import _, using_language
from lorasmith.serve.metrics import ServerMetrics
from lorasmith.serve.protocol import AdapterRequest, ChatRequest, CompletionRequest, StreamOptions
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAIRS = {
    "start": ("start.md", "start.zh.md"),
    "guide": ("guide.md", "guide.zh.md"),
    "concepts": ("concepts.md", "concepts.zh.md"),
    "serving": ("serving.md", "serving.zh.md"),
    "scale": ("scale.md", "scale.zh.md"),
}
PAGES = [name for pair in PAIRS.values() for name in pair]
KINDS = {
    "start": {"bash": 10, "json": 1, "text": 1},
    "guide": {"bash": 18, "json": 3, "toml": 4, "python": 2},
    "concepts": {"bash": 5, "python": 2},
    "serving": {"bash": 4, "python": 3, "yaml": 1},
    "scale": {"bash": 2},
}
COMMANDS = {"start": 14, "guide": 43, "concepts": 5, "serving": 3, "scale": 2}  # of lorasmith, by torchrun as well
BODIES = {"serving": 2}  # that curl sends
INLINE = {"start": 6, "guide": 12, "concepts": 6, "serving": 7, "scale": 1}  # flags in the sentences, at least
FAR_EAST = re.compile(r"[\u3000-\u9fff\uff00-\uffef]")
LABELS = ("base", "layout", "fast", "target", "layers", "params", "steps", "rate", "memory", "time")
SHELL_WORDS = {"make", "ollama", "vllm", ".", "lorasmith", "python", "curl", "printf", "torchrun", "lm_eval"}
BODY_OF = {"chat/completions": ChatRequest, "completions": CompletionRequest, "adapters": AdapterRequest}
# Flags of other programs that the sentences name.
FOREIGN = {"--max-lora-rank", "--max-loras", "--served-model-name", "--nnodes", "--nproc-per-node"}


def text(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text(name), re.MULTILINE | re.DOTALL)


def of_language(name: str, *languages: str) -> list[str]:
    return [body for language, body in blocks(name) if language in languages]


def lines(name: str) -> list[list[str]]:
    """The words of every line of the shell blocks."""
    joined = "".join(of_language(name, "bash", "sh"))
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.strip()]


def commands(name: str) -> list[list[str]]:
    """The words after `lorasmith`, or after `-m lorasmith` of torchrun."""
    started = [words for words in lines(name) if words[0] in ("lorasmith", "torchrun")]
    return [words[words.index("lorasmith") + 1 :] for words in started]


def requests(name: str) -> list[list[str]]:
    """Lines of curl."""
    return [words for words in lines(name) if words[0] == "curl"]


def prose(name: str) -> str:
    return re.sub(r"^```.*?^```$", "", text(name), flags=re.MULTILINE | re.DOTALL)


def headings(name: str) -> list[str]:
    return re.findall(r"^(#+ .*)$", prose(name), re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")


def kind_of(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_of_a_kind_that_is_held(name: str) -> None:
    found = [language for language, _body in blocks(name)]
    assert {language: found.count(language) for language in found} == KINDS[kind_of(name)]
    assert text(name).count("```") == 2 * len(found)
    assert len(lines(name)) >= len(commands(name)) == COMMANDS[kind_of(name)]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_parses_and_its_values_are_allowed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("extract.toml", "identity.toml", "mine.toml"):  # the guide's blocks, and what `init` writes
        (tmp_path / file).write_text("", "utf-8")
    for words in lines(name):
        assert words[0] in SHELL_WORDS, words
        if words[0] == "make":
            assert f"\n{words[1]}:" in (DOCS.parent / "Makefile").read_text("utf-8")
        if words[0] == "python":
            assert (DOCS.parent / words[1]).is_file()
    for verb, *words in commands(name):
        args, problems = import_module(f"lorasmith.cli.{verb}").parser().read(words)
        assert not problems, (verb, words)
        if verb in ("train", "check"):
            assert isinstance(config_of(args), Config)


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_in_the_sentences_is_one_of_a_verb(name: str) -> None:
    parsers = [import_module(f"lorasmith.cli.{verb}").parser() for verb in verbs()]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    found = {flag for code in re.findall(r"`([^`\n]+)`", prose(name)) for flag in re.findall(r"--[a-z][a-z-]*", code)}
    assert found <= known | FOREIGN, found - known
    assert len(found & known) >= INLINE[kind_of(name)], sorted(found)


@pytest.mark.parametrize("name", PAGES)
def test_every_toml_loads_and_every_python_compiles(name: str, tmp_path: Path) -> None:
    for number, body in enumerate(of_language(name, "toml")):
        file = tmp_path / f"{number}.toml"
        file.write_text(body, "utf-8")
        is_study = "[study.grid]" in body
        config = load_study(file).cells[0].config if is_study else load_config(file, {})
        assert config.data.data
    for body in of_language(name, "python"):
        compile(body, name, "exec")


@pytest.mark.parametrize("name", PAIRS["serving"])
def test_every_request_is_one_that_the_server_reads(name: str) -> None:
    sent = [words for words in lines(name) if "-d" in words]
    assert len(sent) == BODIES["serving"]
    for words in sent:
        route = words[1].partition("/v1/")[2]
        BODY_OF[route].model_validate_json(words[words.index("-d") + 1])
    [scraped] = [yaml.safe_load(body) for body in of_language(name, "yaml")]
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:8000"]


@pytest.mark.parametrize("name", PAIRS["serving"])
def test_every_metric_and_field_is_there(name: str) -> None:
    engine = SimpleNamespace(cache=KVCache(8), preemptions=0)
    told = {family.name: family for family in ServerMetrics(engine, 1).registry.collect()}
    named = re.findall(r"`(lorasmith:\w+)`", prose(name))
    assert len(named) == 12
    assert {metric.removesuffix("_total") for metric in named} <= set(told)
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *StreamOptions.model_fields}
    table = re.findall(r"^\| [^|]+ \| (`[a-z_]+`[^|-]*) \|$", text(name), re.MULTILINE)
    first_words = [word for cell in table for word in re.findall(r"`([a-z_]+)`", cell)]
    wrong = set(first_words) - fields - {"json_object", "json_schema", "auto", "none", "required"}
    assert len(first_words) >= 20
    assert not wrong


@pytest.mark.parametrize("name", PAGES)
def test_every_row_is_read_as_it_is_said(name: str) -> None:
    found = []
    for body in of_language(name, "json"):
        rows = [json.loads(line) for line in body.splitlines()]
        form = recognize_format(rows)
        assert form is not None
        assert [row_problem(row, form) for row in rows] == [None] * len(rows)
        found.append(form.name)
    assert found == {"start": ["chat"], "guide": ["ShareGPT", "prompt/completion", "alpaca"]}.get(kind_of(name), [])


@pytest.mark.parametrize("name", ["guide.md", "guide.zh.md"])
def test_the_measure_of_the_guide_measures(name: str) -> None:
    [body] = [body for body in of_language(name, "python") if "def right" in body]
    space: dict[str, Any] = {}
    exec(compile(body, name, "exec"), space)
    right, row = space["right"], json.loads(of_language(name, "json")[1].splitlines()[0])["completion"]
    assert right(row, row) == 1
    assert right(row.replace("120.5", "7"), row) == 0.5
    assert [right(wrong, row) for wrong in ("no JSON", "[]", "3")] == [0, 0, 0]


@pytest.mark.parametrize("name", PAIRS["concepts"])
def test_the_mathematics_of_the_concepts_holds(name: str) -> None:
    for body in of_language(name, "python"):  # each ends in an assert
        exec(compile(body, name, "exec"), {})
    assert LoraConfig(use_rslora=True).scaling(64, 16) == 8 * LoraConfig().scaling(64, 16)  # "eight times the scaling"


def test_every_picture_is_small() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\((pictures/\w+\.png)\)", text("concepts.md"))
    assert len(pictures) == 5
    assert [name for name in pictures if (DOCS / name).stat().st_size > 100_000] == []


@pytest.mark.parametrize("pair", [PAIRS["concepts"]], ids=["concepts"])
def test_both_languages_have_the_same_formulas_figures_and_pictures(pair: tuple[str, str]) -> None:
    for what, least in (
        (r"\$\$.*?\$\$", 3),
        (r"(?<!\$)\$[^$\n]+\$(?!\$)", 25),
        (r"\d+\.\d+(?:e-\d)?", 18),
        (r"pictures/\w+.png", 5),
    ):
        english, chinese = (sorted(re.findall(what, prose(name))) for name in pair)
        assert english == chinese
        assert len(english) >= least


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", text(name))
    assert len(links) >= (2 if kind_of(name) == "scale" else 4)
    for link in links:
        file, _sign, part = link.partition("#")
        assert (DOCS / file).is_file(), link
        assert not part or part in map(anchor, headings(file)), link


@pytest.mark.parametrize(("name", "language"), [("start.md", "en"), ("start.zh.md", "zh")])
def test_the_screen_of_check_is_called_as_it_is(name: str, language: str) -> None:
    table = re.findall(r"^\| ([^|]*) \| [^|]* \|$", text(name), re.MULTILINE)
    with using_language(language):
        labels = [_(label) for label in LABELS]
        assert [word for cell in table[2:6] for word in re.split("[、,] ?", cell)] == labels
        assert _("Lengths in tokens") in table
        assert f"`{_('ready to train')}`" in text(name)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_both_languages_are_the_same(pair: tuple[str, str]) -> None:
    levels = [[heading.split()[0] for heading in headings(name)] for name in pair]
    assert levels[0] == levels[1]
    assert len(levels[0]) >= (3 if pair == PAIRS["scale"] else 7)
    kinds = [[language for language, _body in blocks(name)] for name in pair]
    assert kinds[0] == kinds[1]
    english, chinese = (commands(name) for name in pair)
    assert [shape(words) for words in english] == [shape(words) for words in chinese]
    for left, right in zip(english, chinese, strict=True):  # only texts that a person would say are translated
        assert all(a == b or FAR_EAST.search(b) for a, b in zip(left, right, strict=True)), (left, right)
    tomls = [of_language(name, "toml") for name in pair]
    assert tomls[0] == tomls[1]
    assert requests(pair[0]) == requests(pair[1])
    tables = [len(re.findall(r"^\|", prose(name), re.MULTILINE)) for name in pair]
    items = [len(re.findall(r"^(?:- |\d+\. )", prose(name), re.MULTILINE)) for name in pair]
    assert (tables[0], items[0]) == (tables[1], items[1])


def shape(words: list[str]) -> list[str]:
    """A command with a hole for each word that is no flag, no verb and no name."""
    return [word if re.fullmatch(r"[\w./:=,-]+", word, re.ASCII) else "..." for word in words]
