# GNU make and a POSIX sh. `make help` lists the targets.

PYTHON ?= python3
PY := .venv/bin/python
REQUIREMENTS := requirements.txt requirements/servers.txt requirements/dev.txt
CONSTRAINTS := requirements/constraints.txt
# Processes that share the tests; each starts servers of its own.
WORKERS ?= 2
TESTS ?= tests
# The outcome of each test, for `make report`; a part of them is no evidence for the whole.
RECORDED = $(if $(filter tests,$(TESTS)),--junitxml=.outcomes/$@.xml)
# Made after each complete installation: its age tells whether requirements changed since.
INSTALLED := .venv/installed
INSTALLED_DOCS := .venv/installed-docs

.DEFAULT_GOAL := help
.PHONY: setup demo test test-slow lint bench report docs docs-check site up down clean help

setup: $(INSTALLED) ## make .venv and install the tested set of packages

demo: setup ## run every script top to bottom against real servers
	$(PY) servers.py run -- sh -c 'failed=; \
	    for script in 0?_*.py; do $(PY) "$$script" || failed="$$failed $$script"; done; \
	    test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }'

test: setup ## run the fast tests; REQUIRE_SERVICES=1 fails where a server is missing
	$(PY) -m pytest -n $(WORKERS) $(RECORDED) $(TESTS)

test-slow: setup ## run the others: servers killed under load, whole runs twice
	$(PY) -m pytest -n $(WORKERS) -m slow $(RECORDED) $(TESTS)

lint: setup ## ruff, its formatter, mypy --strict, and the length of the scripts
	@for script in $(wildcard 0?_*.py); do \
	    lines=$$(wc -l <"$$script"); bytes=$$(wc -c <"$$script"); \
	    test "$$lines" -le 1700 && test "$$bytes" -le 73728 || { \
	    echo "$$script: $$lines lines, $$bytes bytes; nobody reads more than 1,700, or 72 KiB"; \
	    exit 1; }; done
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict $(wildcard 0?_*.py) config.py servers.py benchmarks \
	    exercises/check.py exercises/checks

report: setup ## write docs/COMPLETION_REPORT.md from the last test, test-slow and bench
	$(PY) tests/completion.py

bench: setup ## measure against peers and limits, then write docs/BENCHMARKS.md
	BENCH_RECORDS=benchmarks/records $(PY) servers.py run -- sh -c 'failed=; \
	    for bench in benchmarks/bench_*.py; do $(PY) "$$bench" || failed="$$failed $$bench"; done; \
	    $(PY) benchmarks/report.py || failed="$$failed benchmarks/report.py"; \
	    test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }'

docs: setup ## write quotes and output anew into the documents, from the code and from runs
	SERVERS_IGNORE_INSTALLED=1 $(PY) servers.py run -- $(PY) tests/documents.py

docs-check: $(INSTALLED_DOCS) ## the tests of the documents and the site, fast and slow
	$(PY) -m pytest -n $(WORKERS) -m "slow or not slow" tests/test_docs.py tests/test_index.py \
	    tests/test_architecture.py tests/test_symptoms.py tests/test_site.py

site: $(INSTALLED_DOCS) ## build the documents as pages that open from disk: site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict # --quiet would hide warnings from it

up: ## start the full stack with docker compose
	@test -e .env || { install -m 600 .env.example .env; echo "made .env from .env.example"; }
	docker compose up -d --wait

down: ## stop it; its data stay
	docker compose down

clean: ## remove what make made: .venv, site and caches (.env and data stay)
	@if test -e .venv/made-by-make; then \
	    find .venv -mindepth 1 -delete; rmdir .venv 2>/dev/null || :; `# in a container, a volume` \
	elif test -e .venv; then echo ".venv was not made by make: left alone"; fi
	rm -rf .hypothesis .mypy_cache .outcomes .pytest_cache .ruff_cache site
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# ── Installation ────────────────────────────────────────────────────────────────────

$(INSTALLED): $(REQUIREMENTS) $(CONSTRAINTS)
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "$(PYTHON) is not there: apt-get install python3 python3-venv"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1)."; \
	    echo "Name another: make setup PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	@test -x .venv/bin/pip || { echo "making .venv with $$("$(PYTHON)" -V)"; \
	    "$(PYTHON)" -m venv .venv && touch .venv/made-by-make; }
	@echo "installing into .venv (first time: about 400 MB)"
	@$(PY) -m pip install -q --disable-pip-version-check \
	    $(addprefix -r ,$(REQUIREMENTS)) -c $(CONSTRAINTS)
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED) requirements/docs.txt
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements/docs.txt -c $(CONSTRAINTS)
	@touch $@
