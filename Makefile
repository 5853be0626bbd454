# Two commands for a fresh machine (Python 3.11 or newer with venv, make, gcc):
#   make demo   install, distil the embedded teacher into a one-step student, score, export, report
#   make test   install, run the quick tests offline
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Gigabytes of wheels: a torn connection starts the whole command anew, as resuming may meet the same tear again.
INSTALL := for i in 1 2 3; do $(BIN)/pip install --quiet --retries 10 $$wanted && exit 0; sleep 20; done; exit 1
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow lint clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	wanted="--upgrade pip"; $(INSTALL)
	wanted="torch==2.14.1 torchvision==0.29.1"; $(INSTALL)
	wanted="-e .[dev]"; $(INSTALL)
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
