# The two commands of the README are `make demo` and `make test`; both set everything up on first use.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint install cards bench-speed bench-fashion-mnist clean

demo: $(INSTALLED)
	$(BIN)/secateur demo

# Two workers of one thread each: torch's own threads would fight over the same two cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "secateur needs Python >= 3.11; name one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Method cards, generated from the docstrings.
cards: $(INSTALLED)
	$(BIN)/python -m secateur.cli.cards docs/methods

# Minutes to an hour; results are committed under benchmarks/results.
bench-speed: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py

bench-fashion-mnist: $(INSTALLED)
	$(BIN)/python benchmarks/fashion_mnist.py --jobs 2

clean:
	rm -rf .venv build dist secateur-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
