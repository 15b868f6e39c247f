# Everything from nothing: `make demo` and `make test` set up what they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
EDITABLE ?=

.PHONY: demo test test-chains test-slow lint peers clean

demo: $(VENV)/.installed
	$(VENV)/bin/edgepress compress zoo:minilm-reviews --target cpu --max-drop 1% -o runs/demo

PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not chain and not slow and not gpu"

test-chains: $(VENV)/.installed-dev
	$(PYTEST) -m "chain and not slow and not gpu"

test-slow: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m "slow and not gpu"

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p edgepress

peers: $(VENV)/.installed
	for model in minilm-reviews vit-fashion; do \
	    $(VENV)/bin/python benchmarks/peers/run.py quantization --model zoo:$$model \
	        -o benchmarks/results/quantization-peers-$$model.json || exit 1; \
	done
	$(VENV)/bin/python benchmarks/peers/run.py pruning --speedups 2 --seeds 1 -o runs/pruning-peers.jsonl
	$(VENV)/bin/python benchmarks/peers/page.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) $(EDITABLE) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) $(EDITABLE) -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info
