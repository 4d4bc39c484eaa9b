# Everything runs in a virtual environment of its own, made on the first use.
#   make install PYTHON=python3.12            another interpreter
#   make install TORCH=torch==2.12.1          another torch; PIP_INDEX_URL and its kin choose where it comes from
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?=
# Tests at a time. Each starts processes of its own; one thread each, since threads that wait for a core spin.
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Programs that are started by name (deepspeed, dlm) come from the environment.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help install demo test test-resume test-faults test-gpu test-slurm check clean
.DELETE_ON_ERROR:

help:
	@echo 'make install      make $(VENV) and install this project and its tests into it'
	@echo 'make demo         the main job on real text, on this machine (a few minutes)'
	@echo 'make test         all tests that need no GPU'
	@echo 'make test-resume  the whole resume matrix and the other long tests of several ranks (about an hour)'
	@echo 'make test-faults  the fault campaign: 204 kills, full disks, damaged files (20 minutes to an hour); ends with a report'
	@echo 'make test-gpu     the tests that need a CUDA device'
	@echo 'make test-slurm   runs on a SLURM cluster of two nodes that it brings up here; needs root and, on Debian and Ubuntu,'
	@echo '                  apt install slurm-wlm munge iproute2 openssh-server pdsh'
	@echo 'make check        ruff, ruff format and mypy'
	@echo 'make clean        remove $(VENV) and caches; runs stay'

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: $(PYTHON) is missing or older than 3.11; name another: make install PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	test -x '$(BIN)/pip' || $(PYTHON) -m venv '$(VENV)'
	# torch first: the packages after it then find the build that is wanted here.
	'$(BIN)/pip' install '$(TORCH)'
	grep -v '^torch==' constraints.txt > '$(VENV)/constraints.txt'
	DS_BUILD_OPS=0 '$(BIN)/pip' install -c '$(VENV)/constraints.txt' -e '.[test]'
	touch '$@'

demo: install
	$(RUN) python -m launcher.demo

test: install
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n $(WORKERS) --dist loadfile -m 'not gpu and not slow and not slurm' $(PYTEST_ARGS)

test-resume: install
	$(RUN) python -m pytest -m 'not gpu' tests/distributed $(PYTEST_ARGS)

test-faults: install
	$(RUN) python -m pytest -m faults tests/faults $(PYTEST_ARGS)

test-gpu: install
	$(RUN) python -m pytest -m gpu $(PYTEST_ARGS)

test-slurm: install
	$(RUN) python -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

check: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

clean:
	rm -rf '$(VENV)' build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
