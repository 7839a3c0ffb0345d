# make demo, make test: everything from a fresh machine on; calling them again costs nothing.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: install demo test lint
install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $(READY)

demo: $(READY)
	$(VENV)/bin/sglang-specforge demo

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
