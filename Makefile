# Everything runs in .venv, made on first use from pinned and hashed requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 3 # of the tests: they wait for processes of their own as much as they work
HISTORIES ?= 10000

.DEFAULT_GOAL := help
.PHONY: help demo up test lint unit audit bench asyncapi contract screenshots format test-containers test-kafka test-kafka-integration chaos histories mutations requirements soak

help: ## Show what can be made
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.local ## Process three dates on an embedded stack and print the statistics (ARGS=--exit: then stop)
	@$(BIN)/tripfold demo $(ARGS)

up: $(VENV)/.local ## Run the embedded stack until Ctrl-C (ARGS: see tripfold up --help)
	@$(BIN)/tripfold up $(ARGS)

test: lint unit ## Lint, check types, run the tests

lint: $(VENV)/.dev ## Check style, types, imports, workflows and docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/zizmor --quiet --offline .github/workflows
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.check_docs

soak: $(VENV)/.dev ## Kill ingest at random for ten minutes, and compare every byte and number (TRIPFOLD_TEST_SEED: repeat)
	TRIPFOLD_TEST_KILLS=40 TRIPFOLD_TEST_KILL_DATES=60 $(BIN)/python -m pytest -s tests/integration/test_random_kills.py $(ARGS)

unit: $(VENV)/.dev ## Run the tests alone (ARGS: for pytest)
	$(BIN)/python -m tests.browser.install
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

audit: $(VENV)/.dev ## Look the pinned requirements up among the known vulnerabilities (asks the internet)
	$(BIN)/pip-audit --disable-pip --require-hashes $(foreach file,$(wildcard requirements/*.txt),-r $(file))

bench: $(VENV)/bench/.installed ## Measure Tripfold beside its peers: tables, and JSON in .data/bench (ARGS: --quick, --only NAME)
	$(VENV)/bench/bin/python -m bench $(ARGS)

asyncapi: $(VENV)/.local ## Write the contract of the events, docs/asyncapi.json, from the types
	$(BIN)/tripfold asyncapi --write docs/asyncapi.json

contract: $(VENV)/.dev ## Hold the API to its OpenAPI document with many made-up requests (EXAMPLES=, SEED=)
	TRIPFOLD_TEST_EXAMPLES=$(or $(EXAMPLES),1000) TRIPFOLD_TEST_SEED=$(SEED) \
		$(BIN)/python -m pytest --timeout 0 tests/unit/services/api/test_contract.py $(ARGS)

screenshots: $(VENV)/.dev ## Take pictures of the page into .data/screenshots
	$(BIN)/python -m tests.browser.install
	$(BIN)/python -m tests.browser.screenshots .data/screenshots

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-containers: $(VENV)/.dev ## Run the integration tests, and faults of the network, on Kafka, S3 and a proxy in containers (needs Docker)
	$(BIN)/python -m tests.containers $(ARGS)

test-kafka: $(VENV)/.dev ## Run the integration tests and those of faults against a real Apache Kafka (needs Java 17 and Maven)
	$(BIN)/python -m tests.apache_kafka -n $(WORKERS) $(ARGS)

test-kafka-integration: $(VENV)/.dev ## Run of these the integration tests alone: minutes, and no broker is stopped
	$(BIN)/python -m tests.apache_kafka --only-integration -n $(WORKERS) $(ARGS)

chaos: $(VENV)/.dev ## Run all of it under load while everything fails (SECONDS=600 SEED=… BROKER=kafka|embedded)
	$(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),600) --broker $(or $(BROKER),kafka) $(if $(SEED),--seed $(SEED)) $(ARGS)

histories: $(VENV)/.dev ## Run 10,000 random histories against the oracle (HISTORIES=200 SEED=7: those of one seed)
	TRIPFOLD_HISTORIES=$(HISTORIES) $(if $(SEED),TRIPFOLD_HISTORIES_SEED=$(SEED)) \
		$(BIN)/python -m pytest -n $(WORKERS) tests/fault/test_histories.py $(ARGS)

mutations: $(VENV)/.dev ## Break each promise on purpose; let random histories find it (HISTORIES=1000: at most so many)
	TRIPFOLD_MUTATION_HISTORIES=$(HISTORIES) $(BIN)/python -m pytest -n $(WORKERS) tests/fault/test_mutations.py $(ARGS)

requirements: ## Pin the requirements again, with hashes (needs uv)
	uv pip compile -q $(COMPILE) -o requirements/runtime.txt
	uv pip compile -q $(COMPILE) --extra local --extra build -o requirements/local.txt
	uv pip compile -q $(COMPILE) --extra dev -o requirements/dev.txt
	uv pip compile -q $(COMPILE) --extra local --extra build --extra bench -o requirements/bench.txt
	sed -n 's/^requires = \["\(.*\)"\]$$/\1/p' pyproject.toml | uv pip compile -q - $(COMPILE_OPTIONS) -o requirements/build.txt

COMPILE_OPTIONS := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make requirements"
COMPILE := pyproject.toml $(COMPILE_OPTIONS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tripfold needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V). Set PYTHON to one." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.local: $(VENV)/bin/python requirements/local.txt pyproject.toml
	@echo "installing what the demo needs into $(VENV)"
	@$(PIP) install --require-hashes -r requirements/local.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python requirements/dev.txt pyproject.toml
	@echo "installing what the tests need into $(VENV)"
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# The peers need other versions of what Tripfold and its tests use, so they have an environment of their own.
$(VENV)/bench/.installed: requirements/bench.txt pyproject.toml
	@echo "installing what the benchmarks need into $(VENV)/bench"
	@$(PYTHON) -m venv $(VENV)/bench
	@$(VENV)/bench/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r requirements/bench.txt
	@$(VENV)/bench/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation -e .
	@touch $@
