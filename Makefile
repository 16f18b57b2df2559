# make demo    a private model on bundled data, and its epsilon
# make test    everything the CI checks; PYTEST_ARGS=tests/tfprivacy_ft/test_models.py runs some tests only
# make bench   the benchmarks
# make mutants breaks one line at a time, and lists what no test noticed
# make clean   removes what was built; runs/ with its ledgers stays
#
# The first call makes .venv with the pinned versions (Python 3.11), and so does one after requirements/ has changed.

SHELL := bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := test

is_311 = import sys; sys.exit(sys.version_info[:2] != (3, 11))
ifeq ($(origin PYTHON),undefined)
# The first of the two that is a Python 3.11; else python3, for the sentence that refuses it to name.
PYTHON := $(shell for p in python3.11 python3; do $$p -c '$(is_311)' 2>/dev/null && echo $$p && exit; done; echo python3)
endif
PYTEST_ARGS ?=

bin := .venv/bin
locks := requirements/federated.txt requirements/dev.txt
stamp := .venv/installed
pip := $(bin)/python -m pip --disable-pip-version-check --no-input

.PHONY: demo test bench mutants clean

demo: $(stamp)
	@$(bin)/tfprivacy-ft demo

# The main run of pytest comes last: its summary is the last line.
test: $(stamp)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
ifneq ($(wildcard notebooks/*.ipynb),)
ifeq ($(PYTEST_ARGS),)
	$(bin)/python -m pytest --nbmake --nbmake-timeout=600 notebooks
endif
endif
	$(bin)/python -m pytest $(PYTEST_ARGS)

bench: $(stamp)
	@for script in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(bin)/python $$script; done

mutants: $(stamp)
	@$(bin)/python tests/mutants.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tfprivacy_ft federated tests benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was cut short starts over; --clear leaves nothing of an older lock.
$(stamp): $(locks) setup.cfg
	@$(PYTHON) -c '$(is_311)' 2>/dev/null || { \
	  found=$$($(PYTHON) -V 2>/dev/null || echo "not there"); \
	  echo "The pinned versions need Python 3.11 and $(PYTHON) is $$found: give one," \
	    "as in 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@echo "Making .venv with the pinned versions; this takes a few minutes."
	@$(PYTHON) -m venv --clear .venv
	@total=$$(cat $(locks) | grep -c ==); \
	$(pip) install --no-deps $(addprefix -r ,$(locks)) | awk -v total=$$total \
	  '/^(Collecting|Processing)/ { if (++n % 10 == 0) { print "  fetched " n " of " total " packages"; fflush() } } \
	   /^Installing/ { print "  installing them"; fflush() }'
	@$(pip) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo ".venv is ready."
