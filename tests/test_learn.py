"""What experiments.learn adds to train.py: packed rows, arms by name, and many steps in one dispatch."""

import argparse
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import learn
from experiments.arm_training import Programs, Trainer, cosine, parse_arm
from experiments.learn import check_arm
from experiments.learn_table import part_of, trade_table
from experiments.packed import pack, read_packed, write_packed
from msn_jax import InputError, load, train_step
from msn_jax.config import TrainConfig
from msn_jax.io.adapters import load_adapter
from msn_jax.params import stack_layers
from msn_jax.records import kept_rows
from msn_jax.sharding import make_mesh

pytestmark = pytest.mark.slow


def test_rows_hold_every_example_once_and_whole():
    lengths = [5, 3, 8, 2, 6]
    examples = [(np.arange(n, dtype=np.int32) + 10 * i, np.arange(n) >= n // 2) for i, n in enumerate(lengths)]
    rows = pack(examples, 8, bins=2)
    # 5 and 3 fill a row, 8 one; 2 opens the third, where 6 still fits.
    assert rows["segment_ids"].tolist() == [[1] * 5 + [2] * 3, [1] * 8, [1] * 2 + [2] * 6]
    assert rows["tokens"][2].tolist() == [30, 31, 40, 41, 42, 43, 44, 45]
    assert rows["positions"][2].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert rows["response"][0].astype(int).tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert pack(examples[:1], 7)["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 0, 0]]


def test_the_schedule_is_that_of_train_py():
    train = TrainConfig(out="x", steps=100, learning_rate=1e-3, warmup_steps=10)
    ours = jax.vmap(lambda step: cosine(step, train, 100.0))(jnp.arange(100))
    with jax.numpy_dtype_promotion("standard"):
        theirs = [float(train_step.learning_rate(train)(step)) for step in range(100)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_arms_by_name():
    marked = parse_arm("beside-marked-model@240x16", rows=32)
    assert (marked.steps, marked.rows, marked.noise.mark, marked.noise.target) == (240, 16, True, "model")
    draft = parse_arm("draft-r48-int8-overlap-n5", rows=32)
    assert (draft.lora.rank, draft.lora.store, draft.noise.loss, draft.noise.length) == (48, "int8", "overlap", 5)
    assert (draft.steps, draft.rows) == (None, 32) and parse_arm("plain", 32).rows == 8
    heads = parse_arm("medusa-4", rows=32)
    assert heads.drafts and (heads.heads.count, heads.noise.kind, heads.lora.rank) == (4, "none", 0)
    heads = parse_arm("eagle-16384@40x8", rows=32)
    assert heads.drafts and (heads.heads.kind, heads.heads.vocabulary, heads.steps) == ("eagle", 16384, 40)
    assert parse_arm("eagle", 32).heads.vocabulary == 8192
    layers = parse_arm("layers-10-int8-l1@1900x32", rows=8)
    assert layers.drafts and (layers.lora.draft_layers, layers.lora.rank, layers.lora.alpha) == (10, 128, 128.0)
    assert (layers.lora.store, layers.noise.loss, layers.noise.kind, layers.rows) == ("int8", "l1", "none", 32)
    assert parse_arm("layers-2-r8", 32).lora.rank == 8 and parse_arm("layers-2-r8", 32).noise.loss == "kl"
    assert parse_arm("plain@5", 32).steps == 5 and parse_arm("plain@5", 32).rows == 8


def test_every_knob_of_a_name_reaches_its_setting():
    arm = parse_arm("beside-marked-model-l1-w0.25-a24-n2-r8-f16@240x4", rows=32)
    noise, lora = dataclasses.asdict(arm.noise), arm.lora
    wanted = {
        "layout": "beside",
        "mark": True,
        "target": "model",
        "loss": "l1",
        "weight": 0.25,
        "anchors": 24,
        "length": 2,
    }
    assert wanted.items() <= noise.items()
    assert (lora.rank, lora.alpha, lora.store, arm.steps, arm.rows) == (8, 8.0, "float16", 240, 4)
    base = parse_arm("beside-marked", rows=32)
    assert (base.noise.weight, base.noise.anchors, base.noise.length, base.noise.target) == (0.5, 48, 4, "label")
    assert (base.lora.rank, base.lora.store, base.steps) == (16, None, 120)
    for knob, name in (("-w1", "weight"), ("-a9", "anchors"), ("-n5", "length"), ("-model", "target")):
        other = dataclasses.asdict(parse_arm(f"beside{knob}", 32).noise)
        known = dataclasses.asdict(parse_arm("beside", 32).noise)
        assert [key for key in known if known[key] != other[key]] == [name]
    # How it is stored is no other program.
    assert parse_arm("beside-int8", 32).program == parse_arm("beside@9x8", 32).program
    assert parse_arm("beside-w1", 32).program != parse_arm("beside", 32).program


@pytest.mark.parametrize(
    "name, said",
    [
        ("sideways", "accepted: draft-rRANK"),
        ("beside-a24-w0.5", "accepted: .* in this order"),
        ("inline-w0.5", "accepted: draft-rRANK"),
        ("inline-model", "accepted: draft-rRANK"),
        ("beside-l1", "accepted: draft-rRANK"),
        ("plain-marked", "accepted: draft-rRANK"),
        ("beside-w0.5-w0.5", "accepted: draft-rRANK"),
        ("beside-w.5", "accepted: draft-rRANK"),
        ("beside-n0", "noise.length = 0 is not possible"),
        ("beside-a0", "noise.anchors = 0 is not possible"),
        ("beside-r0", "lora.alpha = 0.0 is not possible"),
        ("layers-0", "accepted: layers-1 or more"),
        ("plain@0x8", "accepted: draft-rRANK"),
        ("plain@120y8", "accepted: draft-rRANK"),
        ("plain@", "accepted: draft-rRANK"),
    ],
)
def test_a_name_that_is_none_is_refused_in_a_line(name, said):
    with pytest.raises(InputError, match=f"^--arms {name}: {said}") as refused:
        parse_arm(name, 32)
    assert "\n" not in str(refused.value)


def test_an_arm_must_fit_its_model_and_its_trees(one_layer):
    methods = {"methods": "jacobi:small13", "marked_methods": "jacobi:draft13", "draft_methods": "jacobi:draft13"}
    methods |= {
        "medusa_methods": "medusa:medusa16",
        "eagle_methods": "eagle:eagle8",
        "layers_methods": "draft-model:model4",
    }
    args = argparse.Namespace(cfg=one_layer[0], dtype="float32", float32_methods="", **methods)
    for name in ("beside-marked-n2", "beside-n1", "draft-r2-n2", "medusa-4", "eagle-20", "layers-1", "plain"):
        check_arm(parse_arm(name, 8), args)
    for name, said in (
        ("beside-marked-n1", "jacobi:draft13 has noise of depth 2; accepted: -n2 or more"),
        ("draft-r2-n1", "jacobi:draft13 has noise of depth 2; accepted: -n2 or more"),
        ("medusa-1", "medusa:medusa16 asks for . heads; accepted: medusa-. or more"),
        ("layers-2", "lora.draft_layers = 2 is not possible; accepted: up to 1"),
    ):
        with pytest.raises(InputError, match=f"^--arms {name}: {said}"):
            check_arm(parse_arm(name, 8), args)


def test_rows_come_back_from_their_file(tmp_path):
    rows = pack([(np.arange(5, dtype=np.int32), np.arange(5) > 2)] * 3, 8)
    write_packed(tmp_path / "a" / "rows.npz", rows, {name: x[:1] for name, x in rows.items()}, 3)
    whole, held, examples = read_packed(tmp_path / "a" / "rows.npz", 8)
    for name, x in rows.items():
        np.testing.assert_array_equal(whole[name], x, strict=True)
        np.testing.assert_array_equal(held[name], x[:1], strict=True)
    assert examples == 3
    with pytest.raises(InputError, match="rows of 8 tokens; accepted: of --tokens 16, or another --out"):
        read_packed(tmp_path / "a" / "rows.npz", 16)


@pytest.mark.parametrize(
    "name", ["beside-marked@4x2", "draft-r2@4x2", "medusa-3@4x2", "eagle-20@4x2", "layers-1-r2@4x2"]
)
def test_a_dispatch_is_so_many_steps(one_layer, tmp_path, name):
    cfg, params = one_layer
    rng = np.random.default_rng(0)
    examples = [(rng.integers(0, 61, 30).astype(np.int32), np.arange(30) >= 5) for _ in range(12)]
    rows = jax.device_put(pack(examples, 64))
    held = {name: x[None, :2] for name, x in rows.items()}
    settings = {"dtype": "float32", "activations": None, "remat": "none", "tokens": 64, "dispatch": 2}
    args = argparse.Namespace(cfg=cfg, ckpt="base", base="base", trained_on=None, **settings)
    arm, frozen = parse_arm(name, 2), stack_layers(params)
    arm = dataclasses.replace(arm, noise=dataclasses.replace(arm.noise, anchors=8))
    # Rows past the count are there for the shape alone: none of them is learnt.
    longer = {name: jnp.pad(x, ((0, 2), (0, 0)), constant_values=1) for name, x in rows.items()}
    trainer = Trainer(arm, Programs(arm, args, frozen, longer, held), longer, held, len(rows["tokens"]))
    longer = Trainer(dataclasses.replace(arm, steps=8), trainer.programs, longer, held, len(rows["tokens"]))
    assert longer.train(3, 0.0, tmp_path) is None and not any(tmp_path.iterdir())  # there is no time for it
    trained, figures = trainer.train(3, 1e9, tmp_path)
    assert figures["steps"] == 4 and "top10_depth1" in trainer.held_out(trained)

    run = trainer.programs.run
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=3, steps=4, warmup_steps=0))
    schedule = lambda step: cosine(step, trainer.programs.run.train, 4.0)
    step = jax.jit(train_step.make_train_step(cfg, run, schedule=schedule))
    state = train_step.init_state(cfg, run, make_mesh(devices=jax.devices()[:1]))
    if arm.heads.kind == "eagle":
        replies = np.concatenate([tokens[reply] for tokens, reply in examples])
        counts = np.bincount(replies, minlength=61)
        assert counts[np.int64(trained.vocabulary)].sum() == np.sort(counts)[-20:].sum()
        state = state.replace(params=state.params.replace(vocabulary=trained.vocabulary))
    order = np.concatenate([picks.permutation(6) for picks in [np.random.default_rng(3)] * 2])[:8].reshape(4, 2)
    for picked in order:
        state, _ = step(state, frozen, {name: x[picked] for name, x in rows.items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained, state.params)
    saved = load_adapter(tmp_path, cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), saved, trained)


def test_the_same_command_trains_what_is_left(tmp_path, tiny_ckpt, monkeypatch, capsys):
    talk = lambda i: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "abcdefgh" * 3 + str(i)}]
    rows = lambda count: "".join(json.dumps({"messages": talk(i)}) + "\n" for i in range(count))
    for name, count in (("own", 24), ("held", 4), ("tuning", 40)):
        (tmp_path / f"{name}.jsonl").write_text(rows(count))
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "category": "a", "turns": ["Go on."]}) + "\n")
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    shutil.copytree(tiny_ckpt, ckpt)  # with a template that ends its replies
    (ckpt / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}")
    flags = f"--ckpt {ckpt} --questions {tmp_path}/q.jsonl --replies {tmp_path} --tuning {tmp_path}/tuning.jsonl"
    flags += f" --out {out} --tokens 64 --most_rows 16 --answer_batch 2 --dispatch 1 --max_new_tokens 4 --seeds 0,1"
    flags += " --dtype float32 --methods jacobi:small13 --layers_methods draft-model:model4"

    def run(*more: str) -> list[tuple]:
        """What was trained in this call."""
        before = len(kept_rows(out / "learn.jsonl"))
        monkeypatch.setattr("sys.argv", ["learn", *flags.split(), *more])
        learn.main()
        new = kept_rows(out / "learn.jsonl")[before:]
        return [(row["arm"], row["seed"]) for row in new if "steps" in row]

    assert run("--rows_only") == [] and {file.name for file in out.glob("*.npz")} == {"rows-own.npz", "rows-tuning.npz"}
    (tmp_path / "own.jsonl").unlink()  # rows come from their file
    arms = ("--arms", "layers-1-r2@2x2,plain@2x2")
    assert run(*arms, "--seconds", "1") == []
    assert "no time for: layers-1-r2@2x2, seed 0; plain@2x2, seed 0; plain@2x2, seed 1" in capsys.readouterr().out
    assert run(*arms) == [("layers-1-r2@2x2", 0), ("plain@2x2", 0), ("plain@2x2", 1)]
    found = kept_rows(out / "learn.jsonl")
    assert sum("answers" in row and "seed" in row for row in found) == 3
    # Cut off before the last measurement: it is measured, and nothing is trained again.
    last = max(i for i, row in enumerate(found) if "answers" in row)
    (out / "learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[:last]))
    assert run(*arms) == []
    assert sum("answers" in row and "seed" in row for row in kept_rows(out / "learn.jsonl")) == 3
    assert load(tiny_ckpt, out / "layers-1-r2-2x2-seed0").draft.cfg.layers == 1


def test_settings_are_set_against_plain_of_the_same_steps():
    def records(arm, loss, forwards, seed=0, **noise):
        settings = {"kind": "ahead", "layout": "beside", "mark": True, "weight": 0.5, "anchors": 48, "target": "label"}
        run = {"arm": arm, "seed": seed, "steps": 1, "step_s": 1.0, "held_out": {"loss": loss}}
        run |= {"noise": settings | {"length": 4, "loss": "kl"} | noise, "lora": {"draft_only": False, "rank": 16}}
        row = lambda method, forwards: {
            "question_id": 1,
            "method": method,
            "tokens": 60,
            "forwards": forwards,
            "rep4_frac": 0.0,
        }
        answers = [row("jacobi:x", forwards), row("tr-jacobi:x", 30)]
        return [run, {"arm": arm, "seed": seed, "methods": {"jacobi:x": {}, "tr-jacobi:x": {}}, "answers": answers}]

    found = records("plain@9x8", 2.0, 60, kind="none") + records("plain@99x8", 1.0, 30, kind="none")
    found += records("beside-marked@9x8", 2.02, 40) + records("beside-marked-model@99x8", 1.05, 20, target="model")
    # The third has the second seed alone, and is set against that of plain.
    found += records("plain@9x8", 4.0, 120, seed=1) + records("beside@9x8", 4.04, 80, seed=1, mark=False)
    found += records("beside-marked@9x8", 4.12, 80, seed=1)
    heads = records("medusa-4@9x8", 9.0, 10)
    heads[0]["heads"] = {"kind": "medusa"}
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in trade_table(found + heads, "plain").split("\n")
    ]
    same = ["1.500 (1.500 to 1.500)", "1.000 (1.000 to 1.000)"]
    assert lines[2:-1] == [
        ["beside, marked", "9x8", "2", "0.5", "48", "label", "4", "16", "+2.3%", *same],
        ["beside, marked", "99x8", "1", "0.5", "48", "model, kl", "4", "16", "+5.0%", *same],
        ["beside", "9x8", "1", "0.5", "48", "label", "4", "16", "+1.0%", *same],
    ]
    assert {row["arm"] for row in part_of(found + heads, drafts=True)} == {"medusa-4@9x8"}
    runs = [{"command": "a"}, *found, {"command": "b"}, *heads, {"command": "c"}]
    commands = lambda drafts: [row["command"] for row in part_of(runs, drafts) if "command" in row]
    assert (commands(True), commands(False)) == (["b"], ["a"])
    assert "medusa-4@9x8" not in {row["arm"] for row in part_of(found + heads, drafts=False)}
