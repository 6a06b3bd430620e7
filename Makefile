# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test slow lint bench chaos browser clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(STAMP)

demo: setup
	$(BIN)/diffva demo --out runs/demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

slow: setup
	$(BIN)/python -m pytest -m slow -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: demo
	$(BIN)/python benchmarks/corrections.py

chaos: setup
	$(BIN)/python tests/chaos/histories.py --inline 1000 --cluster 50 --out benchmarks/results/chaos.json

browser: setup
	command -v chromium || (apt-get update && apt-get install --yes --no-install-recommends chromium)
	$(BIN)/python -m pytest -m browser tests/browser -s

clean:
	rm -rf $(VENV) runs build dist *.egg-info
