"""The metrics of a server in Prometheus' text format."""

from types import SimpleNamespace

from lorasmith.serve.metrics import ServerMetrics
from tests.support.serving import HI, Running, curl, said, user


def test_health_ready_and_metrics(served: Running):
    assert curl(f"{served.url}/health")[0] == curl(f"{served.url}/ready")[0] == 200
    said(served.client().chat.completions.create(model="calm", messages=user(HI), max_tokens=2, temperature=0))
    text = curl(f"{served.url}/metrics")[1]
    for name in ("num_requests_running", "generation_tokens_total", "time_to_first_token_seconds_count"):
        assert f'lorasmith:{name}{{model_name="calm"}}' in text
    assert "lorasmith:kv_cache_usage_perc" in text


def test_requests_are_counted_by_model_and_preemptions_once() -> None:
    engine = SimpleNamespace(cache=SimpleNamespace(reserved=32, limit=128), preemptions=3)
    metrics = ServerMetrics(engine, max_concurrency=2)  # type: ignore[arg-type]
    metrics.success.labels("calm", "stop").inc()
    text = metrics.text(["calm", "calm"], ["loud"], ["calm", "loud"]).decode()
    for line in (
        'num_requests_running{model_name="calm"} 2.0',
        'num_requests_running{model_name="loud"} 0.0',
        'num_requests_waiting{model_name="loud"} 1.0',
        "kv_cache_usage_perc 0.25",
        "kv_cache_tokens 128.0",
        "max_concurrency 2.0",
        "num_preemptions_total 3.0",
    ):
        assert f"\nlorasmith:{line}\n" in text
    engine.preemptions = 4
    assert "num_preemptions_total 4.0" in metrics.text([], [], ["calm"]).decode()
    assert 'num_requests_running{model_name="calm"} 0.0' in metrics.text([], [], ["calm"]).decode()


def test_padded_batches_have_no_cache_to_tell_of() -> None:
    engine = SimpleNamespace(cache=None, preemptions=0)
    assert b"kv_cache" not in ServerMetrics(engine, 1).text([], [], [])  # type: ignore[arg-type]
