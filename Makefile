# make quickstart | test | test-all | check | format | bench | install | clean

VENV ?= .venv
# Where pip finds torch builds without CUDA; on a machine with an NVIDIA GPU pip's own index has the right ones.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest versions that the bounds allow, over the environment where they differ.
OLDEST := $(abspath $(VENV))/oldest
# One thread per test process: two processes with all cores each are slower than one. A process that is done takes from the other: the
# slowest tests stand together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# What runs with the oldest versions too: all that uses them.
OLDEST_TESTS := tests/unit/hf tests/unit/config tests/unit/data/test_data_tokenizers.py \
	tests/unit/data/test_data_tokenize.py::test_shards_are_stock_webdataset tests/unit/test_requirements.py \
	tests/integration/test_hf_export.py

.PHONY: quickstart install test test-oldest test-all check types format bench clean

quickstart: install  ## raw text to a trained, exported, generating model, in a few minutes; TEXT=my.txt learns from that
	@$(BIN)/python scripts/quickstart.py $(if $(TEXT),--text $(TEXT)) $(if $(VOCAB_SIZE),--vocab-size $(VOCAB_SIZE))

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --no-deps -c constraints.txt \
		$(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(OLDEST)/.installed: $(STAMP) requirements-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/pip install --disable-pip-version-check --no-deps --target $(OLDEST) -r requirements-oldest.txt
	@touch $@

test: install test-oldest  ## all that matters, without a GPU
	TESTED_WITH=constraints.txt $(PYTEST) -m "not slow and not gpu"

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) TESTED_WITH=requirements-oldest.txt $(PYTEST) -m "not slow" $(OLDEST_TESTS)

# Of the extras, which only slow tests run: trl, peft, accelerate, lm-eval.
$(VENV)/.installed-extras: $(STAMP)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev,downstream,evaluation]'
	@touch $@

test-all: $(VENV)/.installed-extras test-oldest
	TESTED_WITH=constraints.txt $(PYTEST)

check: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# A type checker does not follow the import mapping of an editable install: show it the installed layout, made of links.
types: install
	@rm -rf build/types && mkdir -p build/types/titans_pretrain
	@for path in titans_pretrain/* kernels data_prep; do ln -s "$(CURDIR)/$$path" build/types/titans_pretrain/; done
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --summary=none

format: install  ## what `make check` would complain about, as far as a program can mend it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.memory_scan_cpu
	$(BIN)/python -m benchmarks.train_step_cpu
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.parallel
	$(BIN)/python -m benchmarks.long_context
	$(BIN)/python -m benchmarks.generation

clean:
	rm -rf $(VENV) build quickstart-run .pytest_cache .ruff_cache .hypothesis *.egg-info
