from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from msn_jax import InputError
from msn_jax.decode.engine import trees_of
from msn_jax.decode.tree import (
    EITHER,
    JACOBI,
    NGRAMS,
    NOISE,
    RETRIEVAL,
    ROOT,
    TreeSet,
    TreeSpec,
    branching,
    chain,
)
from msn_jax.decode.tree_sets import METHODS, TREE_SETS, tree_set

#   0 - 1 - 3 - 4(noise)
#    \- 2
SMALL = TreeSpec("small", (-1, 0, 0, 1, 3), ((ROOT, 0), (JACOBI, 0), (RETRIEVAL, 0), (JACOBI, 1), (NOISE, 0)))


def test_a_small_tree_by_hand():
    assert SMALL.depth.tolist() == [0, 1, 1, 2, 3]
    assert SMALL.ancestors.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert SMALL.width == 3  # the noise node is never emitted
    assert SMALL.path[:4].tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3]]
    assert SMALL.follow.tolist() == [[1, 3, 4], [3, 4, -1], [-1, -1, -1], [4, -1, -1], [-1, -1, -1]]


def test_explicit_noise_goes_before_rejected_drafts():
    tree = TreeSpec("noisy", (-1, 0, 0, 2), ((ROOT, 0), (JACOBI, 0), (NOISE, 0), (NOISE, 0)))
    assert tree.follow[0].tolist() == [2, 3]


def test_the_reference_tree():
    (tree,) = TREE_SETS["msn69"].trees
    assert tree.size == 69
    # 5 retrieval nodes and Medusa's 63, of which 10, 28, 23 and 2 stand at depths 1 to 4.
    assert np.bincount(tree.depth[tree.kind(JACOBI)]).tolist() == [0, 10, 28, 23, 2]
    assert tree.depth[tree.kind(RETRIEVAL)].tolist() == [1, 2, 3, 4, 5]
    assert tree.width == 6
    assert TREE_SETS["msn69"].ask(JACOBI) == (4, 10)


def test_methods_take_their_own_drafts():
    kinds = lambda trees: {kind for tree in trees.trees for kind, _ in tree.sources}
    assert kinds(tree_set("ar")) == {ROOT}
    assert kinds(tree_set("lookup", "msn69")) == {ROOT, RETRIEVAL}
    assert kinds(tree_set("jacobi", "msn69")) == {ROOT, JACOBI}
    assert kinds(tree_set("lookup", "chain8")) == {ROOT, RETRIEVAL}
    assert kinds(tree_set("tr-jacobi", "chain8")) == {ROOT, EITHER}
    assert tree_set("lookup", "msn69").trees[0].size == 6
    assert tree_set("jacobi", "adaptive").trees[0].size == 8


@pytest.mark.parametrize(
    "parents, sources, named",
    [
        ((-1, 2, 0), ((ROOT, 0), (JACOBI, 0), (JACOBI, 0)), "parent 2 of node 1"),
        ((0,), ((ROOT, 0),), "node 0 must be the root"),
        ((-1, 0, 1), ((ROOT, 0), (NOISE, 0), (JACOBI, 0)), "hangs under the noise node"),
        ((-1, 0, 0), ((ROOT, 0), (NOISE, 0), (JACOBI, 0)), "draft node 2 comes after the noise node 1"),
        ((-1, 0), ((ROOT, 0),), "2 parents, 1 sources"),
    ],
)
def test_what_is_no_tree_is_refused(parents, sources, named):
    with pytest.raises(InputError, match=named):
        TreeSpec("bad", parents, sources)


def test_unknown_names_and_useless_pairs_are_refused():
    with pytest.raises(InputError, match="unknown method 'oracle'.*tr-jacobi"):
        tree_set("oracle")
    with pytest.raises(InputError, match="unknown source 'oracle'.*jacobi"):
        TreeSet("bad", (chain(1, "oracle"),), (0,))
    with pytest.raises(InputError, match="unknown tree 'oak'.*msn69"):
        tree_set("tr-jacobi", "oak")
    with pytest.raises(InputError, match="'root' has no draft"):
        tree_set("jacobi", "root")
    with pytest.raises(InputError, match="min_match must rise"):
        TreeSet("bad", (chain(1, JACOBI), chain(2, JACOBI)), (0, 0))


def test_noise_under_a_node_or_above_it_predicts_ahead():
    #   0 - 1 - 3        1, 2 and 3 are drafts; 4, 5, 6 is noise under the root, 7 under node 1
    #    \- 2
    tree = branching("noisy", 0, {(): 2, (0,): 1}, noise={(): 3, (0,): 1})
    assert tree.parents == (-1, 0, 0, 1, 0, 4, 5, 1)
    assert tree.noise_depth.tolist() == [0, 0, 0, 0, 1, 2, 3, 1]
    assert tree.width == 3
    assert tree.follow[:4].tolist() == [[4, 5, 6], [7, 6, -1], [5, 6, -1], [6, -1, -1]]
    with pytest.raises(InputError, match=r"\(5,\) leads to no node"):
        branching("noisy", 0, {(): 2}, noise={(5,): 1})
    shorter = tree.with_less_noise(1)
    assert shorter.parents == (-1, 0, 0, 1, 0, 1)
    assert shorter.noise_depth.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("known", [1, 2, 3])
def test_default_trees_have_no_more_noise_than_the_adapter(known):
    adapter = SimpleNamespace(noise_embed=np.zeros((known, 4)))
    for backend, method, batch in product(("cpu", "gpu", "tpu"), METHODS, (1, 4)):
        if method in ("medusa", "draft-model", "eagle"):
            continue
        lm = SimpleNamespace(name="tiny", backend=backend, drafter=adapter, heads=None, eagle=None, ngrams=NGRAMS)
        trees = trees_of(lm, method, None, batch).trees
        assert max(tree.noise_depth.max() for tree in trees) <= known, (backend, method, batch)


def test_a_tree_with_too_much_noise_for_the_adapter_is_refused():
    lm = SimpleNamespace(
        name="tiny",
        backend="cpu",
        drafter=SimpleNamespace(noise_embed=np.zeros((2, 4))),
        heads=None,
        eagle=None,
        ngrams=None,
    )
    with pytest.raises(InputError, match=r"'ahead8' has 3 noise tokens in a row.*up to 2"):
        trees_of(lm, "jacobi", "ahead8", 1)


def test_another_platform_is_an_accelerator():
    for method in METHODS:
        assert tree_set(method, backend="METAL") == tree_set(method, backend="gpu")
    assert tree_set("tr-jacobi", backend="METAL", draft_only=True) == tree_set("tr-jacobi", None, "gpu", True)


def test_default_trees_are_wide_only_where_that_pays():
    # By place and batch: untouched, with a draft-only adapter.
    names = {
        ("cpu", 1): ("adaptive", "draft"),
        ("cpu", 2): ("adaptive4", "adaptive4"),
        ("cpu", 4): ("adaptive2", "adaptive2"),
        ("cpu", 5): ("root", "root"),
        ("gpu", 1): ("mix64", "wide64"),
        ("gpu", 2): ("mix16", "ahead"),
        ("tpu", 1): ("mix16", "ahead"),
        ("tpu", 2): ("adaptive", "draft"),
    }
    for (backend, batch), expected in names.items():
        found = [tree_set("tr-jacobi", None, backend, draft_only, batch) for draft_only in (False, True)]
        assert tuple(trees.name for trees in found) == expected, (backend, batch)
        for method in METHODS:
            sizes = [tree_set(method, None, backend, draft_only, batch).trees[-1].size for draft_only in (False, True)]
            assert max(sizes) <= {"mix64": 69}.get(expected[0], 16), method
    with_ngrams = {1: "found", 2: "found4", 4: "found2", 5: "root"}
    for batch, name in with_ngrams.items():
        trees = tree_set("tr-jacobi", None, "cpu", batch=batch, ngrams=True)
        assert trees.name == name and batch * max(tree.size for tree in trees.trees) <= 8
