"""The snippets of README.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_snippets_run(smollm2, shallow, monkeypatch, capsys):
    monkeypatch.setattr("msn_jax.load", lambda ckpt: smollm2)
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 3
    names = {}
    for snippet in snippets:
        exec(snippet, names)
        names["lm"] = shallow  # gradients of all layers take long to compile
    assert "blue" in capsys.readouterr().out
    assert names["over_keys"].shape == (2,)
    assert names["gradients"].embed.shape == shallow.params.embed.shape


def test_the_worked_example_holds():
    text = (Path(__file__).parent.parent / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 6
    names = {}
    for snippet in snippets:
        exec(snippet, names)
