# What works on a fresh clone: `make train`, `make test`. Variables, for example
#   make train PYTHON=python3.12 TENSORFLOW=tensorflow TRAIN="compare lenet --seeds 3"
# PYTHON and TENSORFLOW matter when .venv is made; `make distclean` removes it.

PYTHON ?= python3
TENSORFLOW ?= tensorflow-cpu
TRAIN ?= compare lenet
TEST ?= -m "not slow"
KERAS_TESTS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-slow race-check sanitize keras-tests matrix lint format docs build \
	wheel clean distclean

BIN := .venv/bin
SCHEMA := $(BIN)/check-jsonschema --builtin-schema vendor
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What the documentation names, besides its own pages.
NAMED := LICENSE CITATION.cff keras_dfp/recipe.py pyx/microkernels/microkernel.h
# Python files need no rebuild: the installation is editable.
NATIVE := $(shell find pyx -type f)

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{printf "  %-16s%s\n", $$1, $$2}'

train: build/train.stamp build/native.stamp  ## Train a CNN on handwritten digits, float32 against dfp16
	$(BIN)/keras-dfp $(TRAIN)

test: build/dev.stamp build/native.stamp  ## Run the tests (but those marked slow)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(TEST)

test-slow: build/dev.stamp build/native.stamp  ## Run the tests marked slow
	$(BIN)/python -m pytest -m slow

race-check: build/dev.stamp  ## Look for data races (needs clang and its OpenMP)
	$(BIN)/python tests/race_check.py

sanitize: build/dev.stamp  ## Look for memory and arithmetic errors (needs clang)
	$(BIN)/python tests/sanitize.py

keras-tests: build/dev.stamp build/native.stamp  ## Run Keras's own tests with the plugin in place (half an hour)
	$(BIN)/python tests/keras_tests.py $(KERAS_TESTS)

matrix: build/dev.stamp  ## Test other TensorFlows, Kerases and Pythons: noxfile.py (an hour)
	$(BIN)/nox

lint: build/dev.stamp  ## Check style and types: ruff, cython-lint, mypy; GitHub's files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint pyx
	$(BIN)/mypy
	$(SCHEMA).citation-file-format CITATION.cff
	$(SCHEMA).github-workflows .github/workflows/*.yml
	$(SCHEMA).github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(SCHEMA).github-issue-config .github/ISSUE_TEMPLATE/config.yml

format: build/dev.stamp  ## Bring Python files into ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: build/dev.stamp  ## Build the documentation's site: build/site/index.html
	rm -rf build/pages build/site
	mkdir -p build/pages $(addprefix build/pages/,$(sort $(dir $(NAMED))))
	for path in README.md CHANGELOG.md CONTRIBUTING.md docs examples $(NAMED); do \
		ln -s "$(CURDIR)/$$path" build/pages/$$path || exit; done
	$(BIN)/mkdocs build

build: build/dev.stamp build/native.stamp  ## Make .venv with all that development needs, build the native core

wheel: build/dev.stamp  ## Build a manylinux wheel and an sdist into dist/; test the wheel without a compiler
	rm -rf build/wheel dist
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --strip --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(BIN)/python tests/check_wheel.py dist/*.whl

clean:  ## Remove what was built
	rm -rf build dist *.egg-info keras_dfp/_native.*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too
	rm -rf .venv

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "keras-dfp needs Python 3.11 or later: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) pyx/check_compiler.py
	$(PYTHON) -m venv .venv

build/train.stamp: .venv/pyvenv.cfg pyproject.toml setup.py
	$(INSTALL) 'setuptools>=77' 'cython>=3.1' $(TENSORFLOW)
	$(INSTALL) --no-build-isolation --editable '.[train]'
	@mkdir -p build && touch $@

build/dev.stamp: build/train.stamp
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

build/native.stamp: build/train.stamp $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
