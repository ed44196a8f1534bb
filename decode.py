"""Decode prompts with a LLaMA-family checkpoint, several tokens a forward pass, with the tokens of plain decoding.

python decode.py --ckpt smollm2-135m-instruct --prompt "What is a prime number?" --compare
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path

if "--plan" in sys.argv:
    # The TPU compiler needs no TPU, but must not look for one.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

import jax
from tqdm import tqdm

from msn_jax import DecodeConfig, InputError, load
from msn_jax.decode.generate import encode, generate_batches
from msn_jax.decode.tree import METHODS, TREE_SETS, tree_set
from msn_jax.io.loading import ACCEPTED
from msn_jax.io.tokenizer import TextStream, require_template
from msn_jax.report import Run, write_html
from msn_jax.sharding import make_mesh


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message):  # one line, not the whole usage
            self.exit(2, f"decode.py: error: {message}\n")

    p = Parser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # "--plan" is looked for above, before anything is parsed
    )
    p.add_argument("--ckpt", help=f"checkpoint: {ACCEPTED}")
    p.add_argument("--adapter", help="directory of an adapter, merged into the weights unless it is draft-only")
    p.add_argument("--tensor", type=int, default=1, help="devices to spread the model over")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt; the chat template is applied")
    what.add_argument("--prompts", help="JSONL file; rows have `prompt` (raw), `messages` or `turns` (the first)")
    what.add_argument("--chat", action="store_true", help="talk to the model; an empty line or Ctrl-D ends it")
    what.add_argument(
        "--plan", action="store_true", help="compile for a TPU slice, print memory and cost, decode nothing"
    )
    p.add_argument("--topology", default="v5e:2x4", help="TPU slice for --plan")
    p.add_argument("--method", default="tr-jacobi", choices=METHODS, help="how to draft")
    p.add_argument(
        "--tree", choices=sorted(TREE_SETS), help="token trees; default: those measured best for the backend"
    )
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and computation")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top_k", type=int, default=0, help="0 keeps all tokens")
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=1)
    p.add_argument("--chat_template", default="auto", choices=("auto", "yes", "no"), help="auto: all but `prompt` rows")
    p.add_argument("--compare", action="store_true", help="also decode plainly (ar), and compare the tokens")
    p.add_argument("--html", help="write a page that shows what each pass accepted")
    p.add_argument("--out", help="write one JSON line for each prompt")
    return p.parse_args(argv)


def read_prompts(path: str, chat_template: str) -> list[tuple[object, str | list]]:
    """(id, prompt) of each row. Raises InputError with the line number of a row that cannot be used."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as e:
        raise InputError(f"--prompts {path}: {e.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # Windows begins a file with a mark
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # JSON can spell half a character
        except json.JSONDecodeError as e:
            raise InputError(f"{where}: not valid JSON ({e.msg}, column {e.colno})") from None
        except UnicodeError as e:
            raise InputError(f"{where}: not valid UTF-8 ({e.reason} at {e.start})") from None
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: not JSON that can be read ({e})") from None
        prompt = row_prompt(row, where, chat_template)
        rows.append((row.get("id", row.get("question_id", len(rows))), prompt))
    if not rows:
        raise InputError(f"{path}: no prompts in it")
    return rows


def row_prompt(row: object, where: str, chat_template: str) -> str | list:
    if not isinstance(row, dict) or not row.keys() & {"prompt", "messages", "turns"}:
        raise InputError(f"{where}: no `prompt`, `messages` or `turns`")
    if "messages" in row:
        messages = row["messages"]
        fine = isinstance(messages, list) and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            # A message that calls tools may say nothing.
            and (isinstance(m.get("content"), str) or (m.get("content") is None and m.get("tool_calls")))
            for m in messages
        )
        if not fine or not messages:
            raise InputError(f"{where}: `messages` must be a list of {{role, content}} texts")
        return messages
    turns = [row["prompt"]] if "prompt" in row else row["turns"]
    text = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(text, str) or not text:
        raise InputError(f"{where}: the prompt is empty or not a text")
    return text if chat_template == "no" or ("prompt" in row and chat_template == "auto") else as_chat(text)


def as_chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def check_writable(args: argparse.Namespace) -> None:
    """Raise InputError now where an output could not be written later, or would take the place of an input."""
    inputs = [Path(path) for path in (args.prompts, args.ckpt) if path]
    taken = {path.resolve(): str(path) for path in inputs}
    for flag, path in (("--out", args.out), ("--html", args.html)):
        if path is None:
            continue
        target = Path(path)
        try:
            if target.resolve() in taken:
                raise InputError(f"{flag} {path}: is also {taken[target.resolve()]}")
            if target.exists() and not target.is_file():
                raise InputError(f"{flag} {path}: not a regular file")
            # The longest name that either writer gives its unfinished file.
            trial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            trial.touch()
            trial.unlink()
            if Path(f"{path}.partial").is_dir():
                raise InputError(f"{flag} {path}: {path}.partial is a directory")
        except OSError as e:
            raise InputError(f"{flag} {path}: cannot be written ({e.strerror})") from None
        taken[target.resolve()] = path


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
            "--tensor",
            "--method",
            "--dtype",
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
    if args.chat:
        refuse("--chat", "--out", "--html", "--compare", "--batch_size", "--chat_template")
    if args.method == "ar":
        refuse("--method ar", "--tree")
    if args.html and args.prompt is None:
        raise InputError("--html shows one prompt; give it with --prompt")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is empty")


def side_by_side(left: str, right: str) -> str:
    """Two texts in two columns of the terminal."""
    width = (min(shutil.get_terminal_size().columns, 160) - 3) // 2
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


def print_comparison(plain: list, fast: list) -> None:
    if len(fast) == 1:
        print(side_by_side(plain[0].method, fast[0].method))
        print(side_by_side("-" * 12, "-" * 12))
        print(side_by_side(plain[0].text, fast[0].text), end="\n\n")
    names = ["tokens", "passes", "tokens a pass (MAT)", "tokens/s", "ms a pass"]
    print(f"{'':<20} {plain[0].method:>12} {fast[0].method:>12}")
    for name, a, b in zip(names, summary(plain), summary(fast), strict=True):
        print(f"{name:<20} {a:>12} {b:>12}")
    same = sum(a.tokens == b.tokens for a, b in zip(plain, fast, strict=True))
    speed = sum(r.seconds for r in plain) / sum(r.seconds for r in fast)
    print(f"{'speed':<20} {'1.00x':>12} {f'{speed:.2f}x':>12}")
    print(f"tokens identical: {'yes' if same == len(fast) else f'no ({same} of {len(fast)} prompts)'}")


def write_report(path: str, lm, prompt: str, ids: list[int], result, plain) -> None:
    runs = []
    for r in filter(None, (plain, result)):
        stream, pieces, at = TextStream(lm.tokenizer, after=ids), [], 0
        for count in r.accepted:
            pieces.append(stream.add(r.tokens[at : at + count]))
            at += count
        pieces[-1] += stream.flush()
        same = None if plain is None or r is plain else r.tokens == plain.tokens
        run = Run(
            method=r.method,
            pieces=pieces,
            accepted=r.accepted,
            seconds=r.seconds,
            tokens=len(r.tokens),
            identical=same,
        )
        runs.append(run)
    write_html(path, f"{lm.name}: what each pass accepted", prompt, runs)


def stream_one(lm, ids: list[int], config: DecodeConfig):
    """Generate for one prompt and print the text as it is accepted."""
    stream = TextStream(lm.tokenizer, after=ids)
    show = lambda text: print(text, end="", flush=True)
    (result,) = next(generate_batches(lm, [ids], config, on_tokens=lambda new: show(stream.add(new))))
    print(stream.flush())
    return result


def decode_file(lm, rows: list, config: DecodeConfig, out: str | None) -> list:
    """Generate for all rows with a progress bar; whole lines go to OUT.partial, which becomes OUT at the end."""
    ids = [encode(lm, prompt) for _, prompt in rows]
    batches = generate_batches(lm, ids, config, ids=[id_ for id_, _ in rows])
    results = []
    partial = Path(f"{out}.partial") if out else None
    with (
        partial.open("w", encoding="utf-8") if partial else contextlib.nullcontext() as file,
        tqdm(total=len(rows), unit="prompt", desc=config.method) as bar,
    ):
        for batch in batches:
            results += batch
            for result in batch:
                if file:
                    print(json.dumps(dataclasses.asdict(result), ensure_ascii=False), file=file, flush=True)
            tokens, forwards = sum(len(r.tokens) for r in results), sum(r.forwards for r in results)
            bar.set_postfix(MAT=f"{tokens / forwards:.2f}", tokens=tokens)
            bar.update(len(batch))
    if partial:
        partial.replace(out)
    return results


def chat(lm, config: DecodeConfig) -> None:
    """Talk until an empty line. What cannot be answered is said in one line, and what was said before stays."""
    require_template(lm.tokenizer)
    history = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        except UnicodeDecodeError:
            print("decode.py: that was not valid UTF-8", file=sys.stderr)
            continue
        if not text:
            return
        try:
            result = stream_one(lm, encode(lm, [*history, *as_chat(text)]), config)
        except InputError as e:
            print(f"decode.py: {e}", file=sys.stderr)
            continue
        history += [*as_chat(text), {"role": "assistant", "content": result.text}]
        print(f"[{len(result.tokens)} tokens, {result.mat:.2f} a pass, {result.tokens_per_s:.1f} tokens/s]")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_flags(args, sys.argv[1:] if argv is None else argv)
    if args.plan:
        from msn_jax.plan import plan_decode

        return plan_decode(args.ckpt, args.topology, args.tree)
    fields = {field.name for field in dataclasses.fields(DecodeConfig)}
    config = DecodeConfig(**{name: value for name, value in vars(args).items() if name in fields})
    rows = None
    tree_set(config.method, config.tree)  # an impossible pair is refused before the weights are read
    check_writable(args)
    if args.prompts is not None:
        rows = read_prompts(args.prompts, args.chat_template)
    elif args.prompt is not None:
        rows = [(0, args.prompt if args.chat_template == "no" else as_chat(args.prompt))]

    if not 1 <= args.tensor <= jax.device_count():
        raise InputError(f"--tensor {args.tensor}: accepted: 1 to {jax.device_count()}, the devices that there are")
    mesh = make_mesh(tensor=args.tensor)
    with jax.set_mesh(mesh):
        lm = load(args.ckpt, args.adapter, args.dtype, mesh if args.tensor > 1 else None)
        decode(lm, args, config, rows)


def decode(lm, args: argparse.Namespace, config: DecodeConfig, rows: list | None) -> None:
    """Generate as the flags say, and write down what came of it."""
    if args.chat:
        return chat(lm, config)
    plain_config = dataclasses.replace(config, method="ar", tree=None)
    plain = decode_file(lm, rows, plain_config, None) if args.compare else None
    streamed = args.prompt is not None and not args.compare and not args.out
    if streamed:
        results = [stream_one(lm, encode(lm, rows[0][1]), dataclasses.replace(config, batch_size=1))]
    else:
        results = decode_file(lm, rows, config, args.out)
    if args.html:
        ids = encode(lm, rows[0][1])
        write_report(args.html, lm, args.prompt, ids, results[0], plain[0] if plain else None)
        print(f"wrote {args.html}", file=sys.stderr)
    if plain:
        return print_comparison(plain, results)
    if not streamed and not args.out:
        for result in results:
            print(f"--- {result.id}\n{result.text}")
    tokens, passes, mat, rate, ms = summary(results)
    print(f"{tokens} tokens, {passes} passes, {mat} a pass, {rate} tokens/s, {ms} ms a pass", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        sys.exit(f"decode.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
