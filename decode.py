"""Decode prompts with a LLaMA-family checkpoint, several tokens a forward pass, with the tokens of plain decoding.

python decode.py --ckpt smollm2-135m-instruct --prompt "What is a prime number?" --compare
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import textwrap
from functools import partial

if "--plan" in sys.argv:
    # The TPU compiler needs no TPU, but must not look for one.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

import jax
from tqdm import tqdm

from msn_jax import DecodeConfig, InputError, kernels, load
from msn_jax.chat import chat
from msn_jax.decode.generate import Stream, generate_batches
from msn_jax.decode.prompts import Row, as_chat, encode, read_prompts
from msn_jax.decode.sources import recycling
from msn_jax.decode.tree_sets import METHODS, TREE_SETS, given_draft
from msn_jax.decode.tune import tune_to
from msn_jax.errors import named
from msn_jax.io.loading import ACCEPTED, ADAPTER_HELP, DTYPES
from msn_jax.io.rows_out import STDOUT, check_outputs, rows_out
from msn_jax.page import run_of, write_html
from msn_jax.sharding import make_mesh
from msn_jax.terminal import CACHE_HELP, run_command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message):  # one line, not the whole usage
            self.exit(2, f"{self.prog}: error: {message}\n")

    p = Parser(
        description=__doc__.split("\n")[0],
        epilog=CACHE_HELP,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # "--plan" is looked for above, before anything is parsed
    )
    p.add_argument("--ckpt", help=f"checkpoint: {ACCEPTED}")
    p.add_argument("--adapter", nargs="+", action="extend", metavar="DIR", help=ADAPTER_HELP)
    small = p.add_mutually_exclusive_group()
    small.add_argument("--draft_ckpt", help="a smaller checkpoint of the same vocabulary, for --method draft-model")
    small.add_argument("--draft_layers", type=int, help="or so many of the model's own first layers")
    p.add_argument("--tensor", type=int, default=1, help="devices to spread the model over")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt; the chat template is applied")
    what.add_argument("--prompts", help="JSONL file, or - for stdin; rows have `prompt` (raw), `messages` or `turns`")
    what.add_argument("--tune", help="JSONL file as --prompts: find the fastest trees for such, see --tune_out")
    what.add_argument("--chat", action="store_true", help="talk to the model; an empty line or Ctrl-D ends it")
    what.add_argument(
        "--plan", action="store_true", help="compile for a TPU slice, print memory and cost, decode nothing"
    )
    p.add_argument("--system", help="what the model is told before a --chat")
    p.add_argument("--topology", default="v5e:2x4", help="TPU slice for --plan")
    p.add_argument("--method", default="tr-jacobi", choices=METHODS, help="how to draft")
    p.add_argument("--tree", help=f"a file of --tune_out, or {', '.join(TREE_SETS)}; default: the best of the backend")
    p.add_argument(
        "--dtype",
        choices=(*DTYPES, "auto"),
        help="of weights and computation, int8 of weights; auto: bfloat16 where its products are fast (GPU, TPU, a CPU "
        "with the C++ kernels), else float32; None: float32, --plan: bfloat16",
    )
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top_k", type=int, default=0, help="0 keeps all tokens")
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--min_p", type=float, default=0.0, help="draw only what has this share of the best probability")
    p.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: what occurred becomes less likely")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stop", action="append", default=[], help="text before which a reply ends; can be given again")
    p.add_argument("--logprobs", type=int, help="rows of --out have log-probabilities, and those of so many likeliest")
    p.add_argument("--batch_size", type=int, default=1)
    p.add_argument("--chat_template", default="auto", choices=("auto", "yes", "no"), help="auto: all but `prompt` rows")
    p.add_argument("--compare", action="store_true", help="also decode plainly (ar), and compare the tokens")
    p.add_argument("--html", help="write a page that shows what each pass accepted")
    p.add_argument("--draft_memory", help="file of what recycling has learnt: read where it exists, and kept")
    p.add_argument("--tune_out", help="JSON file that --tune writes and --tree reads")
    p.add_argument("--out", help="write one JSON line for each prompt to this file; - is stdout")
    return p.parse_args(argv)


def check_flags(args: argparse.Namespace, given: list[str]) -> None:
    """Raise InputError for flags that would be ignored together."""

    def refuse(what: str, *flags: str) -> None:
        for flag in flags:
            if any(arg == flag or arg.startswith(f"{flag}=") for arg in given):
                raise InputError(f"{flag} does nothing with {what}")

    if args.plan:
        refuse(
            "--plan",
            "--adapter",
            "--draft_ckpt",
            "--draft_layers",
            "--tensor",
            "--method",
            "--batch_size",
            "--out",
            "--html",
            "--compare",
            "--max_new_tokens",
        )
    elif args.ckpt is None:
        raise InputError(f"--ckpt is missing; accepted: {ACCEPTED}")
    else:
        refuse("a run that is no --plan", "--topology")
    if args.tune and not args.tune_out:
        raise InputError("--tune measures for a file; give it with --tune_out")
    if args.tune:
        refuse("--tune", "--tree", "--batch_size", "--max_new_tokens", "--temperature", "--draft_memory")
        refuse("--tune", "--out", "--html", "--compare", "--min_p", "--repetition_penalty", "--stop", "--logprobs")
    else:
        refuse("a run that is no --tune", "--tune_out")
    if args.chat:
        refuse("--chat", "--out", "--html", "--compare", "--batch_size", "--chat_template")
    else:
        refuse("a run that is no --chat", "--system")
    if not args.out:
        refuse("a run without --out", "--logprobs")
    if args.method == "ar":
        refuse("--method ar", "--tree")
    if args.html and args.prompt is None:
        raise InputError("--html shows one prompt; give it with --prompt")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is empty")
    if sys.stdout is None and not args.out:
        raise InputError("stdout is closed; accepted with it: --out FILE")


def side_by_side(left: str, right: str) -> str:
    """Two texts in two columns of the terminal."""
    width = max((min(shutil.get_terminal_size().columns, 160) - 3) // 2, 8)
    columns = [
        [piece for line in text.split("\n") for piece in textwrap.wrap(line, width) or [""]] for text in (left, right)
    ]
    height = max(map(len, columns))
    columns = [column + [""] * (height - len(column)) for column in columns]
    return "\n".join(f"{a:<{width}} | {b}" for a, b in zip(*columns, strict=True))


def summary(results: list) -> list[str]:
    """One column of the comparison: figures over all prompts of a method."""
    tokens, forwards = sum(len(r.tokens) for r in results), sum(r.forwards for r in results)
    seconds = sum(r.seconds for r in results)
    return [
        str(tokens),
        str(forwards),
        f"{tokens / forwards:.2f}",
        f"{tokens / seconds:.1f}",
        f"{1000 * seconds / forwards:.1f}",
    ]


def print_comparison(plain: list, fast: list, file) -> None:
    say = partial(print, file=file)
    if len(fast) == 1:
        say(side_by_side(plain[0].method, fast[0].method))
        say(side_by_side("-" * 12, "-" * 12))
        say(side_by_side(plain[0].text, fast[0].text), end="\n\n")
    names = ["tokens", "passes", "tokens a pass (MAT)", "tokens/s", "ms a pass"]
    say(f"{'':<20} {plain[0].method:>12} {fast[0].method:>12}")
    for name, a, b in zip(names, summary(plain), summary(fast), strict=True):
        say(f"{name:<20} {a:>12} {b:>12}")
    same = sum(a.tokens == b.tokens for a, b in zip(plain, fast, strict=True))
    speed = sum(r.seconds for r in plain) / sum(r.seconds for r in fast)
    say(f"{'speed':<20} {'1.00x':>12} {f'{speed:.2f}x':>12}")
    say(f"tokens identical: {'yes' if same == len(fast) else f'no ({same} of {len(fast)} prompts)'}")


def stream_one(lm, ids: list[int], config: DecodeConfig):
    """Generate for one prompt and print the text as it is accepted."""
    answer = Stream(lm, ids, config)
    for piece in answer:
        print(piece, end="", flush=True)
    print()
    return answer.result


def decode_rows(lm, rows: list[Row], config: DecodeConfig, write, show: bool) -> list:
    """Generate for all rows with a progress bar; each is written, and shown, when its batch is done."""
    ids = [encode(lm, row.prompt, row.tools) for row in rows]
    results = []
    with tqdm(total=len(rows), unit="prompt", desc=config.method) as bar:
        for batch in generate_batches(lm, ids, config, ids=[row.id for row in rows]):
            results += batch
            for result in batch:
                write(result.row())
                if show:
                    tqdm.write(f"--- {result.id}\n{result.text}")
            _, _, mat, *_ = summary(results)
            bar.set_postfix(MAT=mat, tokens=sum(len(r.tokens) for r in results))
            bar.update(len(batch))
    return results


def compare(lm, rows: list[Row], config: DecodeConfig, write) -> tuple[list, list]:
    """The results of `ar` and of the method. They take turns, and take turns to be first: a machine's speed drifts.

    Of a single batch each runs twice, and the faster time counts.
    """
    plain = dataclasses.replace(config, method="ar", tree=None)
    ids = [encode(lm, row.prompt, row.tools) for row in rows]
    batches, results = -(-len(rows) // config.batch_size), ([], [])
    with tqdm(total=len(rows), unit="prompt", desc=f"ar, {config.method}") as bar:
        for _ in range(2 if batches == 1 else 1):
            both = [generate_batches(lm, ids, c, ids=[row.id for row in rows]) for c in (plain, config)]
            for _ in range(batches):
                order = (0, 1) if len(results[0]) % 2 == 0 else (1, 0)
                done = {i: next(both[i]) for i in order}
                for i in order:
                    results[i].append(done[i])
                bar.update(len(done[1]) if len(results[0]) <= batches else 0)
    if batches == 1:
        results = tuple([min(twice, key=lambda batch: sum(r.seconds for r in batch))] for twice in results)
    plain, fast = ([r for batch in batches for r in batch] for batches in results)
    for result in fast:
        write(result.row())
    return plain, fast


def given_dtype(dtype: str, backend: str) -> str:
    """The dtype that --dtype names on a backend."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if backend != "cpu" or kernels.instruction_set() else "float32"


def settings_of(args: argparse.Namespace, lm) -> dict[str, object]:
    """What a page says of how it was made."""
    names = ["tree", "adapter", "dtype", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed"]
    names += ["repetition_penalty"]
    drawn = ("top_k", "top_p", "min_p", "seed")
    given = {name: getattr(args, name) for name in names if args.temperature or name not in drawn}
    if args.adapter:
        given["adapter"] = ", ".join(args.adapter)
    return {"checkpoint": lm.name, "backend": lm.backend} | {k: v for k, v in given.items() if v is not None}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_flags(args, sys.argv[1:] if argv is None else argv)
    if args.plan:
        from msn_jax.plan import plan_decode

        return plan_decode(args.ckpt, args.topology, args.tree, given_dtype(args.dtype or "auto", "tpu"))
    args.dtype = given_dtype(args.dtype or "float32", jax.default_backend())
    fields = {field.name for field in dataclasses.fields(DecodeConfig)}
    config = DecodeConfig(**{name: value for name, value in vars(args).items() if name in fields})
    rows = None
    draft, by = given_draft(args)  # an impossible setting is refused before the weights are read
    inputs = {"--prompts": args.prompts, "--tune": args.tune, "--ckpt": args.ckpt}
    inputs |= {"--adapter": args.adapter, "--draft_ckpt": args.draft_ckpt}
    outputs = {"--tune_out": args.tune_out, "--draft_memory": args.draft_memory}
    check_outputs({"--out": args.out, "--html": args.html, **outputs}, inputs)
    if args.prompts is not None or args.tune is not None:
        rows = read_prompts(args.tune if args.prompts is None else args.prompts, args.chat_template)
    elif args.prompt is not None:
        rows = [Row(0, args.prompt if args.chat_template == "no" else as_chat(args.prompt))]

    if not 1 <= args.tensor <= jax.device_count():
        raise InputError(f"--tensor {args.tensor}: accepted: 1 to {jax.device_count()}, the devices that there are")
    with rows_out(args.out) as write:
        mesh = make_mesh(tensor=args.tensor) if args.tensor > 1 else None
        with named(ckpt="--ckpt", adapter="--adapter", draft=by):
            lm = load(args.ckpt, args.adapter, args.dtype, mesh, draft)
        if lm.backend == "cpu":
            print(f"{args.dtype} on {kernels.describe()}", file=sys.stderr)
        if args.tune:
            return tune_to(args.tune_out, lm, [encode(lm, row.prompt) for row in rows], args.method)
        with recycling.kept_table(lm, args.draft_memory) as lm:
            if args.chat:
                return chat(lm, config, args.system)
            decode(lm, args, config, rows, write)


def decode(lm, args: argparse.Namespace, config: DecodeConfig, rows: list[Row], write) -> None:
    """Generate as the flags say, and write down what came of it."""
    plain = None
    streamed = args.prompt is not None and not args.compare and not args.out
    if args.compare:
        plain, results = compare(lm, rows, config, write)
    elif streamed:
        results = [stream_one(lm, encode(lm, rows[0].prompt), config)]
    else:
        results = decode_rows(lm, rows, config, write, show=not args.out)
    if args.html:
        ids, first = encode(lm, rows[0].prompt), plain[0] if plain else None
        runs = [run_of(lm, ids, result, first) for result in (first, results[0]) if result is not None]
        write_html(args.html, f"{lm.name}: what each pass accepted", args.prompt, runs, settings_of(args, lm))
        print(f"wrote {args.html}", file=sys.stderr)
    if plain:
        # Rows on stdout are for a program to read.
        return print_comparison(plain, results, sys.stderr if args.out in STDOUT else sys.stdout)
    tokens, passes, mat, rate, ms = summary(results)
    print(f"{tokens} tokens, {passes} passes, {mat} a pass, {rate} tokens/s, {ms} ms a pass", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
