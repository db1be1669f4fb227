"""Files of other programs as keys and values: numbers are numbers, and what cannot be read is named."""

import pytest

from lorasmith.config.migrate.reading import Foreign, read_foreign, scalar
from lorasmith.errors import ConfigError


def read(folder, text: str, name: str = "theirs.yaml") -> Foreign:
    path = folder / name
    path.write_text(text, "utf-8")
    return read_foreign(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # text for PyYAML
        ("1.0e-4", 1e-4),
        ("2E+3", 2000.0),
        (".5", 0.5),
        ("16", 16),
        ("-1", -1),
        ("true", True),
        ("'1e-4'", "1e-4"),
        ("e4", "e4"),
        ("1e-4b", "1e-4b"),
        ("2024-05-01", "2024-05-01"),
    ],
)
def test_numbers_are_numbers(tmp_path, text, value):
    found = read(tmp_path, f"key: {text}").values["key"]
    assert (str(found) if "-05-" in text else found) == value
    assert type(found) is type(value) or "-05-" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "theirs.yaml line 3: invalid YAML: the key 'a' is given twice. Correct the file."),
        ("a: [1, 2\n", "theirs.yaml line 2: invalid YAML: "),
        ("a: 1\n---\nb: 2\n", "theirs.yaml line 2: invalid YAML: "),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("1: a\n", "keys must be text"),
        ("", "must hold keys and values"),
        ("a: " + "[" * 300 + "]" * 300, "nested too deeply"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("a: " + "9" * 5000, "invalid YAML: "),
        ("a: \x00\n", "invalid YAML: "),
        ("a: !!python/object:os.system x\n", "theirs.yaml line 1: invalid YAML: "),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, words):
    with pytest.raises(ConfigError, match=r"theirs\.yaml") as caught:
        read(tmp_path, text)
    assert words in str(caught.value)


def test_a_small_file_cannot_become_endless(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="nested too deeply"):
        read(tmp_path, "\n".join(lines))


def test_files_that_are_not_there_or_not_utf_8(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_foreign(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: invalid UTF-8 at byte 3"):
        read_foreign(tmp_path / "latin.yaml")


def test_json(tmp_path):
    assert read(tmp_path, '{"a": 1e-4, "b": null}', "args.json").values == {"a": 1e-4, "b": None}
    with pytest.raises(ConfigError, match="not valid JSON"):
        read(tmp_path, '{"a": ', "args.json")


SCRIPT = r"""#!/bin/bash
set -x
export MODEL=org/base
ROWS='org/rows'

# trains it
CUDA_VISIBLE_DEVICES=0 \
swift sft \
    --model ${MODEL} \
    --tuner-type lora \
    --dataset "$ROWS#500" 'org/more' \
    --learning_rate 1e-4 \
    --bf16 \
    --max_steps=-1 \
    --system 'You are
a helper.' \
    --lr_scheduler_kwargs '{"min_lr": 1e-6}' 2>&1 | tee log.txt
"""


def test_a_shell_script_with_its_command(tmp_path):
    found = read(tmp_path, SCRIPT, "train.sh")
    assert (found.program, found.verb, found.processes) == ("ms-swift", "sft", 1)
    assert found.values == {
        "model": "org/base",
        "tuner_type": "lora",
        "dataset": ["org/rows#500", "org/more"],
        "learning_rate": 1e-4,
        "bf16": True,
        "max_steps": -1,
        "system": "You are\na helper.",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
    }


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("llamafactory-cli train --stage sft", "LLaMA-Factory"),
        ("torchrun --nproc_per_node 2 ../swift/cli/sft.py --model a", "ms-swift"),
        ("python -m mlx_lm lora --model a", "mlx-lm"),
        ("mlx_lm.lora --model a", "mlx-lm"),
    ],
)
def test_the_command_tells_the_program(tmp_path, command, program):
    assert read(tmp_path, command, "train.sh").program == program


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo hello\n", "must contain one training command, found 0; looked for: llamafactory-cli train, "),
        ("swift sft --model a\nswift sft --model b\n", "must contain one training command, found 2"),
        ("llamafactory-cli train mine.yaml\n", "Convert that file with lorasmith init --from mine.yaml"),
        ("swift sft --config mine.yaml\n", "Convert that file with lorasmith init --from mine.yaml"),
        ("swift sft \\\n --model 'a\n", "train.sh line 1: a quotation mark is not closed"),
    ],
)
def test_scripts_that_cannot_be_converted(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, "train.sh")
    assert words in str(caught.value)


def test_what_a_script_computes(tmp_path):
    flags = "--a $(expr 16 / 4) --b ${N:-9} --c $M$OTHER --d $(expr 16 / $NPROC) --e '$(expr 16 / $NONE)'"
    lines = f"NPROC=8\nexport M=${{M:-org/base}}\nNPROC_PER_NODE=4 swift pt {flags}"
    found = read(tmp_path, lines, "train.sh")
    assert found.values == {"a": 4, "b": 9, "c": "org/base$OTHER", "d": 2, "e": "$(expr 16 / $NONE)"}
    assert (found.verb, found.processes) == ("pt", 4)


@pytest.mark.parametrize(
    ("lines", "processes"),
    [
        ("export NPROC_PER_NODE=4\nswift sft --a 1", 4),
        ("NPROC_PER_NODE=4\nexport NPROC_PER_NODE\nswift sft --a 1", 4),
        ("export NPROC_PER_NODE=4; swift sft --a 1", 4),
        ("N=4\nNNODES=2 NPROC_PER_NODE=$N swift sft --a 1", 8),
        ("NPROC_PER_NODE=4\nswift sft --a 1", 1),  # which the command does not see
        ("swift sft --a 1\nexport NPROC_PER_NODE=4", 1),
        ("torchrun --nproc_per_node 2 swift/cli/sft.py --a 1", 2),
        ("N=3\ntorchrun --nnodes=2 --nproc-per-node=$N swift/cli/sft.py --a 1", 6),
        ("NPROC_PER_NODE=gpu swift sft --a 1", 1),
    ],
)
def test_the_processes_that_a_script_starts(tmp_path, lines, processes):
    assert read(tmp_path, lines, "train.sh").processes == processes


def test_the_environment_of_the_command(tmp_path):
    found = read(tmp_path, "A=1\nexport B=2 C='x y'\nexport D\nB=3 E=${A} swift sft --a 1", "train.sh")
    assert found.environment == {"B": "3", "C": "x y", "E": "1"}
    assert read(tmp_path, "USE_HF=True swift sft --a 1", "train.sh").is_on("USE_HF")
    assert not read(tmp_path, "USE_HF=0 swift sft --a 1", "train.sh").is_on("USE_HF")


def test_a_number_sign_within_a_word_begins_no_comment(tmp_path):
    lines = "swift sft \\\n  --dataset org/a#1000 'org/b#9' \\\n  --lora_rank 4  # don't\n"
    found = read(tmp_path, lines, "train.sh")
    assert found.values == {"dataset": ["org/a#1000", "org/b#9"], "lora_rank": 4}


@pytest.mark.parametrize("token", ["<|im_end|>", "<think>", "</s>"])
def test_a_token_does_not_end_the_command(tmp_path, token):
    found = read(tmp_path, f"swift sft --tokens '{token}' --a 1 < input", "train.sh")
    assert found.values == {"tokens": token, "a": 1}


def test_words_of_a_command_line():
    assert [scalar(word) for word in ("8", "1e-4", "false", "a b", "[1]", "{'a': 1}", ": {", "~")] == [
        8, 1e-4, False, "a b", "[1]", {"a": 1}, ": {", "~",
    ]  # fmt: skip
