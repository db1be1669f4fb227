"""The pages of docs that are made from the code are what the code makes now, whole, and the same in both languages."""

import re
from importlib import import_module

import pytest
from jinja2 import Environment
from tools import errors_page, formats_page, options_page
from tools.pages import notes

from lorasmith.cli.main import verbs
from lorasmith.config.toml import SECTIONS, Config, load_config
from lorasmith.data.read.files import ROW_FILES
from lorasmith.data.rows.formats import FORMATS
from tests.support.paths import ROOT

LANGUAGES = ("en", "zh")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(made, language: str) -> str:
    return made.PAGES[language].read_text("utf-8")


def of_language(made, language: str, kind: str) -> list[str]:
    return [body for found, body in FENCED.findall(text(made, language)) if found == kind]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("made", [errors_page, options_page, formats_page], ids=lambda made: made.__name__)
def test_the_page_is_up_to_date(made, language):
    assert text(made, language) == made.page(language), "make docs"


@pytest.mark.parametrize("made", [options_page, formats_page], ids=lambda made: made.__name__)
def test_both_languages_are_of_one_shape(made):
    pages = [text(made, language) for language in LANGUAGES]
    for shape in (r"^(#+) ", r"^```(\w*)$", r"^(\|)", r"^\| (`[^`]*`)"):
        english, chinese = (re.findall(shape, page, re.MULTILINE) for page in pages)
        assert english == chinese, shape
    for link in re.findall(r"\]\((\w[^)#]*)\)", "".join(pages)):
        assert (ROOT / "docs" / link).is_file(), link


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_flag_of_every_verb_is_on_the_page_of_options(language):
    page, count = text(options_page, language), 0
    for verb in verbs():
        part = page.split(f"\n### lorasmith {verb}\n")[1].split("\n##")[0]
        for action in import_module(f"lorasmith.cli.{verb}").parser()._actions:
            section, dot, _key = action.dest.partition(".")
            for flag in action.option_strings:
                count += 1
                assert re.search(rf"[`\s]{flag}[`,\s]", page), (verb, flag)
                own = f"`{flag}" in part or flag in ("-h", "--help", "--lang", "--plain")
                assert own or (dot and f"`[{section}]`" in part), (verb, flag)
    assert count > 200


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_whole_file_loads_and_says_every_key(language, tmp_path):
    (body,) = of_language(options_page, language, "toml")
    (tmp_path / "mine.toml").write_text(body, "utf-8")
    assert load_config(tmp_path / "mine.toml", {}) == options_page.EXAMPLE == Config(**dict(options_page.EXAMPLE))
    for name, section in SECTIONS.items():
        part = body.split(f"[{name}]\n")[1].split("\n[")[0]
        for key in section.model_fields:
            assert re.search(rf"^(?:{key} = |# {key}: not set$)", part, re.MULTILINE), (name, key)
            assert re.search(rf"^# {key}: (?!not set)", part, re.MULTILINE), (name, key)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_variable_that_the_code_reads_is_on_the_page(language):
    reads = re.compile(r"""environ(?:\.get\(|\.setdefault\(|\[)?\s*"([A-Z_]+)"|"([A-Z_]+)" (?:not )?in os\.environ""")
    code = "".join(file.read_text("utf-8") for file in (ROOT / "src").rglob("*.py"))
    found = {name for pair in reads.findall(code) for name in pair if name}
    assert len(found) >= 6
    assert {name for name in found if f"`{name}`" not in text(options_page, language)} == set()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_file_format_is_on_the_page(language):
    assert {suffix for suffix in ROW_FILES if suffix not in text(formats_page, language)} == set()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_form_is_shown_and_every_block_is_of_a_kind_that_is_held(language):
    known = notes("formats")
    counts = {kind: len(of_language(formats_page, language, kind)) for kind in ("json", "text", "python", "jinja")}
    rows, files, made = (len(known[part]) for part in ("row", "file", "made"))
    assert counts == {"json": rows + 2, "text": 2 * rows + files + made + 5, "python": made, "jinja": 1}
    assert sum(counts.values()) == len(FENCED.findall(text(formats_page, language)))
    said = "".join(of_language(formats_page, language, "text"))
    assert [form.name for form in FORMATS if not re.search(rf"(?:: |：){form.name} (?:format,|格式，)", said)] == []
    for body in of_language(formats_page, language, "python"):
        compile(body, "formats.md", "exec")
    for body in of_language(formats_page, language, "jinja"):
        Environment().parse(body)
    for kind in ("json", "python", "jinja"):
        assert of_language(formats_page, "en", kind) == of_language(formats_page, "zh", kind)
