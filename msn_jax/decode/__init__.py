"""Draft, verify, commit: see loop.py for the cycle, tree.py for the trees, generate.py for whole prompts."""

from msn_jax.decode.loop import DecodeState, init_state, prefill, run, step
from msn_jax.decode.tree import TreeSet, TreeSpec
from msn_jax.decode.tree_sets import TREE_SETS, tree_set

__all__ = [
    "TREE_SETS",
    "DecodeState",
    "TreeSet",
    "TreeSpec",
    "init_state",
    "prefill",
    "run",
    "step",
    "tree_set",
]
