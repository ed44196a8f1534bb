#!/usr/bin/env bash
# Prepares pack/ (ignored by git): what a bare GPU machine needs to run benchmarks/accelerator.py without a network.
#   bash benchmarks/pack.sh [QUESTIONS.jsonl [ROWS.jsonl.gz ...]]     ROWS: what experiments/learn.py is to learn from
# The machine has Python 3.12, jax 0.11 with CUDA, flax, optax, orbax, transformers, safetensors, tokenizers, chex; not
# grain, jsonargparse, gguf, datasets and tensorboardX. The weights travel in parts: a transfer may be bounded.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
PART_BYTES=${PART_BYTES:-34000000}
mkdir -p pack && find pack -mindepth 1 -maxdepth 1 ! -name 'compiled.tgz.*' -exec rm -rf {} +  # kept: what was compiled there
mkdir -p pack/wheels
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d pack/wheels \
  array-record cloudpickle datasets dill gguf grain httpcore2 httpx2 jsonargparse multiprocess portpicker tensorboardX truststore
weights=$("$PYTHON" - <<'P'
from msn_jax.io.loading import resolve
print(resolve("smollm2-135m-instruct"))
P
)
split -b "$PART_BYTES" -d -a 1 "$weights" pack/w.
for part in pack/w.*; do n=${part##*.}; mkdir -p "pack/part$n" && mv "$part" "pack/part$n/"; done
[ $# -ge 1 ] && cp "$1" pack/questions.jsonl && shift
mkdir -p pack/data && for file in "$@"; do cp "$file" pack/data/; done
cat > pack/run.sh <<'R'
#!/usr/bin/env bash
# On the machine, from the repository: bash pack/run.sh OUT [arguments of accelerator.py]
set -euo pipefail
site=/tmp/msn_jax_site w=/tmp/msn_jax_parts out=$1; shift
mkdir -p "$w" "$out"
for file in pack/part*/w.*; do [ -f "$file" ] && cp "$file" "$w/"; done
[ -d pack/wheels ] && [ ! -d "$site" ] && python3 -m pip install -q --no-index --no-deps --no-compile --upgrade \
  --target "$site" pack/wheels/*.whl
cat "$w"/w.* > pack/smollm2.gguf
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1
set -- --ckpt pack/smollm2.gguf --adapter adapters/smollm2-135m-msn --out "$out/figures" "$@"
[ -f pack/questions.jsonl ] && set -- "$@" --questions pack/questions.jsonl
data=$(find pack/data -type f 2>/dev/null | sort | tr '\n' ' ')
[ -n "$data" ] && set -- "$@" --prompts "$data"
mkdir -p "$out/figures" && cat pack/compiled.tgz.* 2>/dev/null | tar -xzf - -C "$out/figures" 2>/dev/null || true
code=0
python3 benchmarks/accelerator.py "$@" 2>&1 | tee "$out/log.txt" || code=$?
# What was compiled comes back in parts of its own: packed again, it spares the next run most of its compiling.
tar -czf - -C "$out/figures" compiled 2>/dev/null | split -b 15000000 -d -a 1 - "$out/compiled.tgz." || true
rm -rf "$out/figures/compiled"
tar -czf "$out/figures.tar.gz" -C "$out" figures && rm -rf "$out/figures"
exit $code
R
du -sh pack/wheels pack/part*
echo "Copy this repository and pack/ (in parts, where a transfer is bounded: pack/part0, pack/part1, ..., then the rest)"
echo "to the machine; then run there, from the repository:  bash pack/run.sh OUT --budget_s 540"
