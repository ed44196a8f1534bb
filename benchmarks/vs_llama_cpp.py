"""Tokens/s against llama.cpp: the same weights in float32, bfloat16 and 8 bits, plain and with drafts, taking turns.

    python benchmarks/vs_llama_cpp.py --ckpt MODEL.gguf --questions FILE.jsonl --llama_python VENV/bin/python

VENV holds llama-cpp-python, compiled for this machine: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python.
llama.cpp reads the checkpoint rewritten as F32, BF16 and Q8_0 (a scale for 32 weights; int8 here has one for each
output); its drafts are those of its prompt lookup. All is greedy and ends at the same stop tokens; no prefill counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import gguf

from msn_jax import DecodeConfig, InputError, load
from msn_jax.decode.generate import generate_batches
from msn_jax.decode.prompts import encode
from msn_jax.io.gguf import is_gguf
from msn_jax.io.loading import resolve
from msn_jax.questions import read_questions, spread
from msn_jax.records import listed, print_record
from msn_jax.terminal import run_command

# By dtype: the type of the matrices that llama.cpp reads, and how its files call that.
STORED = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
PLAIN, LOOKUP = "llama.cpp", "llama.cpp lookup"


def rewrite(source: Path, dtype: str, target: Path) -> None:
    """A GGUF file with its matrices as STORED has them, but for those whose rows are no whole blocks."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    matrices, file_type = STORED[dtype]
    writer.add_file_type(file_type)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        fits = value.ndim > 1 and value.shape[-1] % gguf.GGML_QUANT_SIZES[matrices][0] == 0
        kind = matrices if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama_cpp_server.py, running. Raises InputError where it does not come up."""

    def __init__(self, python: str, model: Path, *numbers: int):
        script = Path(__file__).with_name("llama_cpp_server.py")
        command = [python, str(script), str(model), *map(str, numbers)]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        pipe, accepted = subprocess.PIPE, "accepted: a Python with llama-cpp-python"
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)
        except OSError as e:
            raise InputError(f"--llama_python {python}: {e.strerror}; {accepted}") from None
        if self._process.stdout.readline() != "ready\n":
            said = self._process.communicate()[1].strip().splitlines() or ["it ended"]
            raise InputError(f"--llama_python {python}: {said[-1]}; {accepted}")

    def answer(self, **asked) -> dict:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def figures(rows: list[dict]) -> dict[str, dict]:
    """By arm: tokens/s over all answers, and to those of `ar`, of plain llama.cpp and of its lookup."""
    arms = defaultdict(list)
    for row in rows:
        arms[row["arm"]].append(row)
    rate = {arm: sum(r["count"] for r in rows) / sum(r["seconds"] for r in rows) for arm, rows in arms.items()}
    return {
        arm: {
            "tokens_per_s": round(rate[arm], 2),
            "ratio_to_ar": round(rate[arm] / rate["ar"], 3),
            "ratio_to_llama_cpp": round(rate[arm] / rate[PLAIN], 3),
            "ratio_to_llama_cpp_lookup": round(rate[arm] / rate[LOOKUP], 3),
            "answers": len(rows),
            "identical_to_ar": sum(r["identical"] for r in rows),
        }
        for arm, rows in arms.items()
    }


def measure(args: argparse.Namespace, dtype: str, questions: list[dict], model: Path) -> dict[str, dict]:
    """One dtype: `ar`, tr-jacobi and both of llama.cpp's take turns, question by question."""
    lm = load(args.ckpt, adapter=args.adapter, dtype=dtype)
    prompts = [encode(lm, [{"role": "user", "content": q["turns"][0]}]) for q in questions]
    context = max(map(len, prompts)) + args.max_new_tokens + args.drafts
    llama = LlamaCpp(args.llama_python, model, context, args.drafts, args.threads)

    def answers(ids: list[int]):
        for method in ("ar", "tr-jacobi"):
            config = DecodeConfig(method=method, max_new_tokens=args.max_new_tokens)
            ((result,),) = list(generate_batches(lm, [ids], config))
            yield method, result.tokens, len(result.tokens), result.seconds
        for arm in (PLAIN, LOOKUP):
            said = llama.answer(lookup=arm == LOOKUP, ids=ids, count=args.max_new_tokens, stop=list(lm.stop_ids))
            yield arm, said["tokens"], len(said["tokens"]) - 1, said["seconds"]  # its first comes with the prefill

    for _ in answers(prompts[0]):  # what compiles and warms up does so here
        pass
    rows = []
    for ids in prompts:
        given = list(answers(ids))
        for arm, tokens, count, seconds in given:
            rows.append({"arm": arm, "count": count, "seconds": seconds, "identical": tokens == given[0][1]})
    llama.close()
    return figures(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True, help="a .gguf file, or smollm2-135m-instruct")
    p.add_argument(
        "--adapter", nargs="+", action="extend", metavar="DIR", help="of an adapter, or several, see decode.py"
    )
    p.add_argument("--questions", required=True, help="JSONL with question_id, category, turns; first turns are asked")
    p.add_argument("--limit", type=int, default=9, help="questions, spread over the categories")
    p.add_argument("--llama_python", default=sys.executable, help="the Python of the environment of llama-cpp-python")
    p.add_argument("--dtypes", default=",".join(STORED), help="one after the other")
    p.add_argument("--drafts", type=int, default=5, help="tokens that llama.cpp's prompt lookup drafts")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp")
    p.add_argument("--max_new_tokens", type=int, default=128)
    args = p.parse_args()
    dtypes = listed("--dtypes", args.dtypes, STORED)
    source = resolve(args.ckpt)
    if not is_gguf(source):
        raise InputError(f"--ckpt {args.ckpt}: no GGUF file; accepted: a .gguf file, or smollm2-135m-instruct")
    questions = spread(read_questions(args.questions), args.limit)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            model = Path(folder, f"{dtype}.gguf")
            rewrite(source, dtype, model)
            found[dtype] = measure(args, dtype, questions, model)
            model.unlink()
    print(f"{'dtype':<9} {'arm':<17} {'tokens/s':>8} {'to ar':>6} {'to llama.cpp':>12} {'to lookup':>9} {'same':>6}")
    for dtype, arms in found.items():
        for arm, f in arms.items():
            ratios = f"{f['ratio_to_ar']:>6.2f} {f['ratio_to_llama_cpp']:>12.2f} {f['ratio_to_llama_cpp_lookup']:>9.2f}"
            same = f"{f['identical_to_ar']}/{f['answers']}"
            print(f"{dtype:<9} {arm:<17} {f['tokens_per_s']:>8.1f} {ratios} {same:>6}")
    print_record(dtypes=found, drafts=args.drafts, threads=args.threads, adapter=args.adapter)


if __name__ == "__main__":
    run_command(main)
