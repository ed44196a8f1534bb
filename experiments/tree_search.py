"""Which trees a draft-only adapter decodes best with, by simulation on replies whose noise predictions are known.

    python -m experiments.tree_search --ckpt smollm2-135m-instruct --adapter DIR --replies own.jsonl \
      --costs 1:1,4:1.3,8:1.6,16:2.2

For every place of every reply the noise's ranking of the tokens ahead is computed once; a tree is then played over the
replies without the model. Printed are the best by tokens a pass, and sets of two by tokens for the cost of a pass,
which `step_cost.py` measures. Give replies that the adapter was not trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from msn_jax import InputError, load, unembed
from msn_jax.config import DataSource
from msn_jax.decode.prompts import encode
from msn_jax.decode.sources.retrieval import retrieve
from msn_jax.decode.tree import EITHER, JACOBI, NOISE, TreeSet, TreeSpec, branching, chain
from msn_jax.io.tokenizer import encode_text
from msn_jax.objectives.draft_only import drafted
from msn_jax.params import stack_layers
from msn_jax.records import print_record
from msn_jax.rows import read_rows
from msn_jax.terminal import run_command

TOKENS = 384  # longest text that is used


@dataclass(frozen=True)
class Reply:
    """What a simulation needs of a text: everything by the position of the root."""

    first: int  # position of the first root, the last token of the prompt
    last: int  # position of the last token
    rank: np.ndarray  # [T, J]: where the noise of depth j under a token ranks the token j + 1 places after it
    match: np.ndarray  # [T]: the length of the suffix found earlier
    found: np.ndarray  # [T]: tokens that retrieval offers
    right: np.ndarray  # [T]: how many of them, from the first, are right


@partial(jax.jit, static_argnames="cfg")
def ranks(params, cfg, adapter, tokens):
    """rank int32[T, J] over a text int32[T]; 0 is the best. What lies beyond the text's end is to be left out."""
    places = jnp.arange(tokens.shape[0])
    batch = {
        "tokens": tokens[None],
        "positions": places[None],
        "segment_ids": jnp.ones((1, tokens.shape[0]), jnp.int32),
    }
    _, noise = drafted(params, cfg, adapter, batch, places[None])

    def one(row):
        noise, place = row
        logits = unembed(params, cfg, noise)
        truth = tokens[jnp.minimum(place + 2 + jnp.arange(noise.shape[0]), tokens.shape[0] - 1)]
        return (logits > jnp.take_along_axis(logits, truth[:, None], axis=1)).sum(axis=1)

    return jax.lax.map(one, (noise[0], places), batch_size=32)


_retrieve = jax.jit(retrieve, static_argnums=2)


def retrieval(text: list[int], most: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """match, found, right of `Reply` at every place of a text, as sources/retrieval.py retrieves."""
    tokens = jnp.asarray([text + [0] * (TOKENS - len(text))] * len(text), jnp.int32)
    offered, match = _retrieve(tokens, jnp.arange(len(text)), most)
    out = np.zeros((3, len(text)), int)
    for root, path in enumerate(offered[:, 0].tolist()):
        path = path[: path.index(-1)] if -1 in path else path
        truth = text[root + 1 :]
        right = next((i for i, t in enumerate(path) if i >= len(truth) or t != truth[i]), len(path))
        out[:, root] = match[root], len(path), right
    return tuple(out)


def read_replies(lm, path: Path, rows: int, adapter) -> list[Reply]:
    """The last `rows` conversations of a file of `messages`, up to TOKENS tokens of each."""
    params = stack_layers(lm.params)
    replies = []
    for row in tqdm(list(read_rows(DataSource(path=str(path))))[-rows:], unit="reply"):
        *prompt, reply = row["messages"]
        prompt = encode(lm, prompt)
        text = (prompt + encode_text(lm.tokenizer, reply["content"], special_tokens=False))[:TOKENS]
        padded = jnp.asarray(text + [0] * (TOKENS - len(text)), jnp.int32)
        rank = np.asarray(ranks(params, lm.cfg, adapter, padded))
        replies.append(Reply(len(prompt) - 1, len(text) - 1, rank, *retrieval(text)))
    return replies


def play(trees: TreeSet, replies: list[Reply]) -> tuple[int, list[int]]:
    """(tokens, passes by tree) of decoding the replies with these trees."""
    # As lists: this is all plain Python, and NumPy's scalars are slow there.
    plain = [
        (list(zip(t.parents, t.sources, t.depth.tolist(), strict=True)), t.follow.tolist(), t.noise_depth.tolist())
        for t in trees.trees
    ]
    emitted, passes = 0, [0] * len(plain)
    for reply in replies:
        root, ahead = reply.first, []  # ahead[k]: (anchor, depth) of the noise that drafts depth k + 1
        while root < reply.last:
            which = sum(reply.match[root] >= least for least in trees.min_match[1:])
            nodes, follow, noise_depth = plain[which]
            passes[which] += 1
            right, best, length = [True], 0, 0  # the deepest right node, the first of equally deep ones
            for node, (parent, (kind, rank), depth) in enumerate(nodes[1:], 1):
                if kind == NOISE or not right[parent] or root + depth > reply.last:
                    right.append(False)
                elif kind == JACOBI or (kind == EITHER and depth > reply.found[root]):
                    right.append(depth <= len(ahead) and reply.rank[ahead[depth - 1]] == rank)
                else:
                    right.append(depth <= reply.right[root])
                if right[-1] and depth > length:
                    best, length = node, depth
            ahead = []
            for node in follow[best]:
                if node < 0 or not noise_depth[node]:
                    break
                ahead.append((root + nodes[node][2] - noise_depth[node], noise_depth[node] - 1))
            step = min(length + 1, reply.last - root)
            emitted, root = emitted + step, root + step
    return emitted, passes


def family(depths: int) -> Iterator[TreeSpec]:
    """Trees of JACOBI drafts and noise: up to 7 candidates under the root, some under the first and the second of
    them, one more below; noise under the root, under the first few candidates, and at the end of the longest path."""
    for first, second, beside, third in product(range(1, 8), range(4), range(3), range(2)):
        if (beside and first < 2) or (third and not second):
            continue
        children = {(): first, (0,): second, (1,): beside, (0, 0): third}
        for at_root, wide, deep, end in product(range(1, depths + 1), range(first + 1), range(1, depths), range(3)):
            if (end >= 1 and not second) or (end == 2 and not third) or (not wide and deep > 1):
                continue
            noise = {(): at_root} | {(rank,): deep for rank in range(wide)}
            noise |= {(0,) * (2 + i): 1 for i in range(end)}
            present = {path: count for path, count in children.items() if count}
            yield branching(f"children {present} noise {noise}", 0, present, noise)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--adapter", help="directory of a draft-only adapter; not needed for a run directory of one")
    p.add_argument("--replies", type=Path, required=True, help="JSONL of messages, as own_responses.py writes it")
    p.add_argument("--rows", type=int, default=24, help="replies to use, from the end of the file")
    p.add_argument("--nodes", default="4,6,8,12,16", help="sizes of trees to try")
    p.add_argument("--costs", required=True, help="NODES:COST,... of a pass; costs between are interpolated")
    args = p.parse_args()
    try:
        measured, costs = zip(*(map(float, pair.split(":")) for pair in args.costs.split(",")), strict=True)
    except ValueError:
        raise InputError(f"--costs {args.costs}: accepted: NODES:COST pairs, as in 1:1,8:1.6") from None
    cost = lambda nodes: float(np.interp(nodes, measured, costs))

    lm = load(args.ckpt, adapter=args.adapter)
    if lm.drafter is None:
        raise InputError("--adapter: a draft-only adapter is needed, here or in the run directory --ckpt")
    adapter = lm.drafter.replace(layers=jax.tree.map(lambda *layers: jnp.stack(layers), *lm.drafter.layers))
    replies = read_replies(lm, args.replies, args.rows, adapter)
    depths = adapter.noise_embed.shape[0]
    known = np.concatenate([r.rank[r.first : r.last - depths] for r in replies])
    top = {k: [round(float(share), 4) for share in (known < k).mean(axis=0)] for k in (1, 2, 3, 5, 10)}
    print(f"{len(replies)} replies, {len(known)} places")
    for k, shares in top.items():
        print(f"top-{k:<3}" + "".join(f" {share:6.3f}" for share in shares))

    sizes = {int(nodes) for nodes in args.nodes.split(",")}
    trees = [tree for tree in family(depths) if tree.size in sizes]
    mats = {}
    for tree in tqdm(trees, unit="tree", mininterval=5):
        tokens, (passes,) = play(TreeSet(tree.name, (tree,), (0,)), replies)
        mats[tree] = tokens / passes
    print("\nwithout retrieval: nodes, MAT, MAT over cost")
    for size in sorted(sizes):
        for tree in sorted((tree for tree in trees if tree.size == size), key=lambda tree: mats[tree], reverse=True)[
            :3
        ]:
            print(f"{size:>4} {mats[tree]:6.3f} {mats[tree] / cost(size):6.3f}  {tree.name}")
    small = max(trees, key=lambda tree: mats[tree] / cost(tree.size))

    print("\nwith a chain of retrieval, else noise, from a match on: MAT, speed")
    sets = []
    for least in (1, 2, 3, 4, 6):
        for length in (3, 5, 7, 10):
            for tail in (0, 1, 2):
                long = chain(length, EITHER, noise={0: 1, 1: 1, length: tail})
                trees = (small, long)
                tokens, passes = play(TreeSet("set", trees, (0, least)), replies)
                spent = sum(n * cost(tree.size) for n, tree in zip(passes, trees, strict=True))
                sets.append((tokens / spent, tokens / sum(passes), least, length, tail))
    for speed, mat, least, length, tail in sorted(sets, reverse=True)[:8]:
        print(f"match {least}: chain of {length}, noise {tail} at its end: {mat:6.3f} {speed:6.3f}")
    print_record(top=top, best_mat=max(mats.values()), best_tree=small.name)


if __name__ == "__main__":
    run_command(main)
