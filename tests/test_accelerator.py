"""accelerator.py: what its stages keep, that it goes on where it was cut off, and that no stage stops the next."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GOLDENS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import accelerator, accelerator_report
from benchmarks.stages import check, decoding, learning, passes, training
from benchmarks.stages.files import read
from benchmarks.stages.stage import Stage

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "accelerator.py"
RECORD = {"stage", "machine", "small", "command", "commit", "device", "complete", "seconds", "rows", "left_out"}


@pytest.fixture(scope="module")
def chat_ckpt(tmp_path_factory):
    """A tiny model whose tokens are characters, with a chat template."""
    folder = tmp_path_factory.mktemp("ckpt")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "tiny_gqa_tied" / name, folder)
    letters = Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(90)}, merges=[], unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="z")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def args(chat_ckpt):
    asked = {"ckpt": str(chat_ckpt), "adapter": None, "questions": None, "prompts": "", "learn_args": "", "trees": ""}
    return SimpleNamespace(**asked, graphs=False)


def kept(stage: Stage) -> list[dict]:
    """The rows of a finished stage, as a reader of the file finds them."""
    stage.finish()
    file = json.loads(stage.path.read_text())
    assert file.keys() == RECORD and file["complete"] is (not file["left_out"])
    assert file["machine"].keys() >= {"device", "backend", "jax", "driver", "memory_bytes", "xla_flags"}
    return file["rows"]


def test_check_compares_with_ar(tmp_path, args, monkeypatch):
    monkeypatch.setattr(check, "ARMS", {"float32": ("ar", "tr-jacobi"), "bfloat16": ("ar",)})
    stage = Stage("check", tmp_path, 600, small=True)
    check.run(stage, args)
    rows = kept(stage)
    assert rows[0]["what"] == {"what": "float32 product"} and rows[0]["largest_error"] < 1e-6
    assert {row["what"]["dtype"] for row in rows[1:]} == {"float32", "bfloat16"}
    for row in rows[1:]:
        assert row["identical"] + row["near_ties"] + row["different"] == row["outputs"] == 4
        assert row["against"] == "ar here"  # these weights have no kept answers
        assert row["what"]["dtype"] == "bfloat16" or row["different"] == 0


def test_passes_keep_a_floor_and_answers(tmp_path, args, monkeypatch):
    monkeypatch.setattr(passes, "SMALL", passes.SMALL[:1])
    stage = Stage("passes", tmp_path, 600, small=True)
    passes.run(stage, args)
    rows = kept(stage)
    assert rows[0]["bytes_per_s"] > 0
    (answers,) = [row for row in rows if row["what"] == {"what": "answers"}]
    assert answers["second_run_same"] and all(answers["tokens"])
    timed = [row for row in rows if "nodes" in row["what"]]
    assert [row["what"]["nodes"] for row in timed] == [1, 8]
    assert all(0 < row["min_ms"] <= row["ms"] and row["floor_ms"] > 0 for row in timed)


def test_decode_keeps_answers_of_every_method(tmp_path, args):
    stage = Stage("decode", tmp_path, 600, small=True)
    decoding.run(stage, args)
    programs, *asked, loop = kept(stage)
    assert [row["what"]["question_id"] for row in asked] == [0, 1, 2]
    figures = accelerator_report.decode_figures([answer for row in asked for answer in row["answers"]])
    assert figures["ar"]["ratio_to_ar"] == figures["ar"]["mat"] == 1.0
    assert figures.keys() == programs["nodes"].keys() >= {"ar", "tr-jacobi:mix64", "tr-jacobi:msn69"}
    assert all(f["identical"] + f["near_ties"] + f["different"] == 3 for f in figures.values())
    assert loop["counts"]["outfeed"] == 0 and programs["errors"] == {}
    assert (tmp_path / "trace").is_dir() and "while(" in (tmp_path / "loop.hlo.txt").read_text()
    page = "\n".join(accelerator_report.section(tmp_path))
    assert "3 questions of `golden_ar.json` (3 answers, up to 16 tokens), bfloat16, batch 1" in page


def test_train_keeps_steps(tmp_path, args, monkeypatch):
    monkeypatch.setattr(training, "SMALL", training.SMALL[1:])
    stage = Stage("train", tmp_path, 600, small=True)
    training.run(stage, args)
    rate, *steps = kept(stage)
    assert rate["flops_per_s"] > 0
    assert [step["what"]["remat"] for step in steps] == ["full"]
    assert all(step["tokens_per_s"] > 0 and step["mfu"] is None for step in steps)


def test_learn_keeps_what_its_script_wrote(tmp_path, args, monkeypatch):
    script = tmp_path / "experiments" / "learn.py"
    script.parent.mkdir()
    (script.parent / "__init__.py").touch()
    script.write_text(
        "import json, pathlib, sys\n"
        "given = lambda name: pathlib.Path(sys.argv[sys.argv.index(name) + 1])\n"
        "assert len(given('--questions').read_text().splitlines()) == 12 and '--small' in sys.argv\n"
        "given('--out').mkdir(); (given('--out') / 'learn.jsonl').write_text(json.dumps({'mat': 2.5}) + '\\n')\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(learning, "ROOT", tmp_path)
    stage = Stage("learn", tmp_path, 60, small=True)
    learning.run(stage, args)
    assert [row["figures"] for row in kept(stage)] == [{"mat": 2.5}]
    assert read(stage.path)["left_out"][0]["reason"].endswith("ended with 3")


def test_rows_are_measured_once(tmp_path):
    stage = Stage("passes", tmp_path, 60)
    whats = [{"nodes": 1}, {"nodes": 8}]
    stage.keep(whats[0], ms=1.0)
    again = Stage("passes", tmp_path, 60)
    assert again.todo(whats) == [{"nodes": 8}] and again.row(nodes=1)["ms"] == 1.0
    again.leave_out([{"nodes": 8}], "no time left")
    again.finish()
    assert not read(again.path)["complete"]


def test_figures_of_another_device_are_not_mixed(tmp_path):
    stage = Stage("passes", tmp_path, 60)
    stage.keep({"nodes": 1}, ms=1.0)
    file = read(stage.path)
    file["machine"]["device"] = "another"
    stage.path.write_text(json.dumps(file))
    with pytest.raises(SystemExit, match="holds figures of another"):
        Stage("passes", tmp_path, 60)


def command(out: Path, ckpt, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--small", "--ckpt", str(ckpt), "--out", str(out), *more]


def test_a_failing_stage_does_not_stop_the_next(tmp_path, chat_ckpt):
    done = subprocess.run(
        command(tmp_path, chat_ckpt, "--stages", "decode,train", "--questions", "no such file", "--budget_s", "300"),
        capture_output=True,
        text=True,
    )
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["stages"] == {"decode": "failed with 1", "train": "done"}
    assert read(tmp_path / "train.json")["complete"] and not read(tmp_path / "decode.json")["complete"]


def test_a_run_cut_off_goes_on(tmp_path, chat_ckpt):
    asked = command(tmp_path, chat_ckpt, "--stages", "passes", "--budget_s", "300")
    running = subprocess.Popen(asked, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (read(tmp_path / "passes.json") or {"rows": []})["rows"]:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 143
    before = read(tmp_path / "passes.json")["rows"]
    assert before and read(tmp_path / "passes.json")["command"].startswith("python benchmarks/accelerator.py --small ")
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    after = read(tmp_path / "passes.json")
    assert after["complete"] and after["rows"][: len(before)] == before
    third = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert json.loads(third.stdout.splitlines()[-1])["stages"] == {"passes": "kept from before"}
    page = "\n".join(accelerator_report.section(tmp_path))
    assert "### What a pass costs" in page and json.loads(done.stdout.splitlines()[-1])["stages"] == {"passes": "done"}


@pytest.mark.parametrize(
    "faster, same, again, pays", [(1, 1, 1, True), (0, 1, 1, False), (1, 0, 1, False), (1, 1, 0, False)]
)
def test_graphs_are_taken_where_they_are_right_and_faster(tmp_path, faster, same, again, pays):
    def write(name, ms, tokens, second):
        rows = [
            {"what": {"what": "answers"}, "tokens": tokens, "second_run_same": second},
            {"what": {"weights": "ckpt", "nodes": 1}, "ms": ms},
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))

    write("passes", 2.0, [[1, 2]], True)
    write("graphs", 1.0 if faster else 3.0, [[1, 2]] if same else [[1, 3]], bool(again))
    assert accelerator.graphs_pay(tmp_path) is pays
    flags = accelerator.environment(tmp_path, "decode").get("XLA_FLAGS", "")
    assert (accelerator.GRAPHS in flags) is pays
