"""The encoding of a run goes with its adapter: template file and system text, in eval, chat and generate alike."""

import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.config.toml import load_config
from lorasmith.data.rows.conversation import Message
from lorasmith.errors import RunError
from lorasmith.runs.evaluate import evaluate
from lorasmith.training.run_files import RUN_CONFIG
from tests.support.tiny import trained

JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT: {% endif %}"
)


def test_a_template_file_and_a_system_text_are_needed_for_training_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "chat.jinja"
    file.write_text(JINJA, "utf-8")
    summary = trained(tmp_path / "run", template="./chat.jinja", system="Be kind.", learn="last-answer")
    config = load_config(tmp_path / "run" / RUN_CONFIG, {}).data
    assert (config.template, config.system, config.learn) == (str(file), "Be kind.", "last-answer")
    assert trained(tmp_path / "run", resume=True, template="./chat.jinja", system="Be kind.", learn="last-answer")
    with pytest.raises(RunError, match=r"data\.system: was 'Be kind\.', now 'Be brief\.'"):
        trained(tmp_path / "run", resume=True, system="Be brief.")
    file.unlink()
    session = open_adapters([tmp_path / "run"])
    prompt = session.base.tokenizer.decode(session.template.encode_prompt([Message("user", "Why?")]))
    assert prompt == "<|im_start|>SYSTEM: Be kind.<|im_end|><|im_start|>USER: Why?<|im_end|><|im_start|>ASSISTANT: "
    measured = evaluate([tmp_path / "run"]).adapters[0].loss
    assert (measured.before, measured.after) == pytest.approx((summary.loss_before, summary.loss_after), rel=1e-6)
