# Everything runs in .venv, which is made when missing and updated when what it is made from changes.
#   make setup | demo | demo-long | serve | test | test-fast | test-thorough | lint | docs | bench | clean        PYTHON=python3.12 make setup: another interpreter
PYTHON ?= python3
EXTRAS ?= cpu,serve,train,lora,ray,milvus,export,bench,dev,docs
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads spin for a moment, then sleep: see training/dqe_training/cli/runner.py.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 10000

.PHONY: setup demo demo-long serve test test-fast test-thorough lint docs bench clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard cpp_ext/*.* cpp_ext/cuda/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)
	$(BIN)/dqe-demo --out demo

demo-long: $(STAMP)
	$(BIN)/dqe-demo --long --out demo-long

# What `make demo` made, else the sample that ships with the package; SERVE='--port 9000' adds options. Where there is no environment yet,
# one is made with what serving needs alone; the whole one, where it is there, is kept up to date as everywhere.
SERVING := $(VENV)/.installed-serving
SERVED = $(if $(wildcard demo/index/manifest.json),demo/bundle demo/index --images demo/garments/images,--sample)

serve: $(if $(wildcard $(STAMP)),$(STAMP),$(SERVING))
	$(BIN)/dqe-serve $(SERVED) $(SERVE)

$(SERVING): pyproject.toml constraints.txt $(wildcard cpp_ext/*.* cpp_ext/cuda/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,serve]'
	touch $@

# A worker per processor, each with one thread: tests/conftest.py says how many. Whoever is idle takes tests from the others.
# Bytecode is kept, whatever the environment says: tests start some hundred processes that import the packages.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: $(STAMP)
	$(PYTEST)

# Without what is marked slow, which `make test` runs too.
test-fast: $(STAMP)
	$(PYTEST) -m "not slow"

# More random cases, and whole grids where `make test` covers every pair of values; nothing that an earlier run kept. An hour.
test-thorough: $(STAMP)
	DQE_THOROUGH=1 DQE_TESTS_KEEP=0 $(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import_linter
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'cpp_ext/*.hpp' 'cpp_ext/*.cpp' 'cpp_ext/*.cu' 'cpp_ext/*.cuh')

# The documentation as a site: build/site/index.html; searching needs a server, such as `python3 -m http.server -d build/site`. A warning
# is an error, and so is a link that leads nowhere.
docs: $(STAMP)
	$(BIN)/python -m docs.site build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file build/pages/mkdocs.yml --site-dir $(CURDIR)/build/site
	$(BIN)/python -m docs.site.check build/site

# Peers are measured as everybody has them.
DEFAULTS := env -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT

# Under 20 minutes on two idle cores, without the demo, which is made when it is missing; benchmarks/README.md has the longer runs.
bench: $(STAMP) demo/bundle
	$(DEFAULTS) $(BIN)/python -m benchmarks.latency
	$(DEFAULTS) $(BIN)/python -m benchmarks.recall
	$(DEFAULTS) $(BIN)/python -m benchmarks.bench_zones --short
	$(BIN)/python -m benchmarks.page

demo/bundle: | $(STAMP)
	$(BIN)/dqe-demo --out demo

# Build outputs and caches; the environment and what the demo wrote stay.
clean:
	rm -rf build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
