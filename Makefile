# Each target makes .venv by itself; PYTHON chooses the interpreter it is made with, WORKERS how many processes test.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test test-slow check bench clean

demo: .venv/ready
	$(BIN)/python -m pikv_cli.demo

test: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal

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

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
