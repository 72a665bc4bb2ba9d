.DEFAULT_GOAL := help

PYTHON ?= python3
BIN = .venv/bin
# Three, also on two cores, because many tests wait for a server.
TEST_PROCESSES ?= 3

PROOFS = fuzz_images image_bombs fuzz_http decode_attacks connection_attacks stalled_database api_properties crash_store \
    crash_points hot_swap hostile_surroundings

help:
	@echo 'make serve        create .venv, install, serve the shipped models; HOST and PORT, or UDS, choose another address'
	@echo 'make test         create .venv, install, run all tests'
	@echo 'make test-fast    the unit tests only: those that are not marked slow'
	@echo 'make test-ray     tests of Ray, and attacks on a service that uses it; needs the extra ray'
	@echo 'make check        lint, format and types'
	@echo 'make serving      compare the service with its peers: forty minutes; needs wrk, and Java for TorchServe'
	@echo 'make proof        the proofs in tests/stress: attacks, fuzzing, crashes, hot swaps, faults; takes hours'
	@echo 'make soak         the proof tests/stress/soak.py: mixed load for half an hour'
	@echo 'make constraints  write the installed versions to constraints.txt'
	@echo 'make audit        write the licenses of all dependencies to docs/dependencies.md; ask for known vulnerabilities'
	@echo 'make clean        remove .venv and what was built'

.PHONY: help serve test test-fast test-ray check proof soak serving clean constraints audit

serve: .venv/installed
	@exec $(BIN)/python -m app $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(if $(UDS),--uds $(UDS))

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist worksteal

# Tests of Ray, and attacks on a service whose predictions a Ray cluster computes.
test-ray: .venv/installed-dev
	$(BIN)/python -m pytest --ray tests/app/distributed/test_cluster.py tests/app/distributed/test_nodes.py \
	  tests/app/distributed/test_ingress.py tests/app/distributed/test_ray_jobs.py tests/training/test_ray_train.py \
	  tests/app/server/test_framing.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proof: .venv/installed-proof
	@for name in $(PROOFS); do $(BIN)/python tests/stress/$$name.py || exit 1; done

soak: .venv/installed
	$(BIN)/python tests/stress/soak.py

serving: .venv/installed .venv-peers/installed
	@command -v wrk > /dev/null || { echo "wrk is missing: apt-get install wrk"; exit 1; }
	$(BIN)/python benchmarks/serving.py

audit: .venv/installed-dev
	$(BIN)/python research/dependencies.py

constraints: .venv/installed-dev
	@{ grep '^#' constraints.txt; $(BIN)/pip list --format=freeze --exclude-editable | grep -viE '^(pip|setuptools)=='; } \
	  > constraints.partial && mv constraints.partial constraints.txt

.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; PyTorch is large, this takes a few minutes"
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/installed-proof: .venv/installed
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[proof]'
	@touch $@

.venv-peers/installed: benchmarks/peers/requirements.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@echo "installing the peers into .venv-peers; this takes a few minutes"
	@.venv-peers/bin/pip install --quiet --requirement $<
	@touch $@

clean:
	rm -rf .venv .venv-peers build dist *.egg-info
