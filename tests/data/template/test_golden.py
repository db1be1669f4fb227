"""Another tokenizer than that of the training is refused with the token that differs."""

import re

import pytest

from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError


def test_another_tokenizer_is_refused_with_the_token_that_differs(make):
    data = Template.of(make("chatml")).to_json()
    with pytest.raises(
        AdapterError, match=r"token \d+ of a test conversation is \d+ '.+', but was \d+ in training\."
    ) as caught:
        Template.from_json(data, make("chatml", ["lorem ipsum dolor sit amet"]))
    at = int(re.search(r"token (\d+) of", str(caught.value))[1])
    assert at > 0
    assert f"but was {data['golden'][0]['ids'][at]} in training." in str(caught.value)


def test_another_stop_token_or_version_is_refused(make):
    data = Template.of(make("chatml")).to_json()
    data["stop"][0]["token"] = "<|end|>"
    with pytest.raises(AdapterError, match=re.escape("stop token 1 is '<|im_end|>', but was '<|end|>' in training")):
        Template.from_json(data, make("chatml"))
    with pytest.raises(AdapterError, match="version 99"):
        Template.from_json(data | {"version": 99}, make("chatml"))


def test_golden_ids_hold_their_probe_in_chinese(make):
    template = Template.of(make("chatml"))
    golden = template.to_json()["golden"]
    assert any("技巧" in template.tokenizer.decode(entry["ids"]) for entry in golden)


def test_a_missing_token_is_told(make):
    template = Template.of(make("chatml"))
    data = template.to_json()
    data["golden"][0]["ids"].append(7)
    with pytest.raises(AdapterError, match=r"token \d+ of a test conversation is missing, but was 7 in training"):
        Template.from_json(data, template.tokenizer)
    del data["golden"][0]["ids"][-2:]
    with pytest.raises(AdapterError, match=r"of a test conversation is \d+ '.+', but was none in training"):
        Template.from_json(data, template.tokenizer)
