# Two commands on a fresh machine: `make demo` runs the whole pipeline, `make test` lint, types and all tests but the slow.
# Both set up .venv by themselves; constraints.txt pins every package for development and CI.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUT ?= demo-run
TEXT ?=
# Tests wait for servers and other processes: a worker more than two cores have.
WORKERS ?= 3
# Compiled modules are kept: else every process of a test compiles the packages again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test tests coverage test-slow test-ceph test-slurm test-browser test-transformers-4 test-vllm soak planted-bugs bench docs lint clean

demo: $(READY)
	$(BIN)/logit-cache demo --out "$(OUT)" $(foreach text,$(TEXT),--text "$(text)")

# Lint and types beside the tests: of two cores, some of one is idle.
test: $(READY)
	$(MAKE) --no-print-directory -j2 lint tests

tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

# Plants bugs one by one in a copy: each is found by the test that stands beside it in the list.
planted-bugs: $(READY)
	$(BIN)/python tests/support/programs/planted_bugs.py

# Lines and branches that the default tests run, by package. Two tests forbid large files, which coverage writes too.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) \
		--deselect tests/logit_cache/caching/test_cache_logits.py::test_a_full_disk \
		--deselect tests/logit_cache/corpus/test_tokenize_errors.py::test_a_full_temporary_folder_is_one_line
	$(BIN)/coverage combine --quiet
	for package in storage teachers student logit_cache; do echo "$$package"; $(BIN)/coverage report --include "$$package/*" | tail -1; done

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m slow

# Kills, flipped bits and interleavings of engines, in the numbers that docs/reliability.md states: before a release. The
# other targets have the same tests with as few as still find each kind of fault.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -rP -m "soak and not ceph"
	$(call on_ceph,ceph and soak)

# Some tests on a real S3 server, which is stopped again however they end (CEPH_DIR, CEPH_PORT: see the script).
define on_ceph
tests/support/scripts/ceph_rgw.sh install
bash -c 'trap "tests/support/scripts/ceph_rgw.sh stop" EXIT; tests/support/scripts/ceph_rgw.sh start && OMP_NUM_THREADS=1 $(BIN)/pytest -rP -m "$(1)"'
endef

test-ceph: $(READY)
	$(call on_ceph,ceph and not soak)

# The tests on a real Slurm cluster, which is stopped again however they end (SLURM_DIR, SLURM_PORT: see the script).
test-slurm: $(READY)
	tests/support/scripts/slurm.sh install
	bash -c 'trap "tests/support/scripts/slurm.sh stop" EXIT; tests/support/scripts/slurm.sh start && OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm'

# The tests in a real browser (CHROMIUM_DIR: see the script).
test-browser: $(READY)
	tests/support/scripts/chromium.sh install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser

# What we save, read by transformers 4.57 (TRANSFORMERS_4_DIR: see the script).
test-transformers-4: $(READY)
	tests/support/scripts/transformers_4.sh install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m transformers4

# Served teachers against a real vLLM on the CPU (VLLM_DIR: see the script): 3 GB, and so no part of .ci/run. Its figures
# are in docs/served-teachers.md.
test-vllm: $(READY)
	tests/support/scripts/vllm.sh install
	OMP_NUM_THREADS=1 $(BIN)/pytest -rP -m vllm

# Rewrites docs/benchmarks.md; takes up to half an hour, and wants a machine that does nothing else.
bench: $(READY)
	$(BIN)/python tests/benchmarks/run.py

# Writes docs/format.md from the specification in storage/format/__init__.py.
docs: $(READY)
	$(BIN)/python tests/support/programs/format_page.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv demo-run
