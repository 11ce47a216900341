# One virtual environment, .venv, made when something needs it and renewed when what it is made of changes.
# A .venv that is there already is used.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-full lint format docs clean

demo: $(INSTALLED)
	$(BIN)/python examples/denoise.py build/demo

# Files are shared out to two processes.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=15

test-full: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --full --durations=20

lint: $(INSTALLED) build/typecheck/na_compiler
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Strict: a broken link or reference fails.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs
	@echo build/docs/index.html

$(VENV)/.installed-docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@command -v nvidia-smi > /dev/null || test -x $(BIN)/python || \
		echo "No GPU is seen here, and torch brings gigabytes of CUDA; its CPU build is left as it is if it is in $(VENV)" \
		"first: $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --constraint constraints.txt torch" \
		"--index-url https://download.pytorch.org/whl/cpu"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[demo,draw,onnx,test]'
	touch $@

# The package as an installation has it, of links: schedules/ is na_compiler.schedules. mypy reads it here.
build/typecheck/na_compiler: FORCE
	rm -rf build/typecheck
	mkdir -p $@
	ln -s $(CURDIR)/na_compiler/* $@
	ln -s $(CURDIR)/schedules $@

FORCE:

clean:
	rm -rf build dist *.egg-info $(VENV)
