"""Where rows go: nothing that was written is lost, and no input is written over."""

import json
import os
import threading

import pytest

from msn_jax import InputError
from msn_jax.io.rows_out import check_outputs, rows_out


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("earlier")
    with rows_out(str(out)) as write:
        write({"text": "é"})
        assert out.read_text() == "earlier" and rows_of(tmp_path / "out.jsonl.partial") == [{"text": "é"}]
    assert rows_of(out) == [{"text": "é"}] and os.listdir(tmp_path) == ["out.jsonl"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out.jsonl")
    with rows_out(str(tmp_path / "link")) as write:
        write({"a": 1})
    assert (tmp_path / "link").is_symlink() and rows_of(tmp_path / "out.jsonl") == [{"a": 1}]


def test_what_a_broken_run_left_is_kept(tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    for i in range(2):
        with pytest.raises(KeyboardInterrupt), rows_out(out) as write:
            write({"a": i})
            raise KeyboardInterrupt
    assert "kept as out.jsonl.partial.1" in capsys.readouterr().err
    with rows_out(out) as write:
        write({"a": 2})
    found = {path.name: rows_of(path) for path in tmp_path.iterdir()}
    assert found == {
        "out.jsonl": [{"a": 2}],
        "out.jsonl.partial.1": [{"a": 0}],
        "out.jsonl.partial.2": [{"a": 1}],
    }


def test_a_run_that_breaks_before_its_first_row_leaves_nothing(tmp_path):
    with pytest.raises(InputError), rows_out(str(tmp_path / "out.jsonl")):
        raise InputError("no such checkpoint")
    assert not os.listdir(tmp_path)


def test_two_processes_do_not_share_an_output(tmp_path):
    out = str(tmp_path / "out.jsonl")
    with rows_out(out) as write:
        write({"a": 1})
        with pytest.raises(InputError, match="another process is writing it"), rows_out(out):
            pass
    assert rows_of(tmp_path / "out.jsonl") == [{"a": 1}]


def test_a_full_disk_is_named_and_its_rows_kept(tmp_path, request):
    request.getfixturevalue("full_disk")
    with pytest.raises(InputError, match=r"--out .*cannot be written \(File too large\); .*partial holds"):
        with rows_out(str(tmp_path / "out.jsonl")) as write:
            for i in range(5000):
                write({"a": i})
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl.partial").stat().st_size > 10_000


def test_rows_go_to_a_pipe_as_they_come(tmp_path):
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_outputs({"--out": str(pipe)}, {})
    reader = threading.Thread(target=lambda: seen.append(pipe.read_text()))
    reader.start()
    with rows_out(str(pipe)) as write:
        write({"a": 1})
    reader.join()
    assert seen == ['{"a": 1}\n'] and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("path", ["-", "/dev/stdout"])
def test_rows_go_to_stdout(path, capsys):
    check_outputs({"--out": path}, {})
    with rows_out(path) as write:
        write({"text": "é"})
    assert json.loads(capsys.readouterr().out) == {"text": "é"}


def test_outputs_that_are_inputs_are_refused(tmp_path):
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    (ckpt / "config.json").write_text("{}")
    prompts = tmp_path / "out.jsonl.partial"
    prompts.write_text("{}")
    cases = {
        str(ckpt / "config.json"): "is a file of --ckpt",
        str(tmp_path / "x" / ".." / "ckpt" / "config.json"): "is a file of --ckpt",
        str(tmp_path / "out.jsonl"): "out.jsonl.partial is also --prompts",
        str(prompts): "is also --prompts",
    }
    (tmp_path / "x").mkdir()
    for out, why in cases.items():
        with pytest.raises(InputError, match=f"--out .*: .*{why}"):
            check_outputs({"--out": out}, {"--ckpt": str(ckpt), "--prompts": str(prompts)})
    check_outputs({"--out": str(ckpt / "answers.jsonl")}, {"--ckpt": str(ckpt)})
    with pytest.raises(InputError, match="is a file of --adapter .*ckpt"):
        check_outputs({"--out": str(ckpt / "config.json")}, {"--adapter": [str(tmp_path / "x"), str(ckpt)]})
    with pytest.raises(InputError, match="--html .* is also --out"):
        check_outputs({"--out": str(tmp_path / "a"), "--html": str(tmp_path / "a.partial")}, {})
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "out.jsonl.partial", "x"]
