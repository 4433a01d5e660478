# make repro          set everything up and run the pipeline
# make test           set everything up and run the tests; make quick: those that start no process; make slow: the long ones
# make install-cuda   the environment of a machine with an NVIDIA GPU, instead of that of `make install`
# make weights        trained encoders of the pocket, mini's readouts and data/; make publish-weights: keeps new ones
# make release-check  whether lock, reports, README and guide belong to this code
# make gpu            one hour on a GPU, after `make install-cuda`; without a network, where torch, numpy and wheels/ are (`make wheels`)
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder
# A test that waits in C, or while it cleans up, outlives its own time limit: its process ends, and the test is named.
STUCK = -o faulthandler_timeout=1300 -o faulthandler_exit_on_timeout=true

# The environment keeps the lock that it was made with: a later `make test` does not put torch for CPUs over that for GPUs.
LOCK = $(shell cat .venv/lock 2> /dev/null || echo requirements.lock)

.PHONY: install install-cuda repro ahead weights publish-weights test quick slow release-check lint wheels gpu measured-on-gpu

install: .venv/installed

.venv/installed: $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is needed; say which: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c $(LOCK) -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # on every core, pip has one; some packages bring files of a later Python
	echo $(LOCK) > .venv/lock
	touch .venv/installed

install-cuda:
	rm -f .venv/installed
	$(MAKE) --no-print-directory install LOCK=requirements-cuda.lock

repro: install
	dvc status --quiet || { $(MAKE) --no-print-directory ahead && dvc repro; }
	scaling4d table

# From and to the DVC remote `weights`, a folder of the repository: encoders and mini's readouts, at most 12 MB.
WEIGHTS := pretrain $(foreach task,actions boxes depth points pose,readout_frozen@mini-$(task))

weights: install
	dvc pull -r weights $(WEIGHTS)
	dvc repro -q data.dvc

publish-weights: install
	rm -rf reports/weights && dvc push -r weights $(WEIGHTS)

JOBS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')

ahead:
	python -m scaling4d.pipeline.parallel_repro "$(JOBS)"

test: install
	ruff check . && ruff format --check .
	python -m pytest $(PARALLEL) $(STUCK)

# Tests that start no other process and take under half a second each.
quick: install
	python -m pytest $(PARALLEL) --no-processes -m "not integration and not slow and not gpu and not release"

# Tests that take long: further ways to the same mechanism, and benches with real times.
slow: install
	python -m pytest $(PARALLEL) -m slow

# What must hold when results are published: lock and reports of this code, a clean audit, numbers of README and guide.
release-check: install
	python -m pytest -m release tests/test_release.py

lint: install
	ruff check --fix . && ruff format .

# For another Python than this one: make wheels GPU_PYTHON=3.12
GPU_PYTHON ?= $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
GLIBC := 2014 1 2_17 2_24 2_26 2_27 2_28 2_31

wheels: install
	mkdir -p wheels
	grep -vE '^(#|(torch|torchvision|numpy)==|nvidia|cuda|triton)' requirements-cuda.lock > wheels/list.txt
	pip wheel -q --no-deps -w wheels $$(grep antlr4 wheels/list.txt)
	grep -v antlr4 wheels/list.txt | xargs pip download -q --no-deps --only-binary=:all: -d wheels --python-version $(GPU_PYTHON) \
		$(foreach glibc,$(GLIBC),--platform manylinux$(if $(findstring _,$(glibc)),_)$(glibc)_x86_64)

gpu:
	@$(PYTHON) -c 'import torch' 2> /dev/null || { echo "$(PYTHON) has no torch; run make install-cuda" >&2; exit 1; }
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(MAKE) measured-on-gpu; \
	else echo "no CUDA device: GPU tests and benches are skipped, and nothing is claimed of any GPU"; fi

measured-on-gpu: export PYTHONPATH := src:.gpu
measured-on-gpu: $(if $(wildcard .venv/installed),,.gpu/installed)
	$(PYTHON) -m scaling4d bench gpu

wheels/list.txt:
	@echo "no wheels/list.txt; run make install-cuda or, where there is no network, make wheels on a machine that has one" >&2; exit 1

.gpu/installed: wheels/list.txt
	rm -rf .gpu
	$(PYTHON) -m pip install -q --no-index --no-deps --target .gpu wheels/*.whl
	touch .gpu/installed
