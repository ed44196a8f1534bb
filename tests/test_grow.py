"""Trees grown from figures made by hand."""

import numpy as np

from msn_jax.decode.grow import Cycles, build, cut_out, grow, tokens_of
from msn_jax.decode.tree import NOISE, RECYCLING, RETRIEVAL, ROOT, TreeSpec

HAND = TreeSpec(
    "hand",
    (-1, 0, 1, 0, 0, 4),
    ((ROOT, 0), (RETRIEVAL, 0), (RETRIEVAL, 0), (RECYCLING, 0), (RECYCLING, 1), (RECYCLING, 0)),
    twins=True,
)
#                                root 1  2  3  4  5
RIGHT = np.array([[1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0]], bool)
CYCLES = Cycles(HAND, RIGHT, np.array([0, 8, 8, 0]))


def test_nodes_are_added_by_what_they_bring():
    whole = np.ones(4, bool)
    assert grow(CYCLES, whole, 9) == ([1, 2, 3, 4], [1, 1.5, 2, 2.25, 2.5])  # node 5 was never right
    assert grow(CYCLES, np.arange(4) == 3, 9) == ([4], [1, 2])
    assert tokens_of(CYCLES, whole, [2, 3]) == 1 + (1 + 2 + 2) / 4


def test_a_set_has_for_each_match_what_pays():
    trees, figures = build(CYCLES, {1: 1.0, 2: 1.1, 3: 1.2, 8: 9.0}, "made", noise=0)
    # Without a match two recycled nodes, with a long one two retrieved ones: 2 and 3 tokens for 1.2.
    assert [tree.size for tree in trees.trees] == [3, 3] and trees.min_match == (0, 6)
    assert trees.trees[0].sources == ((ROOT, 0), (RECYCLING, 0), (RECYCLING, 1))
    assert trees.trees[1].sources == ((ROOT, 0), (RETRIEVAL, 0), (RETRIEVAL, 0))
    assert trees.worth[0][0] == 2 and trees.worth[1][-1] == 3 and trees.cost == (1200, 1200)
    assert figures == {"tokens_a_pass": 2.5, "ratio_to_one_token": 2.083, "nodes": [3, 3]}
    dear, _ = build(CYCLES, {1: 1.0, 2: 9.0, 8: 9.0}, "dear", noise=0)
    assert [tree.size for tree in dear.trees] == [1]
    # With a long match 3 tokens for 2.9 or 3.1, else one: 4 / 3.9 of one token a pass, or 4 / 4.1.
    sizes = lambda cost: [tree.size for tree in build(CYCLES, {1: 1.0, 3: cost}, "near", noise=0)[0].trees]
    assert sizes(2.9) == [1, 3] and sizes(3.1) == [1]


def test_a_cut_tree_keeps_second_choices_and_noise():
    tree = cut_out(HAND, [1, 3, 4, 5], "cut", noise=3)
    assert tree.parents == (-1, 0, 0, 0, 3, 0, 5, 6)
    second = ((RECYCLING, 0), (RECYCLING, 1)), ((RECYCLING, 1), (RECYCLING, 2))
    assert tree.sources == ((ROOT, 0), (RETRIEVAL, 0), *second, (RECYCLING, 0), *[(NOISE, 0)] * 3)


def test_other_drafts_count_as_wrong():
    right = CYCLES.only((RECYCLING,)).right
    assert right[:, 1:3].sum() == 0 and (right[:, [0, 3, 4, 5]] == RIGHT[:, [0, 3, 4, 5]]).all()
    under = Cycles(TreeSpec("under", (-1, 0, 1), ((ROOT, 0), (RETRIEVAL, 0), (RECYCLING, 0))), RIGHT[1:2, :3], None)
    assert under.only((RECYCLING,)).right.tolist() == [[True, False, False]]


def test_a_tree_has_a_size_that_was_timed():
    drafts = (-1, *[0] * 5)
    wide = TreeSpec("wide", drafts, ((ROOT, 0), *[(RECYCLING, rank) for rank in range(5)]))
    right = np.eye(6, dtype=bool) | (np.arange(6) == 0)[None]
    cycles = Cycles(wide, right, np.zeros(6, int))
    trees, _ = build(cycles, {1: 1.0, 4: 1.01, 8: 1.3}, "sizes", noise=0)
    assert trees.trees[0].size == 4  # 5 and 6 would seem to be worth it, but nobody has timed them
