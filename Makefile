# The house's chores. `make setup` once, then `make test`; every target works from a fresh clone.

PYTHON ?= python3
TORCH := torch==2.13.0
# The main job: rows from the installed Python's docstrings, a recipe, a tuned model and what changed.
demo: setup
	.venv/bin/python recipes/python_library.py

# Two workers with one thread each: more threads than cores only make the workers wait for one another.
TEST := -m pytest -q -n 2 -m "not slow"

.PHONY: setup demo test test-slow test-track test-oldest lint format clean

setup: .venv/installed

# torch by itself and first: where a CPU build lies on disk pip takes that, and the rest is resolved around it.
.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q $(TORCH)
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

test: setup
	OMP_NUM_THREADS=1 .venv/bin/python $(TEST)

# The longer proofs, one after another, up to the first failure.
test-slow: setup
	.venv/bin/python -m pytest -q -x -m slow

# The trackers' packages are many and held against one another by no constraint, so `make test` does without most.
.venv-track/installed: pyproject.toml
	test -x .venv-track/bin/python || $(PYTHON) -m venv .venv-track
	.venv-track/bin/python -m pip install -q $(TORCH)
	.venv-track/bin/python -m pip install -q -e '.[test,track]'
	touch $@

test-track: .venv-track/installed
	OMP_NUM_THREADS=1 .venv-track/bin/python -m pytest -q tests/training/test_trackers.py

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e '.[test]'
	touch $@

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(TEST)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .venv-track .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
