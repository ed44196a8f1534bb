"""RESULTS.md from the figures of two arms, by hand."""

import json

import pytest

from benchmarks.spec_bench import read_done, split_method
from experiments import results
from experiments.arms import without_adapters
from experiments.statistics import accuracy_difference, mat_interval, mat_ratio
from msn_jax import InputError
from msn_jax.records import keep_rows, kept_rows


def answers(method, rows):
    """rows: (question, tokens, forwards, share of repeated 4-grams)."""
    names = ("question_id", "tokens", "forwards", "rep4_frac")
    accepted = lambda tokens, forwards: [tokens - forwards + 1] + [1] * (forwards - 1)
    return [dict(zip(names, r, strict=True), method=method, accepted=accepted(r[1], r[2])) for r in rows]


def arm(name, jacobi, right, loss, seed=0, batch=""):
    figures = dict(mat=1.5, rep4_frac=0.1, ratio_to_ar=1.1, identical=3, near_ties=0, different=0, questions=3)
    names = ["ar", "jacobi", "tr-jacobi", "tr-jacobi:small13"]
    methods = {name + batch: figures for name in names}
    task = {"items": 4, "accuracy_frac": len(right) / 4, "low95_frac": 0.1, "high95_frac": 0.9, "correct_items": right}
    return {
        "arm": name,
        "seed": seed,
        "command": f"python -m experiments.evidence --arm {name} --seed {seed}",
        "commit": "abc",
        "device": "cpu x1, 2 cores",
        "speed": {
            "float32": {
                "methods": methods,
                "categories": {"qa": dict.fromkeys(methods, {"mat_no_loops": 1.5})},
                "answers": [
                    *answers("ar", [(1, 10, 10, 0.0)]),
                    *(row for name in list(methods)[1:] for row in answers(name, jacobi)),
                ],
            }
        },
        "train": {"lora": {"rank": 4}},
        # A quarter of the first 30 tokens is behind noise, of the other 12 none.
        "metrics": [
            {"step": 1, "response_tokens": 30.0, "loss": 3.0, "loss_clean": 2.0, "loss_noisy": 6.0},
            {"step": 2, "response_tokens": 12.0, "loss": 2.0, "loss_clean": 2.0, "loss_noisy": 6.0}
            | {"eval_loss": loss, "eval_top1_depth1": 0.1, "eval_top1_depth2": 0.05, "eval_top10_depth1": 0.4},
        ],
        "tasks": {"gsm8k": task},
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The rows of RESULTS.md, as lists of cells; the folder."""
    tmp_path = tmp_path_factory.mktemp("results")
    (tmp_path / "results").mkdir()
    plain = arm("plain", [(1, 30, 20, 0.0), (2, 30, 20, 0.0)], ["a", "b"], 2.0)
    # Half again as many tokens a pass; the third question loops and counts nowhere but in the mean of all.
    paper = arm("paper", [(1, 45, 20, 0.0), (2, 45, 20, 0.19), (3, 90, 9, 0.2)], ["b", "c", "d"], 2.05)
    paper["speed"]["bfloat16"] = arm("paper", [(1, 40, 20, 0.0)], [], 2)["speed"]["float32"]
    paper["tasks"]["mmlu"] = paper["tasks"]["gsm8k"]  # which plain was not asked
    again = [
        arm("plain", [(1, 15, 15, 0.0)], [], 2.0, seed=1, batch="@4"),
        arm("paper", [(1, 15, 10, 0.0)], [], 1.98, seed=1, batch="@4"),
    ]
    for result in (plain, paper, *again):
        (tmp_path / "results" / f"{result['arm']}-seed{result['seed']}.json").write_text(json.dumps(result))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "ROOT", tmp_path)
        patch.setattr("sys.argv", ["results.py"])
        results.main()
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")], tmp_path


def test_figures_are_those_of_the_arms(written):
    rows, folder = written
    assert ["paper-seed0", "float32", "jacobi", "2.25 (2.25 to 2.25)", "1.50", "0.10", "1.10", "3 / 0 / 0"] in rows
    assert ["paper-seed0", "bfloat16", "jacobi", "2.00 (2.00 to 2.00)", "1.50", "0.10", "1.10", "3 / 0 / 0"] in rows
    assert ["float32", "paper-seed0 jacobi", "plain-seed0 jacobi", "1.500 (1.500 to 1.500)"] in rows
    assert ["float32", "paper-seed0 tr-jacobi", "plain-seed0 tr-jacobi", "1.500 (1.500 to 1.500)"] in rows
    assert not [row for row in rows if row[1:3] == ["paper-seed0 tr-jacobi", "plain-seed0 tr-jacobi:small13"]]
    assert not [row for row in rows if row[:2] == ["bfloat16", "paper-seed0 jacobi"]]  # plain has none to compare with
    assert ["paper-seed0", "2", "42", "18%", "2.0500", "+2.50%", "0.10 0.05", "0.40"] in rows
    # Right where plain is wrong twice, wrong where it is right once: one of four items more.
    assert [r[4].split()[0] for r in rows if r[:2] == ["paper-seed0", "gsm8k"]] == ["25.0"]
    assert [r[4] for r in rows if r[:2] == ["paper-seed0", "mmlu"]] == ["-"]
    assert "not run here (`python -m experiments.evidence --arm NAME`): untouched, several," in (
        (folder / "RESULTS.md").read_text()
    )
    for name in ("mat_by_category", "accepted_lengths", "accuracy_by_depth", "loss_difference"):
        assert (folder / "results" / f"{name}.png").stat().st_size > 5000


def test_seeds_count_together_question_by_question(written):
    rows, _ = written
    # Question 1: 60 tokens in 30 passes over 45 in 35; question 2, of one seed: 45 in 20 over 30 in 20.
    assert ["paper, 2 seeds", "jacobi", "1.540 (1.500 to 1.556)"] in rows
    both = "1.500 (1.500 to 1.500), "
    assert ["18%", "paper-seed0", "+2.50%", both + "jacobi", both + "tr-jacobi:small13"] in rows
    assert ["18%", "paper-seed1", "-1.00%"] in [row[:3] for row in rows]


def test_a_method_names_its_tree_and_its_batch():
    assert split_method("tr-jacobi:small13@4") == ("tr-jacobi", "small13", "4")
    assert split_method("ar@4") == ("ar", "", "4")
    assert without_adapters("tr-jacobi:small13@4") and not without_adapters("tr-jacobi:draft16@4")
    assert not without_adapters("tr-jacobi:found") and not without_adapters("tr-jacobi:both")
    assert not without_adapters("tr-jacobi@4")  # its default trees may have noise


def test_intervals_cover_what_resampling_gives():
    two = {1: (30, 10), 2: (10, 10)}
    assert mat_interval(two) == (2.0, 1.0, 3.0)
    assert mat_ratio(two, {1: (10, 10), 2: (10, 10)}) == (2.0, 1.0, 3.0)
    base = {"items": 100, "correct_items": [str(i) for i in range(50)]}
    better = {"items": 100, "correct_items": [str(i) for i in range(60)]}
    middle, low, high = accuracy_difference(better, base)
    # Ten of a hundred differ: the deviation of their share is sqrt(0.1 * 0.9 / 100) = 0.03.
    assert middle == 10 and 3 < low < 6 and 14 < high < 18


def test_a_run_cut_off_while_writing_goes_on_from_its_whole_rows(tmp_path):
    path, settings = tmp_path / "new" / "answers.jsonl", {"seed": 0}
    assert kept_rows(path) == []
    assert read_done(path, settings) == []
    keep_rows(path, [[1], [2]])
    with path.open("a") as file:
        file.write('[3, {"text": "ha')
    assert read_done(path, settings) == [[1], [2]]
    keep_rows(path, [[3]])
    assert path.read_text() == '{"seed": 0}\n[1]\n[2]\n[3]\n'
    for foreign in ({"seed": 1}, None):
        with pytest.raises(InputError, match="holds another run"):
            read_done(path, foreign)
    path.write_text("half")
    with pytest.raises(InputError, match="holds another run"):
        read_done(path, settings)
    assert path.read_text() == "half"
