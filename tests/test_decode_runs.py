"""Whatever training makes is decoded by the very command that train.py prints, and as the library loads it."""

import json
import re
import shlex

import pytest

import decode
import train
from msn_jax import generate, load

pytestmark = pytest.mark.slow

CHAT = [[{"role": "user", "content": "Count from 3 by 2."}]]
KINDS = {
    "all weights": {},
    "lora, marked": {"lora": {"rank": 2}, "noise": {"mark": True}},
    "draft-only": {"lora": {"rank": 2, "draft_only": True}, "noise": {"anchors": 9}},
}


@pytest.fixture(scope="module")
def decoded():
    """A function: the tokens that a command line of decode.py writes."""

    def call(line, out):
        decode.main([*line, "--max_new_tokens", "12", "--out", str(out)])
        return json.loads(out.read_text())["tokens"]

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_that_training_prints_decodes_its_run(config, tmp_path, capsys, kind, decoded):
    sections = {name: dict(values) for name, values in KINDS[kind].items()}
    folder = tmp_path / "a run"  # a name that a shell would split
    if "lora" in sections:
        first = config("base.yaml", train={"steps": 1, "out": str(tmp_path / "first")})
        train.main(["--config", first, "--export", str(tmp_path / "base")])
        sections["model"] = {"scratch": None, "ckpt": str(tmp_path / "base")}
    train.main(["--config", config(train={"steps": 2, "out": str(folder)}, **sections)])
    command = shlex.split(re.findall(r"decode with: python decode.py (.*)", capsys.readouterr().out)[-1])
    question = [CHAT[0][0]["content"] if word == "TEXT" else word for word in command]
    plain = decoded([*question, "--method", "ar"], tmp_path / "plain.jsonl")
    assert decoded(question, tmp_path / "fast.jsonl") == plain
    run = load(folder)
    assert generate(run, CHAT, max_new_tokens=12)[0].tokens == plain
    if run.drafter is not None:
        for tree in ("draft", "draft16"):
            short = {"method": "tr-jacobi", "tree": tree}
            try:
                assert generate(run, CHAT, max_new_tokens=12, **short)[0].tokens == plain
            except ValueError as e:  # more noise in a row than the adapter has embeddings for
                assert "noise tokens in a row" in str(e)
    if "lora" in sections:
        beside = ["--ckpt", str(tmp_path / "base"), "--adapter", str(folder / "adapter"), *question[2:]]
        assert decoded(beside, tmp_path / "beside.jsonl") == plain
