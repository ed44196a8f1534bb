"""decode.py as a user types it, with a few layers of SmolLM2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import decode
import train
from msn_jax import DecodeConfig, InputError, chat, load
from msn_jax.decode.generate import Result
from msn_jax.decode.prompts import Row, read_prompts, read_row

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(shallow, monkeypatch, capsys):
    """Call decode.py; returns what it printed."""
    monkeypatch.setattr(decode, "load", lambda ckpt, adapter, dtype, mesh, draft: shallow)

    def call(*args):
        decode.main(["--ckpt", "smollm2-135m-instruct", *map(str, args)])
        return capsys.readouterr()

    return call


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_prompt_streams_its_text(run):
    out, err = run("--prompt", "Say hello.", "--max_new_tokens", 12)
    assert out.strip()
    assert re.search(r"\d+ tokens, \d+ passes", err)


def test_compare_prints_both_columns(run):
    out, _ = run("--prompt", "Count: 1 2 3 1 2 3 1 2", "--max_new_tokens", 24, "--compare")
    assert "tokens identical: yes" in out
    assert re.search(r"ar +\| tr-jacobi", out)
    assert re.search(r"tokens a pass \(MAT\) +1\.00 +\d\.\d\d", out)


@pytest.mark.parametrize("prompts, asked", [(3, "ar fast fast ar ar fast"), (1, "ar fast fast ar")])
def test_compare_takes_turns_to_be_first(monkeypatch, prompts, asked):
    """One batch is decoded twice, and the faster time counts: a second less each time, here."""
    turns = []

    def batches(lm, prompts, config, ids):
        for name in ids:
            turns.append("ar" if config.method == "ar" else "fast")
            fields = dict.fromkeys(("prompt_tokens", "tokens", "text", "finish_reason", "forwards", "accepted"))
            yield [Result(**fields, id=name, seconds=9 - len(turns), prefill_seconds=0, method=config.method)]

    monkeypatch.setattr(decode, "generate_batches", batches)
    monkeypatch.setattr(decode, "encode", lambda lm, prompt, tools: [0])
    written = []
    rows = [Row(i, "a") for i in range(prompts)]
    plain, fast = decode.compare(None, rows, DecodeConfig(method="jacobi", batch_size=1), written.append)
    assert " ".join(turns) == asked
    assert [r.id for r in plain] == [r.id for r in fast] == [row["id"] for row in written] == list(range(prompts))
    assert {r.method for r in plain} == {"ar"} and {r.method for r in fast} == {"jacobi"}
    if prompts == 1:
        assert (plain[0].seconds, fast[0].seconds) == (5, 6)


def test_rows_of_a_file_in_order(run, tmp_path):
    rows = [
        {"prompt": "red, green, blue, red, green,", "id": "raw"},
        {"messages": [{"role": "user", "content": "Hi"}], "question_id": 7},
        {"turns": ["Name a colour.", "Another."]},
    ]
    out = tmp_path / "out.jsonl"
    run(
        "--prompts",
        write_rows(tmp_path / "in.jsonl", rows),
        "--out",
        out,
        "--max_new_tokens",
        10,
        "--batch_size",
        2,
        "--tree",
        "chain4",
    )
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["id"] for r in results] == ["raw", 7, 2]
    fields = "id prompt_tokens tokens text finish_reason forwards accepted seconds prefill_seconds method"
    for r in results:
        assert list(r) == fields.split()
        assert len(r["tokens"]) == sum(r["accepted"]) <= 10 and len(r["accepted"]) == r["forwards"]
        assert r["finish_reason"] == ("stop" if r["tokens"][-1] in (0, 2) else "length")
    assert results[0]["prompt_tokens"] < 20 < results[1]["prompt_tokens"]  # the template comes with a system prompt
    assert not list(tmp_path.glob("*.partial"))


def test_html_page_is_written_whole(run, tmp_path):
    page = tmp_path / "page.html"
    run("--prompt", "Say <b> & 雪.", "--max_new_tokens", 8, "--tree", "chain4", "--html", page)
    text = page.read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>") and "Say &lt;b&gt; &amp; 雪." in text
    assert list(tmp_path.iterdir()) == [page]


def test_chat_keeps_its_history(run, monkeypatch):
    seen, lines, encode = [], iter(["Hello!", "And now?", ""]), chat.encode
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat, "encode", lambda lm, prompt: seen.append(prompt) or encode(lm, prompt))
    run("--chat", "--max_new_tokens", 6)
    assert [m["role"] for m in seen[1]] == ["user", "assistant", "user"]
    assert seen[1][0]["content"] == "Hello!" and seen[1][1]["content"]


@pytest.mark.parametrize(
    "line, named",
    [
        (b'{"prompt": "a"\n', "line 2: not valid JSON"),
        (b'{"prompt": "\xff"}\n', "line 2: not valid UTF-8"),
        (b'{"prompt": "\\ud800"}\n', "line 2: not valid UTF-8"),
        (b'{"id": ' + b"9" * 5000 + b', "prompt": "a"}\n', "line 2: not JSON that can be read"),
        (b'{"text": "a"}\n', "line 2: no `prompt`, `messages` or `turns`"),
        (b"[1]\n", "line 2: no `prompt`"),
        (b'{"prompt": ""}\n', "line 2: the prompt is empty"),
        (b'{"messages": [{"role": "user"}]}\n', "line 2: `messages` must be"),
        (b'{"turns": []}\n', "line 2: the prompt is empty"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, named):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line)
    with pytest.raises(InputError, match=named):
        read_prompts(str(path), "auto")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [row[:2] for row in read_prompts(str(path), "auto")] == [(0, "a"), (1, "b")]
    path.write_bytes(b'{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "b"}\n')
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        read_prompts(str(path), "auto")


def test_messages_of_tools_are_left_to_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    messages = [{"role": "user", "content": "1+1"}, call, {"role": "tool", "content": "2"}]
    assert read_row({"messages": messages}, "", "auto", 0).prompt == messages


@pytest.mark.parametrize(
    "args, named",
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompts", "nothing.jsonl"], "nothing.jsonl: No such file"),
        (["--prompt", "a", "--out", "/nowhere/out.jsonl"], "--out /nowhere/out.jsonl: cannot be written"),
        (["--prompt", "a", "--html", "/nowhere/a.html"], "--html /nowhere/a.html: cannot be written"),
        (["--prompt", "a", "--out", "."], "--out .: not a regular file"),
        (["--prompt", "a", "--html", "/dev/null"], "--html /dev/null: not a regular file"),
        (["--prompt", "a", "--system", "b"], "--system does nothing with a run that is no --chat"),
        (["--prompt", "a", "--out", "same", "--html", "same"], "--html same: is also --out same"),
        (["--prompts", __file__, "--out", __file__], "is also"),
        (["--prompts", ""], "--prompts : Is a directory"),
        (["--chat", "--out", "a"], "--out does nothing with --chat"),
        (["--prompt", "a", "--logprobs", "2"], "--logprobs does nothing with a run without --out"),
        (["--prompt", "a", "--stop", ""], r"stop = \[''\] is not possible; accepted: a list of texts"),
        (["--prompt", "a", "--method", "ar", "--tree", "msn69"], "--tree does nothing with --method ar"),
        (["--prompt", "\ud800"], "not valid Unicode"),
        (["--prompt", "a", "--top_k", "3000000000"], "top_k = 3000000000"),
        (["--prompt", "a", "--method", "jacobi", "--tree", "root"], "has no draft"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens = 0"),
        (["--prompt", "a", "--max_new_tokens", "9000"], r"9000 new ones \d+; the model's context is 8192"),
        (["--prompt", "a", "--top_p", "0"], "top_p = 0.0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0"),
    ],
)
def test_bad_settings_are_refused(run, args, named):
    with pytest.raises(InputError, match=named):
        run(*args)


@pytest.mark.parametrize(
    "args, named",
    [
        (["--prompt", "a", "--ckpt", "/no/such"], "--ckpt /no/such: no such file or directory; accepted:"),
        (["--prompt", "a", "--method", "beam"], "invalid choice: 'beam'"),
        (["--ckpt", "x"], "one of the arguments --prompt"),
    ],
)
def test_the_program_exits_with_one_line(args, named):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "decode.py", *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("decode.py: error: ") and named in done.stderr


def test_a_run_that_breaks_keeps_its_rows(run, tmp_path, monkeypatch):
    from msn_jax.decode import generate

    whole, calls = generate.result_of, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(generate, "result_of", breaks)
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    with pytest.raises(KeyboardInterrupt):
        run("--prompts", path, "--out", tmp_path / "out.jsonl", "--max_new_tokens", 4)
    assert not (tmp_path / "out.jsonl").exists()
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 1


def test_the_fastest_dtype_is_of_the_backend(monkeypatch):
    assert decode.given_dtype("auto", "tpu") == "bfloat16" and decode.given_dtype("int8", "tpu") == "int8"
    for kernels, dtype in [("avx2", "bfloat16"), (None, "float32")]:
        monkeypatch.setattr(decode.kernels, "instruction_set", lambda kernels=kernels: kernels)
        assert decode.given_dtype("auto", "cpu") == dtype


def test_refusals_name_what_the_user_gave(tmp_path, config):
    with pytest.raises(InputError, match="^ckpt /no/such: no such file"):
        load("/no/such")
    with pytest.raises(InputError, match="^--ckpt /no/such: no such file"):
        decode.main(["--ckpt", "/no/such", "--prompt", "a"])
    with pytest.raises(InputError, match="^model.ckpt /no/such: no such file"):
        train.main(["--config", config(model={"scratch": None, "ckpt": "/no/such"})])
    with pytest.raises(InputError, match="^--export gs://a: not a local path"):
        train.main(["--config", config(), "--export", "gs://a"])
