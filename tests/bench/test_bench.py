"""The bench's arithmetic, its rows, its breakdown and its table. No rate is asserted: nothing here measures speed."""

import json
import math
import re
import signal
import sys
from pathlib import Path

import gguf
import pytest
import torch
from bench.contest import Contest, hold
from bench.lengths import plain_rows
from bench.parts import measure
from bench.products import Products, Size, linear_layers
from bench.programs import Failed, Missing, Ran
from bench.rates import OURS, PEER, RECIPE, Measured, best_setting, compare
from bench.rows import CHAT, Kind, Rows, examples, for_trainer
from bench.serving.llamacpp import why_not, write_base
from bench.state import Bench, Book, Clock
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from bench import __main__ as bench_main
from bench import breakdown, commands, injection, programs, table
from lorasmith.adapters.folder import end_ids
from lorasmith.cli import eval as eval_verb
from lorasmith.cli import train as train_verb
from lorasmith.cli.flags import config_of
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.dataset.prepare import prepare
from lorasmith.data.template.encoding import Template
from lorasmith.loading.load import load_base
from tests.support.paths import ROOT
from tests.support.tiny import model_folder, row

FAST = "float32, 8 x 1"
HEAD = {
    "command": "python -m bench",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {
        "processor": "Some Processor", "flags": ["avx2"], "instructions": "AVX2", "dtype": "float32", "kind": "float32",
        "cores": 2, "memory_mib": 16384, "environment": {},
    },
    "versions": {"python": "3.11.0", "system": "Linux", "torch": "2.13.0"},
}  # fmt: skip


def measured(program: str, setting: str, seconds: tuple[float, float], rows: tuple[int, int] = (8, 32)) -> Measured:
    few, many = (Ran(s, 100.0 * s, 1.0 if program == OURS else 2.0) for s in seconds)
    return Measured(program, setting, rows, 1000, few, many)


def bench_in(folder: Path, budget: float = 1000.0) -> Bench:
    return Bench(False, 2, "float32", model_folder(), folder, Book(folder / "bench.json", HEAD), Clock(budget))


def chat_rows(folder: Path, kind: Kind = CHAT) -> Rows:
    return Rows(kind, [row(i) for i in range(64)], model_folder(), folder)


# --- rates ------------------------------------------------------------------------------------------------------------


def test_a_rate_is_the_difference_of_two_runs_and_the_median_of_rounds():
    tried = [measured(PEER, RECIPE, (5, 15), (4, 16)), measured(PEER, FAST, (4, 9), (4, 16))]
    rounds = [measured(OURS, "default", (3, 3 + s)) for s in (2, 4, 1)] + [measured(PEER, FAST, (4, 8))]
    assert best_setting(tried) == FAST
    found = compare(tried + rounds, FAST)
    assert found["ours"]["tokens_per_second"] == 500  # of 500, 250 and 1000
    assert found["ours"]["peak_mib"] == 500  # of the longer runs: 500, 700, 400
    assert found["peer"]["tokens_per_second"] == 250  # the search had fewer rows, so it does not count
    assert found["recipe"]["tokens_per_second"] == 100
    assert found["ratio"] == 2
    assert found["ratio_to_recipe"] == 5
    assert found["memory_to_recipe"] == pytest.approx(500 / 1500)
    assert found["start_to_peer"] == 0.5
    assert len(found["runs"]) == 6
    json.dumps(found)


def test_what_is_not_there_yet_has_no_ratio():
    found = compare([measured(PEER, FAST, (4, 9))], FAST)
    assert found["peer"]["tokens_per_second"] == 200
    assert "ours" not in found
    assert "ratio" not in found


def test_more_rows_in_no_more_time_is_no_rate():
    with pytest.raises(Failed, match="32 rows took no longer than 8"):
        _rate = measured(OURS, "default", (3, 3)).tokens_per_second


def test_a_contest_searches_once_and_then_takes_turns(tmp_path, monkeypatch):
    asked = []

    def ran(self: Bench, program: str, rows: Rows, count: int) -> Ran:
        asked.append((program, count))
        return Ran(count / {"ours": 8.0, RECIPE: 1.0, FAST: 2.0}[program], 100.0, 1.0)

    monkeypatch.setattr(Bench, "run", ran)
    bench = bench_in(tmp_path)
    settings = {RECIPE: [RECIPE], FAST: [FAST]}
    contest = Contest(
        "training", "chat", "ours", lambda words: words[0], settings, chat_rows(tmp_path), (16, 32), (8, 16)
    )  # fmt: skip
    hold(bench, contest)
    turns = [("ours", 16), ("ours", 32), (FAST, 16), (FAST, 32)]
    assert asked == [(RECIPE, 8), (RECIPE, 16), (FAST, 8), (FAST, 16), *turns, *turns]
    figures = json.loads((tmp_path / "bench.json").read_text())["sections"]["training"]["chat"]
    assert figures["ratio"] == pytest.approx(4)
    assert figures["peer"]["rounds"] == 2


# --- whole programs, time and Ctrl-C ----------------------------------------------------------------------------------


def test_a_whole_program_has_a_time_a_peak_and_a_start(tmp_path):
    marker = tmp_path / "first-step"
    words = [sys.executable, "-c", f"import time; open({str(marker)!r}, 'w'); time.sleep(0.1)"]
    ran = programs.run(words, marker)
    assert 0.1 < ran.seconds < 20
    assert ran.peak_mib > 5
    assert -0.05 < ran.start_seconds < ran.seconds - 0.05  # a file's time is that of the kernel's last tick


def test_a_program_that_fails_is_quoted():
    with pytest.raises(Failed, match=r"exit code 3\n(.|\n)*no such thing"):
        programs.run([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])


def jobs(*works):
    return [bench_main.Job("training", str(i), 100, 10, work) for i, work in enumerate(works)]


def test_jobs_without_time_are_left_out_and_those_that_fail_do_not_stop_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_main, "_find_pace", lambda bench: 2.0)
    bench, done = bench_in(tmp_path, budget=250), []

    def fail(bench: Bench) -> None:
        raise Failed("it broke")

    def lack(bench: Bench) -> None:
        raise Missing("no file")

    def slow(bench: Bench) -> None:
        done.append(bench.clock.kept)
        bench.clock.started -= 60  # as if a minute had passed

    assert bench_main.measure(bench, jobs(lack, fail, slow, slow)) == 1
    assert done == [200]  # two seconds of the machine for one of the table
    left_out = json.loads((tmp_path / "bench.json").read_text())["left_out"]
    assert left_out == {"training 0": "no file", "training 1": "it broke", "training 3": "no time left"}


def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_main, "_find_pace", lambda bench: 1.0)

    def stop(bench: Bench) -> None:
        bench.book.put("training", "chat", {"ratio": 2.0})
        signal.raise_signal(signal.SIGINT)

    assert bench_main.measure(bench_in(tmp_path), jobs(stop, stop)) == 130
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["sections"] == {"training": {"chat": {"ratio": 2.0}}}
    assert "the rest" in found["left_out"]


def test_the_whole_bench_prints_its_table_and_writes_the_machine_and_the_command(tmp_path, monkeypatch, capsys):
    job = bench_main.Job("sizes", "", 100, None, lambda bench: None)
    monkeypatch.setattr(
        bench_main, "JOBS", (*jobs(lambda bench: bench.book.put("training", "chat", {"ratio": 2.0})), job)
    )
    monkeypatch.setattr(bench_main, "_find_pace", lambda bench: 1.0)
    monkeypatch.setattr(bench_main, "packaged_model", lambda name, report: model_folder())
    words = ["--quick", "--only", "training,sizes", "--json", str(tmp_path / "quick.json")]
    assert bench_main.main(words) == 0
    assert "tokens/s relative to PEFT + Trainer's fastest setting | higher | 2.00 x |" in capsys.readouterr().out
    found = json.loads((tmp_path / "quick.json").read_text())
    assert found["command"] == "python -m bench --quick --only training,sizes"
    assert found["left_out"] == {"sizes": "not with --quick"}
    assert {"processor", "flags", "kind", "cores"} <= set(found["machine"])
    assert {"torch", "transformers", "peft"} <= set(found["versions"])


def test_a_section_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_main.main(["--only", "training,blom"])
    assert "no such section: blom" in capsys.readouterr().err


def test_a_slow_machine_gets_fewer_rows_in_whole_steps(tmp_path):
    bench = bench_in(tmp_path)
    assert bench.rows(32, 128) == (32, 128)
    bench.scale = 0.5
    assert bench.rows(32, 128) == (16, 64)
    assert bench.rows(8, 24) == (8, 16)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind("rows", "auto", 90), Kind("rows", "human-assistant", 40)])
def test_both_programs_get_the_same_tokens(tmp_path, kind):
    """What `lorasmith train` makes of its command line, beside what the peer is handed."""
    rows = chat_rows(tmp_path, kind)
    launch = commands.our_training(str(model_folder()), kind, "float32", commands.DEMO)(rows.file(20), tmp_path)
    verb = launch.words.index("train")
    args, problems = train_verb.parser().read(launch.words[verb + 1 :])
    assert not problems
    config = config_of(args)
    base = load_base(ModelConfig(model=str(model_folder()), dtype="float32"))
    template = Template.of(base.tokenizer, config.data.template, end_ids(base))
    ours = prepare(config.data, template, base.max_positions).train
    peers = [for_trainer(e) for e in examples(rows.file(20), kind, model_folder(), base.tokenizer)]
    assert [e.ids for e in ours] == [fed["input_ids"] for fed in peers]
    for example, fed in zip(ours, peers, strict=True):
        assert [(i, t) for i, t in enumerate(fed["labels"]) if t != -100] == [
            (i + 1, example.targets[i]) for i in example.learned
        ]
    assert rows.tokens(20) == sum(len(e.ids) for e in ours)
    assert max(len(e.ids) for e in ours) == kind.max_length


def test_every_command_of_ours_is_one_that_lorasmith_reads(tmp_path):
    rows = chat_rows(tmp_path)
    for flags in (commands.DEMO, commands.TUTORIAL):
        words = commands.our_training("a-model", CHAT, "auto", flags)(rows.file(8), tmp_path).words
        args, problems = train_verb.parser().read(words[words.index("train") + 1 :])
        assert not problems
        config = config_of(args)
        assert config.training.batch_size * config.training.accumulate == 8
        assert config.model.dtype == "auto"
        assert config.training.warmup == 0
    words = commands.our_evaluation(tmp_path, CHAT)(rows.file(8), tmp_path).words
    _args, problems = eval_verb.parser().read(words[words.index("eval") + 1 :])
    assert not problems


def test_plain_rows_fill_their_length_and_do_not_begin_alike(tmp_path):
    text = " ".join(str(i) for i in range(300))
    kind = Kind("plain", "human-assistant", 32)
    rows = Rows(kind, plain_rows(text, 32, 12), model_folder(), tmp_path)
    found = examples(rows.file(12), kind, model_folder(), load_base(ModelConfig(model=str(model_folder()))).tokenizer)
    assert [len(e.ids) for e in found] == [32] * 12
    assert all(e.useful_length == 31 for e in found)
    assert len({tuple(e.ids[:9]) for e in found}) == 12


def test_settings_in_bfloat16_are_tried_where_the_processor_has_it():
    assert len(commands.without_bfloat16(commands.TRAINING, "bfloat16")) == 4
    assert list(commands.without_bfloat16(commands.TRAINING, "float32")) == [RECIPE, FAST]
    assert len(commands.without_bfloat16(commands.EVALUATION, "float32")) == 2


# --- the limit and the breakdown --------------------------------------------------------------------------------------


def test_the_limit_counts_every_product_that_cannot_be_avoided():
    layers = linear_layers(model_folder(), LoraConfig())
    assert len(layers) == 15
    assert layers[-1].path == "lm_head"
    forward_only = {layer.path for layer in layers if not layer.backward}
    assert forward_only == {f"model.layers.0.self_attn.{n}_proj" for n in "qkv"}
    only_second = linear_layers(model_folder(), LoraConfig(target_modules="model.layers.1.mlp.down_proj"))
    assert [layer.path for layer in only_second if layer.backward] == ["lm_head"]
    products = Products(layers, torch.float32, Size(10, 4))
    assert products.seconds([Size(10, 4), Size(6, 2)]) > 0
    weights = sum(layer.inputs * layer.outputs * (1 + layer.backward) for layer in layers[:-1])
    assert products.operations == 2 * 16 * weights + 2 * 6 * 2 * math.prod(layers[-1][1:3])


class _Through(torch.autograd.Function):
    """x W^T + x A^T B^T both ways, as a function by hand has them."""

    @staticmethod
    def forward(ctx, x, W, A, B):
        ctx.save_for_backward(W, A, B)
        return torch.mm(x, W.t()).addmm_(torch.mm(x, A.t()), B.t())

    @staticmethod
    def backward(ctx, dy):
        W, A, B = ctx.saved_tensors
        return torch.mm(dy, W) + torch.mm(torch.mm(dy, B), A), None, None, None


class AdaptedLinears(_Through):
    """Under a name that holds both kinds of products."""


class _GatedMLP(_Through):
    """Under a name whose other operators are element-wise."""


class LowRank(_Through):
    """Under a name that is all adapter."""


class _ByHand(_Through):
    """Under a name that is attention."""


def profiled(work) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by part; and each part's operators of kind mm by their number."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        work()
    events = recorded.events()
    products: dict[str, float] = {}
    for event in events:
        if event.name in ("aten::mm", "aten::addmm_"):
            part = breakdown.part_of(event, 4, 10**6)
            products[part] = products.get(part, 0) + 1
    return breakdown.parts_of(events, 10.0, 4, 10**6), products


def test_operators_belong_to_the_nearest_range_that_has_a_name():
    x, W = torch.randn(64, 48, requires_grad=True), torch.randn(96, 48)
    A, B = torch.randn(4, 48), torch.randn(96, 4)
    parts, products = profiled(lambda: AdaptedLinears.apply(x, W, A, B).sum().backward())
    assert products == {breakdown.BASE: 2, breakdown.ADAPTER: 4}
    assert parts[breakdown.BASE] > 0
    assert sum(parts.values()) == pytest.approx(10)
    of_mlp, products = profiled(lambda: _GatedMLP.apply(x, W, A, B).sum().backward())
    assert products == {breakdown.BASE: 2, breakdown.ADAPTER: 4}
    assert of_mlp[breakdown.ELEMENT] > 0
    assert profiled(lambda: LowRank.apply(x, W, A, B).sum().backward())[1] == {breakdown.ADAPTER: 6}
    assert profiled(lambda: _ByHand.apply(x, W, A, B).sum().backward())[1] == {breakdown.ATTENTION: 6}
    assert profiled(lambda: torch.nn.functional.linear(x, W).sum().backward())[1] == {breakdown.BASE: 2}


def test_every_autograd_function_of_the_package_has_a_part():
    sources = (ROOT / "src").rglob("*.py")
    names = [
        name
        for file in sources
        for name in re.findall(r"class (\w+)\(torch.autograd.Function", file.read_text("utf-8"))
    ]
    assert len(names) >= 3
    begins = tuple(breakdown.NAMES)
    assert [name for name in names if not name.lstrip("_").startswith(begins)] == []


def test_the_flat_buffer_is_the_optimizers_and_other_operators_are_element_by_element():
    flat, x = torch.ones(10**6), torch.ones(64, 48)
    parts, _products = profiled(lambda: flat.clamp_(max=2.0))
    assert parts[breakdown.OPTIMIZER] > parts[breakdown.ELEMENT] == 0
    parts, _products = profiled(lambda: x.clamp_(max=2.0))
    assert parts[breakdown.ELEMENT] > parts[breakdown.OPTIMIZER] == 0


def test_our_own_steps_have_a_share_of_the_limit_and_parts_that_sum_to_the_step():
    kind = Kind("rows", "auto", 100)
    found = measure(str(model_folder()), "float32", kind, [row(i) for i in range(40)])
    assert 0 < found["share"] < 1
    assert found["steps"] == 2  # of five: two are warm-up, one is profiled
    assert found["labels_per_step"] < found["computed_per_step"] <= found["tokens_per_step"]
    parts = found["profiled"]["parts"]
    assert sum(parts.values()) == pytest.approx(found["profiled"]["seconds_per_step"])
    assert all(parts[part] > 0 for part in breakdown.PARTS), parts
    json.dumps(found)


# --- the table --------------------------------------------------------------------------------------------------------


def some_figures() -> dict[str, object]:
    runs = [measured(PEER, RECIPE, (5, 15)), measured(PEER, FAST, (4, 9)), measured(OURS, "default", (3, 5))]
    chat = compare(runs, FAST)
    parts = {
        "tokens_per_step": 800.0, "computed_per_step": 600.0, "labels_per_step": 200.0, "seconds_per_step": 1.25,
        "limit_seconds_per_step": 0.9, "limit_gflops": 400.0, "tokens_per_second": 640.0, "share": 0.72,
        "limit_tokens_per_second": 888.0, "profiled": {"seconds_per_step": 2.0, "parts": {}},
    }  # fmt: skip
    parts["profiled"]["parts"] = dict.fromkeys(breakdown.PARTS, 2 / 7)
    sections = {
        "training": {"chat": chat},
        "parts": {"chat": parts},
        "lengths": {"256": {"tokens_per_second": 500.0, "peak_mib": 900.0}, "ratio": {"2048 to 256": 0.8}},
    }
    return {**HEAD, "sections": sections, "left_out": {"bloom": "no file\nmore"}, "seconds": 1800.0}


def test_the_table_has_the_required_value_and_the_goal_of_this_kind_of_processor():
    text = table.render(some_figures())
    assert (
        "| demo rows: tokens/s relative to PEFT + Trainer's fastest setting | higher | 2.50 x | 2.2 x | 3 x |" in text
    )
    assert "| demo rows: tokens/s relative to the upper bound | higher | 0.72 | 0.7 | 0.85 |" in text
    assert (
        "| Bloom: tokens/s relative to PEFT + Trainer's usual setting | higher | not measured | 1.5 x | 1.8 x |" in text
    )
    assert "| demo rows | PEFT + Trainer, fastest setting | float32, 8 x 1 | 200 | 900 | 2.0 | 1 |" in text
    assert "| - attention | 0.286, 14% |" in text
    assert "| 256 | 500 | 900 |" in text
    assert "- not measured: bloom: no file" in text
    assert "`python -m bench`, 2026-01-02, 30 minutes; 2 cores of Some Processor (avx2), 16 GiB" in text
    lines = some_figures()
    lines["machine"] = {**HEAD["machine"], "kind": "bfloat16"}
    assert "| 2.50 x | 2.7 x | 4 x |" in table.render(lines)


def test_every_goal_has_a_line_even_where_nothing_was_measured():
    text = table.render({**HEAD, "sections": {}, "left_out": {}})
    assert text.count("not measured") == len(table.GOALS) == 11


def test_the_page_is_rewritten_between_its_markers(tmp_path, capsys):
    figures, page = tmp_path / "bench.json", tmp_path / "performance.md"
    figures.write_text(json.dumps(some_figures()))
    page.write_text("# Speed\n\n<!-- bench -->\nold\n<!-- /bench -->\n\nmore\n")
    for _again in range(2):
        assert table.main([str(figures), str(page)]) == 0
        text = page.read_text()
        assert text.startswith("# Speed\n\n<!-- bench -->\n\n`python -m bench`")
        assert text.endswith("\n\n<!-- /bench -->\n\nmore\n")
        assert "old" not in text
    page.write_text("no markers")
    assert table.main([str(figures), str(page)]) == 2
    assert "needs one <!-- bench -->" in capsys.readouterr().err
    assert page.read_text() == "no markers"


# --- serving ----------------------------------------------------------------------------------------------------------


def test_what_is_written_for_llama_cpp_is_the_same_model(tmp_path):
    """Transformers turns q and k of a GGUF file back on its own."""
    write_base(tmp_path / "base.gguf", model_folder(), gguf.GGMLQuantizationType.F32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_llama_cpp_the_reason_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert why_not(str(model_folder())) == "`llama-cpp-python` is not installed"


def test_ours_and_pefts_run_in_turns_and_the_first_rounds_do_not_count():
    order, ours, theirs = [], iter([9.0, 9.0, 1.0, 4.0, 3.0]), iter([1.0, 1.0, 2.0, 2.0, 2.0])
    timed = lambda name, values: order.append(name) or next(values)  # noqa: E731
    found = injection.compared(3, lambda: timed("ours", ours), lambda: timed("peft", theirs))
    assert found == (3.0, 2.0, 1.5)
    assert order == ["peft", "ours", "ours", "peft", "peft", "ours", "ours", "peft", "peft", "ours"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process's anonymous memory")
def test_memory_without_mapped_files(tmp_path: Path) -> None:
    """A hundred MiB of a mapped file, all read, and fifty of its own: only the latter are anonymous."""
    (tmp_path / "file").write_bytes(bytes(100 * 2**20))
    code = (
        "import mmap, sys, time\n"
        "file = open(sys.argv[1], 'rb')\n"
        "mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "read, own = sum(mapped[::4096]), b'x' * (50 * 2**20)\n"
        "time.sleep(1)\n"
    )
    ran = programs.run([sys.executable, "-c", code, str(tmp_path / "file")])
    assert 50 < ran.anonymous_mib < 100
    assert ran.peak_mib > 150
