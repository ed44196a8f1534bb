"""The table of rivals: what is compared, what is left out, and its figures, from a run on a tiny model."""

import json
from types import SimpleNamespace

import jax
import pytest
import yaml

from benchmarks import rivals, spec_bench
from msn_jax import InputError, load
from msn_jax.adapters import init_trained
from msn_jax.config import LoraConfig, NoiseConfig
from msn_jax.decode.tree_sets import tree_set
from msn_jax.eagle import init_eagle
from msn_jax.heads import init_heads
from msn_jax.io.adapters import save_adapter
from msn_jax.ngrams import make_table
from msn_jax.params import declare, parameter_count

pytestmark = pytest.mark.slow


def test_every_arm_of_the_plan_has_trees():
    plan = yaml.safe_load(rivals.PLAN.read_text())
    names = [arm["method"] for arm in plan["arms"]]
    assert names[0] == "ar" and len(set(names)) == len(names)
    for arm in plan["arms"]:
        tree_set(*arm["method"].split(":"))
        assert {*rivals.needed(arm)} <= {"draft", *plan["adapters"]}
        assert {*arm} <= {"method", "what", "needs", "differs"}


def test_programs_go_where_the_process_has_many_maps(tmp_path, monkeypatch):
    maps, lm = tmp_path / "maps", SimpleNamespace(ran={"a program"})
    program = jax.jit(lambda x: x + 1)
    program(1)
    spec_bench.forget_programs(lm, maps)  # of another system
    maps.write_text("a map\n" * 3)
    monkeypatch.setattr(spec_bench, "MOST_MAPS", 3)
    spec_bench.forget_programs(lm, maps)
    assert program._cache_size() == 1 and lm.ran
    monkeypatch.setattr(spec_bench, "MOST_MAPS", 2)
    spec_bench.forget_programs(lm, maps)
    assert program._cache_size() == 0 and not lm.ran  # what is compiled again is warmed up again


def test_a_table_from_a_tiny_model(tmp_path, tiny_ckpt, monkeypatch, capsys):
    heads = jax.tree.map(lambda x: x + 0.1, init_heads(load(tiny_ckpt).cfg, 3))
    save_adapter(tmp_path / "heads", heads, LoraConfig(), "tiny")
    save_adapter(tmp_path / "eagle", init_eagle(jax.random.key(0), load(tiny_ckpt).cfg, 20), LoraConfig(), "tiny")
    table, _ = make_table([([5], [6, 7, 8, 6, 7, 9])], 97, 1, 16)
    save_adapter(tmp_path / "ngrams", table, LoraConfig(), "tiny")
    arm = lambda method, **more: {"method": method, "what": method} | more
    plan = {
        "ckpt": str(tiny_ckpt),
        "dtype": "float32",
        "max_new_tokens": 10,
        "adapters": {
            "medusa": {"path": str(tmp_path / "heads"), "trained": "not at all"},
            "eagle": {"path": str(tmp_path / "eagle"), "trained": "no"},
            "noise": {"path": str(tmp_path / "none"), "trained": "never"},
            "ngrams": {"path": str(tmp_path / "ngrams"), "trained": "counted"},
        },
        "draft": {"model": 1, "trained": "no"},
        "arms": [
            arm("ar"),
            arm("lookahead:lookahead15", differs="sizes"),
            arm("medusa:medusa8", needs="medusa"),
            arm("eagle:eagle5", needs="eagle"),
            arm("draft-model:model4", needs="draft"),
            arm("ngrams:grams8", needs="ngrams"),
            arm("tr-jacobi:found8", needs=["ngrams", "medusa"]),
            arm("tr-jacobi:draft", needs="noise"),
            arm("tr-jacobi:both16", needs=["ngrams", "noise"]),
        ],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    asked = [{"question_id": i, "category": "a", "turns": ["Go on.", "And?"]} for i in range(2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = ["--plan", str(tmp_path / "plan.yaml"), "--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["rivals", *options])
    rivals.main()
    shown = capsys.readouterr().out
    assert f"left out: what needs noise; {tmp_path / 'none'} is not there (never)" in shown
    rows = json.loads((tmp_path / "rivals.json").read_text())["arms"]
    assert [row["method"] for row in rows] == [
        "ar",
        "lookahead:lookahead15",
        "medusa:medusa8",
        "eagle:eagle5",
        "draft-model:model4",
        "ngrams:grams8",
        "tr-jacobi:found8",
    ]
    assert [row["nodes"] for row in rows] == [[1], [15], [8], [5], [4], [8], [8]] and rows[1]["differs"] == "sizes"
    assert [row["identical"] for row in rows] == [4] * 7 == [row["outputs"] for row in rows]
    cfg = load(tiny_ckpt).cfg
    D, layer = cfg.embed, declare(cfg).layers[0]
    eagle = 3 * D * D + parameter_count(layer) + parameter_count(layer.qkv) + D + 20 + 20 * D
    heads = 3 * D * (D + 1)
    ngrams = 16 * 4 * (4 + 2 * 8)
    assert [row["added_bytes"] for row in rows] == [0, 0, 4 * heads, 4 * eagle, 0, ngrams, ngrams + 4 * heads]
    assert rows[-1]["trained"] == "counted; not at all"
    assert "| `medusa:medusa8` | 8 |" in shown and "not at all" in shown and "| 0 MB, no |" in shown

    lora = LoraConfig(rank=2, draft_layers=2)
    save_adapter(tmp_path / "layers", init_trained(jax.random.key(0), cfg, lora, NoiseConfig()), lora, "tiny")
    plan["adapters"] = {"draft": {"path": str(tmp_path / "layers"), "trained": "a little"}}
    plan["arms"] = [arm("ar"), arm("draft-model:model4", needs="draft")]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr("sys.argv", ["rivals", *options[:-1], str(tmp_path / "layers_out")])
    rivals.main()
    _, row = json.loads((tmp_path / "layers_out/rivals.json").read_text())["arms"]
    assert row["identical"] == 4 and row["trained"] == "a little"
    assert row["added_bytes"] == 2 * 4 * parameter_count(layer)  # two layers in float32; the rest is the model's

    plan["arms"] = plan["arms"][1:]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(InputError, match="the first arm must be ar"):
        rivals.main()
