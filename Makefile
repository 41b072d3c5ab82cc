# The two commands of the README are `make demo` and `make test`; both set everything up on first use.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint install cards bench-speed bench-fashion-mnist bench-coverage bench-structural-speed bench-efficientnet bench-minilm clean

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

bench-structural-speed: $(INSTALLED)
	$(BIN)/python benchmarks/structural_speed.py

bench-fashion-mnist: $(INSTALLED)
	$(BIN)/python benchmarks/fashion_mnist.py --jobs 2

# The models' packages are of no use to the library itself, and are installed without what they depend on.
bench-coverage: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps torchvision==0.28.0 timm==1.0.31 transformers==5.23.0 \
	  huggingface_hub tokenizers regex tqdm click hf-xet httpx2 httpcore2 h11 anyio sniffio certifi idna truststore
	$(BIN)/python benchmarks/coverage.py --jobs 2 --onnx

# Needs packages that the benchmark's first lines name. Large buffers are kept instead of being mapped anew each time.
bench-efficientnet: $(INSTALLED)
	OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 $(BIN)/python benchmarks/efficientnet.py

# About an hour; needs packages that the benchmark's first lines name. Nothing is downloaded while it runs.
bench-minilm: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/minilm.py

clean:
	rm -rf .venv build dist secateur-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
