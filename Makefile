# Every target does the set-up that it needs; set-up that is done costs nothing.
PYTHON ?= python3
PORT ?= 3000
KILLS ?= 500

# No tool reports to anybody.
export DAGSTER_DISABLE_TELEMETRY := yes
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# The committed requirement files say what is installed, and these recipes say where; a user's index, cache and
# certificate settings are honoured.
unexport UV_SYSTEM_PYTHON UV_PYTHON UV_TORCH_BACKEND UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE_NEWER UV_REQUIRE_HASHES
unexport PIP_USER PIP_TARGET PIP_PREFIX

say = @printf '==> %s\n'
quiet := $(shell [ -t 2 ] || echo --quiet)
uv := .venv/bin/uv
run := @PATH="$$PWD/.venv/bin:$$PATH"
compile := $(uv) pip compile --universal --generate-hashes --python-version 3.11 --custom-compile-command 'make lock' --quiet

.DELETE_ON_ERROR:
.PHONY: help setup demo ui demo-seeds demo-ray bench-overhead bench-model bench-evaluate bench-gate verify-adm test test-slow ray soak lint audit lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

setup: .venv/.installed .venv-dvc/.installed ## make .venv and .venv-dvc (another Python: PYTHON=python3.12)

demo: setup ## the whole pipeline on MNIST, and its table of results
	$(run) .venv/bin/dod run mnist

ui: setup ## Dagster's pages at http://127.0.0.1:3000 (another port: PORT=3001)
	$(run) .venv/bin/dagster dev --host 127.0.0.1 --port $(PORT)

demo-seeds: setup ## the demo under three seeds, with guidance sweeps
	$(run) .venv/bin/python -m benchmarks.seeds

demo-ray: setup ray ## the demo here and on a Ray cluster of two nodes, through S3, and both digests: 20 minutes, as root
	$(run) .venv/bin/python -m benchmarks.cluster

bench-overhead: setup ## what Dagster and DVC cost the demo beside its bare stages, and how fast commands answer: 8 minutes
	$(run) .venv/bin/python -m benchmarks.overhead

bench-model: setup ## DoD-B's training and sampling steps and its loader against naive ones and peers: 15 minutes
	$(run) .venv/bin/python -m benchmarks.model

bench-evaluate: setup ## the metrics' errors on closed forms, their time and memory beside torch-fidelity's: 15 minutes
	$(run) .venv/bin/python -m benchmarks.evaluate

bench-gate: setup ## the gate's tolerance, false alarms and power on the demo, trained under six seeds: about an hour
	$(run) .venv/bin/python -m benchmarks.gate

verify-adm: setup ## our numbers of ADM's published samples beside ADM's: fetches 12 GB, wants a GPU
	$(run) .venv/bin/python -m benchmarks.verify_adm

test: setup ## the tests that need no accelerator, with the coverage gate
	$(run) .venv/bin/python -m pytest -n 2 -m "not slow and not gpu" --benchmark-disable --cov

ray: .venv/.ray ## add Ray to .venv, for `deployment.compute: ray` and `make test-slow`

test-slow: setup ray ## the tests that take more than a minute, those on a Ray cluster among them
	$(run) .venv/bin/python -m pytest -m "slow and not gpu" --benchmark-disable

soak: setup ## kill a training at 500 random instants (another number: KILLS=50)
	$(run) DOD_KILLS=$(KILLS) .venv/bin/python -m pytest --benchmark-disable -s tests/models/test_train_kills.py

lint: setup ## format, lint, types, layers, infra/, known vulnerabilities, large files and private keys
	$(run) .venv/bin/pre-commit run --all-files

audit: setup ## known vulnerabilities of the locked packages, as `make lint` asks for them where there is a network
	$(run) sh infra/audit.sh

lock: .venv/.uv ## compile requirements/*.txt anew (newer versions: make lock UPGRADE=--upgrade)
	$(say) "resolving requirements"
	@$(compile) $(UPGRADE) requirements/uv.in -o requirements/uv.txt
	@$(compile) $(UPGRADE) requirements/dvc.in -o requirements/dvc.txt
	@$(compile) $(UPGRADE) pyproject.toml --extra dev -o requirements/project.txt
	@$(compile) $(UPGRADE) pyproject.toml --extra ray --constraint requirements/project.txt -o requirements/ray.txt

clean: ## remove both environments and the tools' caches, no data
	rm -rf .venv .venv-dvc .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*

define check_python
import sys
if sys.version_info < (3, 11):
    sys.exit("make setup: %s is Python %d.%d, and 3.11 or newer is needed; name another, for example: "
             "make setup PYTHON=python3.12" % ((sys.executable,) + sys.version_info[:2]))
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("make setup: %s cannot make virtual environments (%s); on Debian or Ubuntu: "
             "apt-get install python%d.%d-venv" % ((sys.executable, error) + sys.version_info[:2]))
endef
export check_python

# An installation that was cut off may leave half a package, which uv would take for a whole one: begin again.
ifneq ($(wildcard .venv/.installing),)
.PHONY: .venv/.uv
endif

.venv/.uv: requirements/uv.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make setup: no $(PYTHON) here; install Python 3.11 or newer, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "$$check_python"
	$(say) "making .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

.venv/.installed: .venv/.uv requirements/project.txt pyproject.toml infra/dvc-launcher.sh infra/dagster-home.pth
	$(say) "installing requirements/project.txt into .venv (6 GB; minutes, where they must be downloaded)"
	@touch .venv/.installing
	@$(uv) pip sync $(quiet) --python .venv/bin/python --require-hashes --compile-bytecode requirements/project.txt requirements/uv.txt
	@$(uv) pip install $(quiet) --python .venv/bin/python --no-build-isolation --no-deps --editable .
	@install -m 755 infra/dvc-launcher.sh .venv/bin/dvc
	@install -m 644 infra/dagster-home.pth .venv/lib/python3.*/site-packages
	@rm .venv/.installing
	@touch $@

.venv/.ray: .venv/.installed requirements/ray.txt
	$(say) "installing requirements/ray.txt into .venv"
	@$(uv) pip install $(quiet) --python .venv/bin/python --require-hashes --compile-bytecode --requirement requirements/ray.txt
	@touch $@

.venv-dvc/.installed: requirements/dvc.txt | .venv/.uv
	$(say) "installing requirements/dvc.txt into .venv-dvc"
	@$(uv) venv --quiet --clear --python .venv/bin/python .venv-dvc
	@$(uv) pip sync $(quiet) --python .venv-dvc/bin/python --require-hashes --compile-bytecode requirements/dvc.txt
	@touch $@
