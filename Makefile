# Each target sets up what it needs in .venv and says what it does.
# Use another Python with `make PYTHON=python3.12 demo`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
DEMO := demo/constant-reward

.DEFAULT_GOAL := help
.PHONY: help demo test test-full lint bench docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/.lab  ## settle the blog post's claim about batch norm in TD3 and SAC, with a picture
	@echo "== Training TD3 and SAC with and without batch norm: five seeds each, all at once"
	$(BIN)/batchproof study constant-reward --out $(DEMO)
	@echo "== Open $(DEMO)/report.html in a browser, or look at $(DEMO)/answer.png"

test: .venv/.dev  ## run the tests
	@echo "== Running the tests (some nine minutes on two cores)"
	$(BIN)/pytest -n 2 --dist loadfile -m "not full"

test-full: .venv/.dev .venv/.ray  ## run the tests, small versions of the studies, and a Ray cluster's
	@echo "== Running all tests (some twenty-five minutes on two cores)"
	$(BIN)/pytest -n 2 --dist loadfile

lint: .venv/.dev  ## ruff and mypy
	@echo "== Checking style, formatting and types"
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.bench  ## measure speed against Stable-Baselines3 and SBX (an hour; an idle machine)
	@echo "== Measuring; keep the machine idle"
	$(BIN)/python benchmarks/constant_reward.py
	$(BIN)/python benchmarks/mujoco_speed.py

docs: .venv/.docs  ## build the documentation into site/
	@echo "== Building the documentation"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "== Open site/index.html"

clean:  ## remove everything that make made
	rm -rf .venv demo site

.venv/.made:
	@echo "== Making a virtual environment in .venv"
	$(PYTHON) -m venv .venv
	@touch $@

# One stamp for each extra: installed anew when the package's needs change.
.venv/.lab .venv/.dev .venv/.bench .venv/.docs .venv/.ray: .venv/.%: .venv/.made pyproject.toml constraints.txt
	@echo "== Installing batchproof[$*] and what it needs (minutes at the first time)"
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
