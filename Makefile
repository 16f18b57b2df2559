# make demo    a private model on bundled data, and its epsilon
# make test    lint, types, notebooks and tests; PYTEST_ARGS=tests/tfprivacy_ft/test_models.py runs some tests only
# make test-current the same tests on the current stack, Python 3.12 or newer with Keras 3, in .venv-current
# make check   everything the CI checks: both of these, side by side
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

is_312 = import sys; sys.exit(sys.version_info[:2] != (3, 12))
ifeq ($(origin PYTHON_CURRENT),undefined)
# A Python 3.12; under pyenv its command answers only when a version of it is chosen.
PYTHON_CURRENT := $(shell for p in python3.12 "$$HOME"/.pyenv/versions/3.12.*/bin/python; do $$p -c '$(is_312)' 2>/dev/null && echo $$p && exit; done; echo python3.12)
endif
stamp_current := .venv-current/installed
need_312 = $(PYTHON_CURRENT) -c '$(is_312)' 2>/dev/null || { echo "The current stack needs Python 3.12, and $(PYTHON_CURRENT) is $$($(PYTHON_CURRENT) -V 2>/dev/null || echo "not there"): give one, as in 'make PYTHON_CURRENT=/path/to/python3.12 test-current'." >&2; exit 1; }

.PHONY: demo test test-current check bench mutants clean

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

test-current: $(stamp_current)
	.venv-current/bin/python -m pytest $(or $(PYTEST_ARGS),tests/tfprivacy_ft tests/federated tfprivacy_ft federated)

# Side by side, since one leaves a core idle for long stretches; the current stack's lines are shown when it has ended.
# That stack, which has fewer tests, is installed beside the first ones of the other.
check: $(stamp)
	@[ -e $(stamp_current) ] || $(need_312)
	@log=$$(mktemp); $(MAKE) --no-print-directory test-current >"$$log" 2>&1 & current=$$!; \
	federated=0; $(MAKE) --no-print-directory test || federated=$$?; \
	status=0; wait $$current || status=$$?; \
	echo "== Python 3.12, TensorFlow 2.21, Keras 3"; cat "$$log"; rm -f "$$log"; \
	exit $$((federated || status))

bench: $(stamp)
	@for script in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(bin)/python $$script; done

mutants: $(stamp)
	@$(bin)/python tests/mutants.py

clean:
	rm -rf .venv .venv-current benchmarks/.peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tfprivacy_ft federated tests benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was cut short starts over; --clear leaves nothing of an older lock.
# Nothing is compiled that is not imported: half of it.
$(stamp): $(locks) setup.cfg
	@$(PYTHON) -c '$(is_311)' 2>/dev/null || { \
	  found=$$($(PYTHON) -V 2>/dev/null || echo "not there"); \
	  echo "The pinned versions need Python 3.11 and $(PYTHON) is $$found: give one," \
	    "as in 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@echo "Making .venv with the pinned versions; this takes a few minutes."
	@$(PYTHON) -m venv --clear .venv
	@total=$$(cat $(locks) | grep -c ==); \
	$(pip) install --no-compile --no-deps $(addprefix -r ,$(locks)) | awk -v total=$$total \
	  '/^(Collecting|Processing)/ { if (++n % 10 == 0) { print "  fetched " n " of " total " packages"; fflush() } } \
	   /^Installing/ { print "  installing them"; fflush() }'
	@$(pip) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo ".venv is ready."

$(stamp_current): requirements/current.txt setup.cfg
	@$(need_312)
	@echo "Making .venv-current with the pinned versions; this takes a few minutes."
	@$(PYTHON_CURRENT) -m venv --clear .venv-current
	@.venv-current/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-compile --no-deps -r requirements/current.txt
	@.venv-current/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo ".venv-current is ready."
