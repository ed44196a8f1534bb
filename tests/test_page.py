"""The page of decode.py --html: where each token came from, against a search of the text by hand."""

import re

import pytest
from test_source import retrieved

from msn_jax import generate
from msn_jax.decode.prompts import encode
from msn_jax.page import OWN, PREDICTED, RETRIEVED, run_of, write_html

pytestmark = pytest.mark.slow


def found_by_hand(text, count):
    """The continuation of the text's end that its earlier occurrences agree on, without what lies past the end."""
    (path,), _ = retrieved(text, count, 1)
    return [token for token in path if token >= 0]


@pytest.mark.parametrize("method", ["lookup", "tr-jacobi", "ar"])
def test_tokens_are_marked_by_where_they_came_from(shallow, tmp_path, method):
    prompt = "red, green, blue; red, green, blue; red, green,"
    (result,) = generate(shallow, [prompt], method=method, max_new_tokens=40)
    ids = encode(shallow, prompt)
    run = run_of(shallow, ids, result)
    assert "".join(piece.text for pieces in run.pieces for piece in pieces) == result.text
    at, marks = 0, []
    for pieces, count, offered in zip(run.pieces, result.accepted, run.offered, strict=True):
        before, new = [*ids, *result.tokens[:at]], result.tokens[at : at + count]
        found = found_by_hand(before, max(result.accepted))[:count]
        expected = [RETRIEVED if found[: i + 1] == new[: i + 1] else PREDICTED for i in range(count - 1)] + [OWN]
        assert [piece.origin for piece in pieces] == expected
        missed = len(found) >= count and found[: count - 1] == new[: count - 1] and found[count - 1] != new[-1]
        assert bool(offered) == (missed and method != "ar")
        marks += expected
        at += count
    assert (RETRIEVED in marks) == (method != "ar") and (method != "lookup" or PREDICTED not in marks)
    write_html(tmp_path / "page.html", "a < b", prompt, [run], {"dtype": "float32", "tree": "<x>"})
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "dtype float32 · tree &lt;x&gt;" in page and "a &lt; b" in page
    assert page.count("<details>") == (method == "ar")
    assert len(re.findall(r'<u class="retrieved">', page)) - ("retrieved" in marks) == marks.count(RETRIEVED)
