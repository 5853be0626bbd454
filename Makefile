# Two commands for a fresh machine (Python 3.11 or newer with venv, make, gcc):
#   make demo   install, distil the embedded teacher into a one-step student, score, export, report
#   make test   install, run the quick tests offline
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow lint clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py --output_dir runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow" tests

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs
