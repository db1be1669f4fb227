"""`export` as it is typed."""

from tests.support.commands import as_json, refused, said


def test_export(capsys, run, tmp_path):
    out = tmp_path / "model.gguf"
    lines = said(capsys, "export", run, "--to", "gguf", "--type", "f32", "--output", out).splitlines()
    assert lines[-1] == f"Exported: {out}, with model.gguf.certificate.json"
    (at,) = [i for i, line in enumerate(lines) if line.startswith("Read back and equal: 13 keys, ")]
    assert "As transformers reads it: " in lines[at + 1]
    assert "20 of 20 greedy replies are equal" in lines[at + 1]
    assert "held-out rows: mean log probability off by at most" in lines[at + 2]
    assert "already exists" in refused(capsys, "export", run, "--to", "gguf", "--output", out)
    found = as_json(capsys, "export", run, "--to", "gguf", "--output", out, "--overwrite")
    assert (found["type"], found["architecture"]) == ("f16", "llama")


def test_export_for_ollama(capsys, run, tmp_path):
    out = tmp_path / "chat"
    lines = said(capsys, "export", run, "--to", "ollama", "--output", out).splitlines()
    assert lines[-1] == f"next: ollama create chat -f {out}/Modelfile"
    assert (out / "Modelfile").read_text().startswith("FROM ./chat.gguf\n")


def test_export_of_the_adapter_alone(capsys, run, tmp_path):
    out = tmp_path / "lora.gguf"
    lines = said(capsys, "export", run, "--to", "gguf-lora", "--output", out).splitlines()
    assert lines[-1] == f"Exported: {out}, with lora.gguf.certificate.json"
    assert any(line.startswith("As gguf reads it, with the base model: relative logit error ") for line in lines)
    found = as_json(capsys, "export", run, "--to", "mlx", "--output", tmp_path / "mlx")
    assert found["folder"] == str(tmp_path / "mlx")
    assert (tmp_path / "mlx" / "adapters.safetensors").is_file()
    text = refused(capsys, "export", run, "--to", "mlx", "--output", tmp_path / "other", "--type", "q8_0")
    assert "with --to mlx, the adapter is not rounded to another type" in text


def test_export_for_a_hub(capsys, run, tmp_path):
    out = tmp_path / "hub"
    found = as_json(capsys, "export", run, "--to", "peft", "--base-name", "org/base", "--output", out)
    assert found["folder"] == str(out)
    assert found["figures"]["readings"][0]["reader"] == "peft"
    assert (out / "README.md").is_file()
    text = refused(capsys, "export", run, "--to", "mlx", "--base-name", "org/base", "--output", tmp_path / "mlx")
    assert "--base-name: only with --to peft" in text


def test_export_for_transformers_is_merging(capsys, run, tmp_path):
    found = as_json(capsys, "export", run, "--to", "transformers", "--output", tmp_path / "one", "--dtype", "bfloat16")
    same = as_json(capsys, "merge", run, "--output", tmp_path / "two", "--dtype", "bfloat16")
    assert {**found, "folder": ""} == {**same, "folder": ""}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    text = refused(capsys, "export", run, "--to", "transformers", "--output", tmp_path / "x", "--type", "f16")
    assert "choose the type with --dtype" in text
