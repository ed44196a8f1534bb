"""Which trees a draft-only adapter decodes best with, by simulation on replies whose noise predictions are known.

    python benchmarks/tree_search.py --ckpt smollm2-135m-instruct --adapter DIR --replies own.jsonl \
      --costs 1:1,4:1.3,8:1.6,16:2.2

For every place of every reply the noise's ranking of the tokens ahead is computed once; a tree is then played over the
replies without the model. Trees grow node by node, each time by what pays best in tokens for the cost of a pass
(`step_cost.py` measures that cost). Give replies that the adapter was not trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
from record import run_record
from tqdm import tqdm

from msn_jax import InputError, load, unembed
from msn_jax.decode.draft import LONGEST_MATCH
from msn_jax.decode.generate import encode
from msn_jax.decode.tree import EITHER, JACOBI, NOISE, TreeSet, branching, chain
from msn_jax.draft_loss import two_streams
from msn_jax.model import stack_layers

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
    _, noise = two_streams(params, cfg, adapter, batch, places[None])

    def one(row):
        noise, place = row
        logits = unembed(params, cfg, noise)
        truth = tokens[jnp.minimum(place + 2 + jnp.arange(noise.shape[0]), tokens.shape[0] - 1)]
        return (logits > jnp.take_along_axis(logits, truth[:, None], axis=1)).sum(axis=1)

    return jax.lax.map(one, (noise[0], places), batch_size=32)


def retrieval(text: list[int], most: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """match, found, right of `Reply` at every place of a text, as decode/draft.py retrieves."""
    out = np.zeros((3, len(text)), int)
    for root in range(1, len(text)):
        best, at = 0, -1
        for end in range(root - 1, -1, -1):
            length = 0
            while length < min(LONGEST_MATCH, end + 1) and text[end - length] == text[root - length]:
                length += 1
            if length > best:
                best, at = length, end
        offered = text[at + 1 : root + 1][:most] if best else []
        truth = text[root + 1 :]
        right = next((i for i, t in enumerate(offered) if i >= len(truth) or t != truth[i]), len(offered))
        out[:, root] = best, len(offered), right
    return tuple(out)


def read_replies(lm, path: Path, rows: int, adapter) -> list[Reply]:
    """The last `rows` conversations of a file of `messages`, up to TOKENS tokens of each."""
    params = stack_layers(lm.params)
    replies = []
    for line in tqdm(path.read_text(encoding="utf-8").splitlines()[-rows:], unit="reply"):
        *prompt, reply = json.loads(line)["messages"]
        prompt = encode(lm, prompt)
        text = (prompt + encode(lm, reply["content"]))[:TOKENS]
        padded = jnp.asarray(text + [0] * (TOKENS - len(text)), jnp.int32)
        rank = np.asarray(ranks(params, lm.cfg, adapter, padded))
        replies.append(Reply(len(prompt) - 1, len(text) - 1, rank, *retrieval(text)))
    return replies


def play(trees: TreeSet, replies: list[Reply]) -> tuple[int, list[int]]:
    """(tokens, passes by tree) of decoding the replies with these trees."""
    emitted, passes = 0, [0] * len(trees.trees)
    for reply in replies:
        root, ahead = reply.first, []  # ahead[k]: (anchor, depth) of the noise that drafts depth k + 1
        while root < reply.last:
            which = sum(reply.match[root] >= least for least in trees.min_match[1:])
            tree = trees.trees[which]
            passes[which] += 1
            right = [True] + [False] * (tree.size - 1)
            for node in range(1, tree.size):
                kind, rank = tree.sources[node]
                depth = tree.depth[node]
                if kind == NOISE or not right[tree.parents[node]] or root + depth > reply.last:
                    continue
                if kind == JACOBI or (kind == EITHER and depth > reply.found[root]):
                    right[node] = depth <= len(ahead) and reply.rank[ahead[depth - 1]] == rank
                else:
                    right[node] = depth <= reply.right[root]
            best = max((node for node in range(tree.size) if right[node]), key=lambda node: tree.depth[node])
            ahead = []
            for node in tree.follow[best]:
                if node < 0 or not tree.noise_depth[node]:
                    break
                anchor = root + tree.depth[node] - tree.noise_depth[node]
                ahead.append((anchor, tree.noise_depth[node] - 1))
            step = min(tree.depth[best] + 1, reply.last - root)
            emitted, root = emitted + step, root + step
    return emitted, passes


def grow(replies: list[Reply], cost, nodes: int, depths: int, score) -> list[dict]:
    """Trees of JACOBI drafts and noise of up to `nodes` nodes, each the best found from the one before.

    score(tokens, passes, cost of a pass) is to be largest.
    """
    children, noise = {}, {(): 1}
    found = []

    def tried(children, noise):
        tree = branching("grown", 0, children, noise)
        tokens, (passes,) = play(TreeSet("grown", (tree,), (0,)), replies)
        return score(tokens, passes, cost(tree.size)), tokens / passes, tree.size, children, noise

    while True:
        paths = [()] + [(*path, rank) for path, count in children.items() for rank in range(count)]
        moves = []
        for path in paths:
            if len(path) < depths:
                wider = children | {path: children.get(path, 0) + 1}
                moves.append((wider, noise))
                moves.append((wider, noise | {(*path, wider[path] - 1): 1}))
            if noise.get(path, 0) < depths:
                moves.append((children, noise | {path: noise.get(path, 0) + 1}))
        results = [tried(*move) for move in moves]
        results = [r for r in results if r[2] <= nodes]
        if not results:
            return found
        # By gain for each node added: a move may add one or two.
        before = (found[-1]["score"], found[-1]["nodes"]) if found else (0.0, 2)
        best = max(results, key=lambda r: ((r[0] - before[0]) / (r[2] - before[1]), r[1]))
        _, _, _, children, noise = best
        found.append(dict(zip(("score", "mat", "nodes", "children", "noise"), best, strict=True)))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--adapter", help="directory of a draft-only adapter; not needed for a run directory of one")
    p.add_argument("--replies", type=Path, required=True, help="JSONL of messages, as own_responses.py writes it")
    p.add_argument("--rows", type=int, default=60, help="replies to use, from the end of the file")
    p.add_argument("--nodes", type=int, default=16)
    p.add_argument("--costs", required=True, help="NODES:COST,... of a pass; costs between are interpolated")
    args = p.parse_args()
    try:
        sizes, costs = zip(*(map(float, pair.split(":")) for pair in args.costs.split(",")), strict=True)
    except ValueError:
        raise InputError(f"--costs {args.costs}: accepted: NODES:COST pairs, as in 1:1,8:1.6") from None
    cost = lambda nodes: float(np.interp(nodes, sizes, costs))

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

    fastest = grow(replies, cost, args.nodes, depths, lambda tokens, passes, cost: tokens / (passes * cost))
    widest = grow(replies, cost, args.nodes, depths, lambda tokens, passes, cost: tokens / passes)
    for title, trees in (("by tokens for the cost", fastest), ("by tokens a pass", widest)):
        print(f"\n{title}: nodes, MAT, speed")
        for t in trees:
            speed = t["mat"] / cost(t["nodes"])
            print(f"{t['nodes']:>4} {t['mat']:6.3f} {speed:6.3f}  children {t['children']}  noise {t['noise']}")

    print("\nwith a chain of retrieval, else noise, from a match on: MAT, speed")
    small = max(fastest, key=lambda t: t["score"])
    sets = []
    for least in (1, 2, 3, 4, 6):
        for length in (3, 5, 7, 10):
            for tail in (0, 1, 2):
                long = chain(length, EITHER, noise={0: 1, 1: 1, length: tail})
                trees = (branching("small", 0, small["children"], small["noise"]), long)
                tokens, passes = play(TreeSet("set", trees, (0, least)), replies)
                spent = sum(n * cost(tree.size) for n, tree in zip(passes, trees, strict=True))
                sets.append((tokens / spent, tokens / sum(passes), least, length, tail))
    for speed, mat, least, length, tail in sorted(sets, reverse=True)[:8]:
        print(f"match {least}: chain of {length}, noise {tail} at its end: {mat:6.3f} {speed:6.3f}")
    print(json.dumps({**run_record(), "top": top, "best_mat": widest[-1]["mat"], "best_speed": small["score"]}))


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        sys.exit(f"tree_search.py: error: {e}")
