# Every target sets up what it needs: a virtual environment in .venv with the project installed in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes with one thread each are faster than one with two.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-multinode soak soak-sweep study study-full notebooks notebooks-check screenshot \
	reproduce bench gpu-check lint types clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/installed ## Train, distil and report on the embedded data (ARGS="model=deit seed=1" changes the run)
	$(BIN)/python train.py model=deit_distilled $(ARGS)

test: $(VENV)/installed ## The fast tests
	$(TEST) -m "not slow"

test-all: $(VENV)/installed ## All tests
	$(TEST)

test-multinode: $(VENV)/installed ## Two network namespaces, torchrun over gloo, the link cut in the middle (root only, else skipped)
	OMP_NUM_THREADS=1 $(BIN)/python tests/multinode.py

soak: $(VENV)/installed ## Kill runs at 20 random moments, resume them, compare every bit (SEED=1 gives other moments)
	$(BIN)/python tests/soak.py 20 $(or $(SEED),0)

soak-sweep: $(VENV)/installed ## Kill workers and drivers of a sweep of naps at 60 random moments, count its 30 trials
	$(BIN)/python tests/sweeping.py soak 60 $(or $(SEED),0)

study: $(VENV)/installed ## Rerun the study of experiments/PROTOCOL.md from raw pictures to tables (DATA=DIR; resumes)
	$(BIN)/facemask study $(DATA)

study-full: $(VENV)/installed ## Its GPU edition: base, 224 px, pretrained (DATA=DIR; not tried: no GPU here)
	$(BIN)/facemask study $(DATA) --tier full --workers 1

notebooks: $(VENV)/installed ## Execute all notebooks and keep their outputs (NAMES="02_ablation" for some)
	$(BIN)/python tests/notebooks.py $(NAMES)

notebooks-check: $(VENV)/installed ## Execute all notebooks; fail where a committed output is stale
	$(BIN)/python tests/notebooks.py --check

screenshot: $(VENV)/installed ## The demo's picture in the README (RUN=folder of a run on drawn faces)
	$(BIN)/python tests/chromium.py $(RUN) experiments/demo.png

bench: $(VENV)/installed ## Speed against others, in turn, as ratios (FACEMASK_DATA: real pictures); two hours
	for name in data teacher determinism limit train profile memory growth recipes startup sweep scan; do $(BIN)/facemask bench $$name || exit 1; done

gpu-check: $(VENV)/installed ## Do the GPU paths hold on this machine? Needs a GPU; writes experiments/bench/MACHINE/gpu.json
	$(BIN)/facemask bench gpu

reproduce: $(VENV)/installed ## Check every record and the tables made of them, and train the small one again
	$(BIN)/facemask report --check
	$(BIN)/facemask reproduce --all
	$(BIN)/facemask reproduce smoke --tier train || [ $$? -eq 3 ] # 3: drift, on another kind of machine

lint: $(VENV)/installed ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed ## Types
	$(BIN)/mypy

clean: ## Remove the virtual environment and every cache (runs stay)
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11: name another with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
