# `make` alone lists the targets. Python 3.11 to 3.13 with its venv module is all that has to be there.
#   PYTHON=...  the interpreter that .venv is made with (default: the first that fits)
#   ARGS=...    handed on to `rayrlhf run` by quickstart and showcase, to the benchmarks by bench, to pytest by the
#               test targets and to pip-audit by audit

BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
SHOWCASE_STAMP := .venv/.installed-showcase

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13,$(shell $(p) -c "$(SUPPORTED)" 2>/dev/null && echo $(p))))

# uv reads neither pip.conf nor PIP_*. A machine that offers torch's CPU wheel in a local folder is served from there,
# in place of PyTorch's index (tool.uv.sources in pyproject.toml).
ifneq (,$(wildcard $(addsuffix /torch-*.whl,$(PIP_FIND_LINKS))))
empty :=
comma := ,
export UV_FIND_LINKS := $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
export UV_NO_SOURCES := 1
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart showcase bench docs audit test test-long chaos test-tools browser lint test-unit test-oracles test-ray test-e2e clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install the product (CPU build), once

# Bytecode at once: uv leaves it to the first import, and where PYTHONDONTWRITEBYTECODE is set, as in many containers,
# every process would compile vLLM, Ray and torch again, which doubles what it takes to start.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c "$(SUPPORTED)" || { \
	  echo "make: rayrlhf needs Python 3.11, 3.12 or 3.13; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/uv --version >/dev/null 2>&1 || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet -c constraints.txt uv; }
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e ".[cpu]"
	@touch $@

# What tests, lint, documents and benchmarks need besides.
$(DEV_STAMP): $(STAMP)
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt --group dev --group docs --group oracles --group showcase
	@touch $@

# The model and the lexicon of `make showcase`, 93 MB.
$(SHOWCASE_STAMP): $(STAMP)
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt --group showcase
	@touch $@

quickstart: $(STAMP) ## run the whole pipeline on the embedded data and model
	$(BIN)/rayrlhf run configs/quickstart.yaml $(ARGS)

showcase: $(SHOWCASE_STAMP) ## teach a model of 135 million parameters, which writes English, to be positive
	$(BIN)/python scripts/showcase_model.py build/smollm2
	$(BIN)/python scripts/make_openings.py build/openings
	$(BIN)/rayrlhf run configs/showcase.yaml $(ARGS)
	$(BIN)/python scripts/showcase_answers.py configs/showcase.yaml $(ARGS)

bench: $(DEV_STAMP) ## all benchmarks; rewrites the tables of docs/benchmarks.md
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(DEV_STAMP) ## the documentation as a site, into build/site; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# pip-audit gets an environment of its own: it is no part of what is looked at.
audit: ## known vulnerabilities of the versions in constraints*.txt; asks the package index about each
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit==2.10.1
	build/audit/bin/python scripts/audit.py build/audit/bin/pip-audit constraints.txt constraints.gpu.txt -- $(ARGS)

# `ray up` calls ssh and rsync, and its test runs it. Debian's packages where root may install them, else a clear word.
test-tools:
	@for tool in ssh ssh-keygen rsync unshare; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	  test -z "$$missing" || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && \
	    apt-get -qq install -y openssh-client rsync util-linux >/dev/null; } || \
	  { echo "make: the tests of 'ray up' need$$missing; install them (Debian and Ubuntu: apt install openssh-client rsync)" >&2; exit 1; }

# The ranking page is tested in a real browser.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } || \
	  { echo "make: the tests of the ranking page need Chromium; install it (Debian and Ubuntu: apt install chromium)" >&2; exit 1; }

# In two processes, a file in one of them, in the order of tests/order.py. The bytecode is for the hundreds of processes
# that the tests start: where PYTHONDONTWRITEBYTECODE is set, each would compile our code again.
test: lint browser ## lint, then all tests but the long ones
	$(BIN)/python -m compileall -q rayrlhf actors jobs tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(DEV_STAMP) test-tools ## the tests that `make test` leaves out
	$(BIN)/python -m pytest -m long $(ARGS)

chaos: $(DEV_STAMP) ## 100 faults at random moments of whole runs, which have to end as if nothing had happened
	$(BIN)/python -m tests.chaos $(ARGS)

lint: $(DEV_STAMP) ## ruff, mypy and the import linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-unit: $(DEV_STAMP) browser ## tests without Ray (fast)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit $(ARGS)

test-oracles: $(DEV_STAMP) ## our numbers against other people's code
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/oracles $(ARGS)

test-ray: $(DEV_STAMP) ## tests with Ray and vLLM
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/ray $(ARGS)

test-e2e: $(DEV_STAMP) ## whole runs
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/e2e $(ARGS)

clean: ## remove .venv, caches and build output; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find rayrlhf actors jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
