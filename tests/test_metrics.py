import json

import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import InputError
from msn_jax.io.metrics import MetricsLog


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}'])
def test_metrics_are_cut_back_to_a_step(tmp_path, torn):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"loss": np.float32(step), "rows": 3})
    log.flush()
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(torn)  # killed while writing
    log = MetricsLog(tmp_path)
    log.cut_back(3)
    assert metrics(tmp_path) == [{"step": s, "loss": float(s), "rows": 3} for s in (1, 2, 3)]
    log.write(4, {"loss": jnp.float32("nan")})
    assert metrics(tmp_path)[3:] == [{"step": 4, "loss": None}]
    log.cut_back(0)
    assert metrics(tmp_path) == []
    log.close()


def test_metrics_in_a_store_are_rewritten(tmp_path, monkeypatch):
    monkeypatch.setattr("msn_jax.io.metrics.is_remote", lambda path: True)
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 2.0})
    assert not (tmp_path / "metrics.jsonl").exists()
    log.flush()
    log = MetricsLog(tmp_path)
    log.cut_back(1)
    log.write(2, {"loss": 3.0})
    log.flush()
    assert [m["loss"] for m in metrics(tmp_path)] == [1.0, 3.0]


def test_metrics_on_a_full_disk(tmp_path, request):
    log = MetricsLog(tmp_path)
    request.getfixturevalue("full_disk")
    with pytest.raises(InputError, match="metrics.jsonl: cannot be written .(File too large|No space)"):
        for step in range(1000):
            log.write(step, {"loss": 1.0, "accuracy": 0.5})
    log.close()
