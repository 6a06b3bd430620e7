# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test slow lint docs coverage wheel bench chaos browser clean

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

docs: setup  # site/, without a network but for the packages that build it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/write_reference.py --check
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

coverage: setup  # of the core, by its unit tests
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --cov --cov-report=term-missing:skip-covered tests/unit

wheel: setup  # as a stranger gets it: built, installed with what the demo needs in a clean environment, and run there
	rm -rf dist build && $(BIN)/python -m pip wheel --quiet --no-deps -w dist .
	rm -rf build/clean && $(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[report]"
	cd build/clean && bin/diffva demo --quick

bench: demo  # about an hour on two quiet cores; attribution.py, induction.py and real_pack.py train for longer
	$(BIN)/python experiments/demo.py
	$(BIN)/python experiments/corrections.py
	$(BIN)/python experiments/samplers.py
	$(BIN)/python experiments/shortcuts.py
	$(BIN)/python experiments/unseen.py
	$(BIN)/python benchmarks/engine.py --model runs/demo/model --batches 1,8 --cores 1 --out benchmarks/results/engine_cpu.json
	$(BIN)/python benchmarks/data_plane.py --model runs/demo/model --data runs/demo/data/test --records 384 --shard-size 64 --out benchmarks/results/data_plane.json
	$(BIN)/python benchmarks/scale.py --out benchmarks/results/scale.json
	$(BIN)/python benchmarks/planning.py --sizes 10000,100000,1000000
	$(BIN)/python benchmarks/export.py --run runs/demo/run
	$(BIN)/python benchmarks/fid_rows.py --rows 10000,50000
	$(BIN)/python benchmarks/tables.py

chaos: setup  # hours on two cores
	$(BIN)/python tests/chaos/run_damage.py --out benchmarks/results/damage.json
	$(BIN)/python tests/chaos/histories.py --inline 1000 --processes 2 --out benchmarks/results/chaos.json
	$(BIN)/python tests/chaos/histories.py --drivers 100 --cluster 50 --out benchmarks/results/chaos.json

browser: setup
	command -v chromium || (apt-get update && apt-get install --yes --no-install-recommends chromium)
	$(BIN)/python -m pytest -m browser tests/browser -s

clean:
	rm -rf $(VENV) runs build dist site *.egg-info
