#!/usr/bin/env bash
# One lease of a GPU of 15 minutes, in calls of at most 10: rivals trained on the rows and for the steps of the shipped
# adapter, then the trade-off of noise beside the text (experiments/learn.py). On an H100 a step of 32 rows took 0.047 s
# with EAGLE's head, 0.065 s with Medusa's, 0.076 s with first layers; of 8 rows 0.045 s plain, 0.07 to 0.10 s beside. So
# the rivals take 360 s, each setting 10 s a seed and 6 s for its tokens a pass, and a start 20 to 80 s.
#   bash experiments/gpu_day.sh pack QUESTIONS.jsonl REPLIES ROWS.jsonl.gz ...
# here: fills pack/ (ignored by git) and prints the calls. REPLIES: a folder with own.jsonl and held.jsonl of an earlier
# run of learn.py, or - where there is none: the GPU then answers the prompts of ROWS first, in 50 s more.
#   bash experiments/gpu_day.sh run OUT SECONDS [more arguments of learn.py]
# there, the same in every call: keeps what the call brought, and once all parts are there trains for so long, what is
# left of the arms. What it found, and the adapters worth keeping, come back in OUT: at most 8 files of 16 MiB.
# SMALL=1 rehearses it on a CPU, with a random tiny model. Of learn.jsonl, as results/learning/gpu_day.jsonl,
# experiments/results.py makes two sections; benchmarks/rivals.yaml finds the adapters under runs/gpu_day.
set -euo pipefail
cd "$(dirname "$0")/.."

# In order of worth; learn.py leaves out what would not end in time, and goes on with it in the next call.
RIVALS=medusa-4@1900x32,layers-10-int8-l1@1900x32,eagle@1900x32
SETTINGS=plain,beside-marked-w0.25-f16,beside-marked-w0.1,beside-marked-w0.1-a96-f16,beside-marked-model-w0.25
SETTINGS+=,beside-marked-w0.25-a96,beside-marked-model-w0.5,beside-marked-w0.25-n3,beside-marked-w0.25-r32
SETTINGS+=,beside-marked-model-l1-w0.25,beside-marked-w0.25-a24
LONG=plain@1000x8,beside-marked-w0.25@1000x8
ARMS=${ARMS:-$RIVALS,${SETTINGS//,/@120x8,}@120x8,$LONG}
# Trees at the same place of both lists are compared. None has n-grams.
TREES=(--methods "jacobi:small13,tr-jacobi:small13,tr-jacobi:mix16,tr-jacobi:mix64")
TREES+=(--marked_methods "jacobi:draft13,tr-jacobi:draft13mix,tr-jacobi:ahead,tr-jacobi:wide64")
if [ -n "${SMALL:-}" ]; then
  ARMS=medusa-4@2x2,eagle@2x2,layers-1-int8-l1@2x2,plain@2x2,beside-marked-model-w0.25@2x2,beside-marked-w0.25-n3@2x2
  ARMS+=,plain@4x2,beside-marked-w0.25-f16@4x2
  SMALL="--small --limit 2 --max_new_tokens 16 --dispatch 1 --answer_batch 8"
fi

pack() {
  python=${PYTHON:-.venv/bin/python} questions=$1 replies=$2
  shift 2
  # Every call carries this repository and one part, 64 MiB together.
  PYTHON=$python PART_BYTES=${PART_BYTES:-33000000} bash benchmarks/pack.sh "$questions" > /dev/null
  own=(--replies "$replies") && [ "$replies" != - ] || own=()
  "$python" -m experiments.learn --ckpt smollm2-135m-instruct --questions "$questions" --tuning "$@" "${own[@]}" \
    --rows_only --out pack/rows
  parts=(pack/part*)
  echo ${#parts[@]} > "pack/part0/parts"
  mv pack/wheels pack/part0/
  mv pack/rows/rows-tuning.npz "${parts[1]}/"
  if [ "$replies" = - ]; then mkdir "${parts[-1]}/prompts" && cp "$@" "${parts[-1]}/prompts/"; fi
  if [ "$replies" != - ]; then mv pack/rows/rows-own.npz "${parts[-1]}/"; fi
  mv pack/questions.jsonl "${parts[-1]}/"
  rm -rf pack/rows pack/data pack/run.sh
  du -sh --apparent-size pack/part*
  git ls-files -z | du -ch --apparent-size --files0-from=- | tail -n 1
  echo "The calls, one right after the other, each carrying one part and this repository:"
  for part in "${parts[@]}"; do echo "  carry $part: bash experiments/gpu_day.sh run \$OUT 500"; done
  echo "The last of them trains (540 s at most). Then, with 50 s less than what is left of the lease:"
  echo "  carry nothing: bash experiments/gpu_day.sh run \$OUT SECONDS"
}

run() {
  out=$1 seconds=$2 kept=${KEPT:-/tmp/msn_jax_gpu_day} python=${PYTHON:-python3}
  shift 2
  mkdir -p "$kept/learn" "$out" runs
  [ -e runs/gpu_day ] || ln -s "$kept/learn" runs/gpu_day
  for file in pack/part*/*; do [ -e "$file" ] && cp -r "$file" "$kept/"; done
  there=("$kept"/w.*)
  if [ ! -f "$kept/parts" ] || [ "${#there[@]}" -lt "$(cat "$kept/parts")" ]; then
    echo "kept so far: $(cd "$kept" && ls | tr '\n' ' ')"
    return
  fi
  if [ ! -d "$kept/site" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$kept/site" "$kept"/wheels/*.whl
  fi
  [ -f runs/smollm2.gguf ] || cat "$kept"/w.* > runs/smollm2.gguf
  cp -u "$kept"/rows-*.npz runs/gpu_day/
  export PYTHONPATH="$kept/site:$PWD" PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error TF_CPP_MIN_LOG_LEVEL=2
  export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 XLA_FLAGS="--xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"
  export JAX_COMPILATION_CACHE_DIR="$kept/compiled" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1
  prompts=() code=0
  if [ -d "$kept/prompts" ]; then prompts=(--prompts "$kept"/prompts/* --answer_seconds 50); fi
  timeout $((seconds + 30)) "$python" -m experiments.learn --ckpt runs/smollm2.gguf --base smollm2-135m-instruct \
    --questions "$kept/questions.jsonl" --out runs/gpu_day --arms "$ARMS" --seeds 0,1 --limit 52 --most_rows 16384 \
    --answer_batch 512 --figure_seconds 40 --seconds "$seconds" "${TREES[@]}" ${SMALL:-} "${prompts[@]}" "$@" \
    2>&1 | tee "$out/log.txt" || code=$?
  cp runs/gpu_day/learn.jsonl "$out/"
  for folder in runs/gpu_day/{medusa,eagle,layers,plain-120x8,beside}-*seed0; do
    name=$(basename "$folder")
    if [[ $name != beside* || $name == *-f16-* ]] && [ -f "$folder/adapter_config.json" ]; then
      tar -cf "$out/$name.tar" -C runs/gpu_day "$name"
    fi
  done
  ls -l "$out"
  return $code
}

case ${1:-} in
  pack | run) "$@" ;;
  *) sed -n '2,15s/^# \?//p' "$0" ;;
esac
