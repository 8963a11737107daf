# Each target makes .venv by itself, test-kvpress .venv-presses; PYTHON chooses the interpreter they are made with,
# WORKERS how many processes test.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test test-slow test-kvpress check bench clean

demo: .venv/ready
	$(BIN)/python -m pikv_cli.demo

test: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal

test-kvpress: .venv-presses/ready
	.venv-presses/bin/python -m pytest -m 'not slow and not gpu' tests/presses
	.venv-presses/bin/python -m pytest -k 'llama or pikv' tests/cache/test_equals_stock.py

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python benchmarks/bench.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

.venv-presses/ready: pyproject.toml constraints-kvpress.txt
	$(PYTHON) -m venv .venv-presses
	.venv-presses/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-kvpress.txt \
	  -e '.[kvpress]' pytest
	touch $@

clean:
	rm -rf .venv .venv-presses runs .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
