"""The trees to choose from by name, and those that a method decodes with by default."""

from __future__ import annotations

from msn_jax.decode import tree_file
from msn_jax.decode.tree import (
    DRAFT_MODEL,
    EAGLE,
    EITHER,
    JACOBI,
    LOOKAHEAD,
    MEDUSA,
    NGRAMS,
    NOISE,
    PROBES,
    RECYCLING,
    RETRIEVAL,
    ROOT,
    WINDOW,
    TreeSet,
    TreeSpec,
    branching,
    chain,
    guesses,
    likely,
    with_noise,
)
from msn_jax.decode.wide import wide
from msn_jax.errors import InputError

# The reference decoder of the paper: the 63 nodes of Medusa's mc_sim_7b_63 and a retrieval chain of 5.
_MEDUSA_63 = {
    **{(): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1, (8,): 1, (9,): 1},
    **{(0, 0): 10, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1},
    **{(1, 0): 2, (2, 0): 1, (0, 0, 0): 2},
}

_FOUND, _J = (RETRIEVAL, 0), tuple((JACOBI, rank) for rank in range(5))
_AHEAD_16 = (
    (ROOT, 0),
    *(_J[0], _J[0], (_FOUND, _J[1]), (_J[1], _J[2]), (_FOUND, _J[0]), (_J[3], _J[4]), _FOUND, _J[1], _J[0]),
)
# A retrieved chain that n-grams continue, the noise's candidate beside it and below itself, n-grams where it has none.
_R, _N, _AHEAD = (_FOUND, (NGRAMS, 0)), ((NGRAMS, 0), (NGRAMS, 1)), (_J[0], (NGRAMS, 0))
_BESIDE = ((_J[0], *_N), (*_N, (NGRAMS, 2)), ((RETRIEVAL, 1), _J[1], (NGRAMS, 2)), _AHEAD, _N, _AHEAD, (_J[0], _N[1]))
_BOTH_16 = TreeSpec("both16", (-1, 0, 1, 2, 3, 4, 0, 0, 0, 6, 6, 9, 1), ((ROOT, 0), *[_R] * 5, *_BESIDE))
_BOTH_LONG = TreeSpec("both16long", (*range(-1, 10), 0, 11), ((ROOT, 0), *[_R] * 10, (_J[0], *_N), _AHEAD))
_DRAFT_16, _NOISE_16 = {(): 6, (0,): 2}, {(): 2, (0,): 2, (1,): 2, (0, 0): 1}

# How often a recycled token of each rank is the next one.
_ODDS = (0.45, 0.15, 0.08, 0.05, 0.035, 0.03, 0.025, 0.02)

_EAGLE_ODDS = (0.6, 0.15, 0.07, 0.04, 0.03, 0.02, 0.015, 0.01)

_ROOT = TreeSpec("root", (-1,), ((ROOT, 0),))
_TREES = (
    _ROOT,
    chain(1, EITHER, "chain2"),
    chain(3, EITHER, "chain4"),
    chain(7, EITHER, "chain8"),
    chain(15, EITHER, "chain16"),
    branching("small13", 5, {(): 3, (0,): 2, (0, 0): 1, (1,): 1}),
    branching("msn69", 5, _MEDUSA_63),
    branching("draft13", 0, {(): 4, (0,): 2}, noise={(): 2, (0,): 2, (1,): 1, (0, 0): 1}),
    branching("draft13mix", 3, {(): 3}, noise={(): 2, (0,): 2, (1,): 2}),
    chain(13, EITHER, "draft16long", noise={0: 1, 1: 1}),
    branching("draft16", 0, _DRAFT_16, noise=_NOISE_16),
    branching("draft21", 5, _DRAFT_16, noise=_NOISE_16),
    # For a draft-only adapter that sees three tokens ahead. Noise hangs under the root above all: where its best drafts
    # are accepted it still predicts what comes after them. Found by simulation on held-out replies (LOG.md).
    with_noise(TreeSpec("ahead8", (-1, 0, 1, 0, 0), ((ROOT, 0), _J[0], _J[0], _J[1], (_FOUND, _J[2]))), {0: 3}),
    with_noise(TreeSpec("ahead8long", (-1, 0, 1, 2, 3, 0), ((ROOT, 0), *[(_FOUND, _J[0])] * 4, _J[:2])), {0: 2}),
    with_noise(TreeSpec("ahead16", (-1, 0, 1, 0, 0, 3, 0, 5, 1, 2), _AHEAD_16), {0: 3, 1: 3}),
    likely("recycle8", 7, _ODDS, RECYCLING),
    likely("recycle16", 15, _ODDS, RECYCLING),
    likely("recycle64", 63, _ODDS, RECYCLING),
    likely("recycle80", 79, _ODDS, RECYCLING),
    guesses("lookahead15", 2, 3, 3),
    guesses("lookahead56", 7, 4, 7),  # the published sizes
    branching("medusa8", 0, {(): 4, (0,): 2, (0, 0): 1}, kind=MEDUSA),
    branching("medusa16", 0, {(): 6, (0,): 4, (1,): 2, (0, 0): 2, (0, 0, 0): 1}, kind=MEDUSA),
    branching("medusa64", 0, _MEDUSA_63, kind=MEDUSA),
    chain(3, DRAFT_MODEL, "model4"),
    chain(7, DRAFT_MODEL, "model8"),
    likely("model16", 15, (0.7, 0.12, 0.06, 0.03), DRAFT_MODEL),
    chain(4, EAGLE, "eagle5"),
    likely("eagle8", 7, _EAGLE_ODDS, EAGLE),
    likely("eagle16", 15, _EAGLE_ODDS, EAGLE),
    likely("eagle60", 59, _EAGLE_ODDS, EAGLE),  # as many as EAGLE-3 verifies
    likely("grams8", 7, _ODDS, NGRAMS),
    likely("grams16", 15, _ODDS, NGRAMS),
    likely("found2", 0, _ODDS, NGRAMS, retrieval=1),
    likely("found4", 1, _ODDS, NGRAMS, retrieval=2),
    likely("found8", 3, _ODDS, NGRAMS, retrieval=4),
    likely("found8long", 0, _ODDS, NGRAMS, retrieval=7),
    likely("found16", 8, _ODDS, NGRAMS, retrieval=7),
    likely("found64", 48, _ODDS, NGRAMS, retrieval=15),
    with_noise(_BOTH_16, {0: 3}),
    with_noise(_BOTH_LONG, {0: 2, 10: 1}),
    likely("mix16", 8, _ODDS, RECYCLING, retrieval=7),
    likely("mix64", 48, _ODDS, RECYCLING, retrieval=15),
    # For a draft-only adapter where a pass of many nodes costs little: all sources, and noise under many ends.
    wide("wide64", 11, 31, 7),
    wide("wide112", 15, 60, 12),
)
_BY_NAME = {tree.name: tree for tree in _TREES}
_DRAFT = ("ahead8", "ahead8long", "draft16long")
TREE_SETS: dict[str, TreeSet] = {name: TreeSet(name, (tree,), (0,)) for name, tree in _BY_NAME.items()} | {
    "draft": TreeSet("draft", tuple(_BY_NAME[name] for name in _DRAFT), (0, 2, 5)),
    # The most tokens a pass of at most 16 nodes.
    "ahead": TreeSet("ahead", (_BY_NAME["ahead16"], _BY_NAME["draft16long"]), (0, 3)),
    # Sizes and thresholds from the matches and costs of 40 training prompts (LOG.md), by simulation.
    "adaptive": TreeSet("adaptive", (_ROOT, _BY_NAME["chain4"], _BY_NAME["chain8"]), (0, 1, 4)),
    # The same for several prompts at a time.
    "adaptive2": TreeSet("adaptive2", (_ROOT, _BY_NAME["chain2"]), (0, 1)),
    "adaptive4": TreeSet("adaptive4", (_ROOT, _BY_NAME["chain4"]), (0, 1)),
    # Where the text's end stood before, a longer chain of what followed; n-grams else. The threshold is that above.
    "found": TreeSet("found", (_BY_NAME["found8"], _BY_NAME["found8long"]), (0, 4)),
    # n-grams and a draft-only adapter: the most tokens a pass of at most 16 nodes, by simulation on held-out replies.
    "both": TreeSet("both", (_BY_NAME["both16"], _BY_NAME["both16long"]), (0, 4)),
}

# What each method drafts with; None: whatever the trees name.
USES = {
    "tr-jacobi": None,
    "jacobi": (JACOBI, NOISE),
    "lookup": (RETRIEVAL,),
    "recycling": (RECYCLING,),
    "lookahead": (LOOKAHEAD, WINDOW),
    "medusa": (MEDUSA,),
    "ngrams": (NGRAMS,),
    "draft-model": (DRAFT_MODEL,),
    "eagle": (EAGLE,),
    "ar": (),
}
METHODS = tuple(USES)
# The default trees: for passes whose cost rises with every row, rises late, hardly rises.
_SMALL = {
    "tr-jacobi": "adaptive",
    "lookup": "adaptive",
    "jacobi": "chain4",
    "recycling": "recycle8",
    "lookahead": "lookahead15",
    "medusa": "medusa8",
    "ngrams": "grams8",
    "draft-model": "model4",
    "eagle": "eagle5",
}
_SMALL_DRAFT_ONLY = _SMALL | {"tr-jacobi": "draft", "jacobi": "ahead8"}
_MIDDLE = {
    "tr-jacobi": "mix16",
    "lookup": "chain16",
    "jacobi": "small13",
    "recycling": "recycle16",
    "lookahead": "lookahead15",
    "medusa": "medusa16",
    "ngrams": "grams16",
    "draft-model": "model8",
    "eagle": "eagle16",
}
_MIDDLE_DRAFT_ONLY = _MIDDLE | {"tr-jacobi": "ahead", "jacobi": "ahead16"}
_LARGE = {
    "tr-jacobi": "mix64",
    "lookup": "chain16",
    "jacobi": "msn69",
    "recycling": "recycle64",
    "lookahead": "lookahead56",
    "medusa": "medusa64",
    "ngrams": "grams16",
    "draft-model": "model8",
    "eagle": "eagle60",
}
_LARGE_DRAFT_ONLY = _LARGE | {"tr-jacobi": "wide64", "jacobi": "ahead16"}


def _default(method: str, backend: str, draft_only: bool, batch: int, ngrams: bool) -> str:
    ngrams = ngrams and method == "tr-jacobi"
    if backend == "cpu" and batch > 1 and method in ("tr-jacobi", "lookup"):
        # 8 rows of a pass cost little more than one, any more as much as they bring (LOG.md): 8 nodes for all prompts.
        narrow = "found" if ngrams else "adaptive"
        return f"{narrow}4" if batch <= 2 else f"{narrow}2" if batch <= 4 else "root"
    if ngrams:
        # CPU: measured (LOG.md); noise beside them brings fewer tokens than its nodes cost. Elsewhere by the widths
        # below.
        return "found" if backend == "cpu" else "found16" if backend == "tpu" or batch > 1 else "found64"
    if backend == "cpu" or (backend == "tpu" and batch > 1):
        # CPU: measured by benchmarks/step_cost.py and spec_bench.py (LOG.md). TPU, by XLA's estimates for Llama-3-8B
        # (docs/plan.md): with 8 prompts, 8 nodes each cost 1.25 (v5e) and 1.19 (v5p) of one token, 16 nodes 1.97 and
        # 1.65, about what they bring.
        return (_SMALL_DRAFT_ONLY if draft_only else _SMALL)[method]
    if backend == "tpu" or batch > 1:
        # TPU, one prompt: 16 nodes cost 1.00 (v5e) and 1.41 (v5p), 64 nodes 1.49 and 1.86, which a few more tokens a
        # pass do not pay. GPU: batches were not measured.
        return (_MIDDLE_DRAFT_ONLY if draft_only else _MIDDLE)[method]
    # GPU, and jax has platforms beside these, all of them accelerators: 64 nodes cost 1.18 of one token at the sizes of
    # Llama-3-8B (docs/accelerators.md).
    return (_LARGE_DRAFT_ONLY if draft_only else _LARGE)[method]


def tree_set(
    method: str,
    name: str | None = None,
    backend: str = "cpu",
    draft_only: bool = False,
    batch: int = 1,
    ngrams: bool = False,
) -> TreeSet:
    """The trees a method decodes with: those of `name`, less the drafts that the method does not use.

    name: one of TREE_SETS, or a .json file of --tune_out, in which there is a set for each batch size; None: the
    default of backend and batch. draft_only, ngrams: whether a draft-only adapter and n-grams stand by, which have
    defaults of their own.
    Raises InputError for an unknown method or name, or where no draft is left.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; accepted: {', '.join(METHODS)}")
    from_file = name is not None and name.endswith(".json")
    if name is not None and name not in TREE_SETS and not from_file:
        raise InputError(f"unknown tree {name!r}; accepted: a .json file of --tune_out, {', '.join(TREE_SETS)}")
    if method == "ar":
        return TREE_SETS["root"]
    base = (
        tree_file.read(name, batch)
        if from_file
        else TREE_SETS[name or _default(method, backend, draft_only, batch, ngrams)]
    )
    uses = USES[method]
    if uses is None:
        return base
    if RETRIEVAL in uses:
        trees, min_match = tuple(tree.only(*uses) for tree in base.trees), base.min_match
    else:
        # Without retrieval nothing chooses between trees: take the largest.
        trees, min_match = (base.trees[-1].only(*uses),), (0,)
    drafts = lambda trees: any((~tree.kind(ROOT, *PROBES)).any() for tree in trees)
    none_pays = from_file and not drafts(base.trees)  # was measured
    if name is not None and not none_pays and not drafts(trees):
        raise InputError(f"tree {name!r} has no draft that the method {method!r} uses")
    return TreeSet(base.name, trees, min_match)


def given_draft(flags) -> tuple[str | int | None, str]:
    """What is to draft, as `load` takes it, of flags --draft_ckpt and --draft_layers, and the one that was given.

    flags: parsed, with --method and --tree. Raises InputError where these are impossible, or do not draft with it.
    """
    ckpt, layers = flags.draft_ckpt, flags.draft_layers
    by = "--draft_layers" if ckpt is None else "--draft_ckpt"
    trees = tree_set(flags.method, flags.tree)
    if (ckpt, layers) != (None, None) and DRAFT_MODEL not in trees.names:
        raise InputError(f"{by} does nothing with --method {flags.method}; accepted: --method draft-model")
    return (layers if ckpt is None else ckpt), by
