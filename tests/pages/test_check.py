"""The page of a check: one file, in which everything from the data is escaped."""

import json

from lorasmith.cli.main import main
from lorasmith.pages.check import render_page
from lorasmith.preflight.check import CheckResult
from tests.support.tiny import flags, model_folder, row, settings


def test_the_page_is_one_file_and_escapes_what_is_in_the_rows(tmp_path, capsys):
    evil = {"messages": [{"role": "user", "content": "<script>x</script>"}, {"role": "assistant", "content": "a & b"}]}
    files = tmp_path / "rows.jsonl"
    files.write_text("".join(json.dumps(r) + "\n" for r in [evil, *map(row, range(9))]), "utf-8")
    page = tmp_path / "seen.html"
    assert main(["check", str(files), *flags(settings(held_out=0)), "--html", str(page)]) == 0
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert "src=" not in text
    assert "href=" not in text
    assert '<span class="stop">&lt;|im_end|&gt;</span>' in text
    capsys.readouterr()
    assert main(["check", str(files), "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "must be a file in an existing folder" in capsys.readouterr().err
    assert model_folder().is_dir()


def test_a_check_without_a_base_model_is_a_page_of_problems():
    text = render_page(CheckResult(["no <base>"], ["slow & old"], ["3 rows"]))
    assert "no &lt;base&gt;" in text
    assert "slow &amp; old" in text
    assert "3 rows" in text
    assert "Ready to train." not in text
    assert "Ready to train." in render_page(CheckResult([]))
