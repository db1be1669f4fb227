# `make demo` and `make test` are all that most people need; `make` alone lists the rest.

PYTHON ?= python3
VENV ?= .venv
# Any build of this version will do; options of pip may follow, such as the --index-url of the CPU builds.
TORCH ?= torch==2.13.0
# A second reader of exported GGUF files, which is compiled when it is installed.
LLAMA_CPP ?= llama-cpp-python==0.3.36
# A reader of exported adapters; without dependencies, because it wants another transformers.
MLX_LM ?= mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Keyed on content, not on time: a fresh checkout of the same lock finds its set-up done.
KEY := $(shell cat Makefile pyproject.toml requirements.lock requirements-dev.lock | cksum | cut -d ' ' -f 1)
READY := $(VENV)/ready-$(KEY)
READY_DEV := $(VENV)/ready-dev-$(KEY)

.PHONY: help setup setup-dev demo test check catalogue docs corpus parity peft-suite export-check study study-quick bench bench-quick bench-serve gpu lock clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

setup: $(READY)  ## create .venv and install lorasmith from the lock
setup-dev: $(READY_DEV)  ## the same, with what the tests and checks need

demo: setup  ## train, compare and show an adapter on real conversations; options: ARGS='--json'
	$(BIN)/lorasmith demo $(ARGS)

test: setup-dev  ## all tests, then the checks; options of pytest: ARGS='-k lora'
	$(BIN)/python -m pytest -m 'not gpu' $(or $(ARGS),--every-error)
	$(MAKE) --no-print-directory check

check: setup-dev  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

catalogue: setup-dev  ## texts of the code into the Chinese catalogue; lists what has no translation
	$(BIN)/python -m tools.catalogue

docs: setup-dev  ## the pages of docs that are made from the code
	$(BIN)/python -m tools.errors_page
	$(BIN)/python -m tools.options_page
	$(BIN)/python -m tools.formats_page
	$(BIN)/python -m tools.quality_page

corpus: setup-dev  ## try the chat templates that people use, and write docs/compatibility.md; more of them: ARGS='CHECKOUT ...'
	$(BIN)/python -m tests.data.corpus --download build/corpus --pages docs $(ARGS)

peft-suite: setup-dev  ## PEFT's own tests about LoRA on lorasmith.peft, beside PEFT itself: half an hour; one kind: ARGS='-k dora'
	$(BIN)/python -m tools.peft_suite --page docs/peft.md docs/peft.zh.md $(ARGS)

parity: setup-dev  ## every model family on a tiny model, beside PEFT, and write docs/families.md: 10 minutes; some: ARGS='llama mamba'
	$(BIN)/python -m tests.model.parity --pages docs $(ARGS)

export-check: setup-dev  ## exports read by llama.cpp, which is compiled first, and mlx-lm: ten minutes
	$(PIP) install --quiet $(LLAMA_CPP)
	$(PIP) install --quiet --no-deps $(MLX_LM)
	$(BIN)/python -m pytest -q tests/export tests/cli/test_export.py
	$(BIN)/python -m tests.export.figures

study: setup-dev  ## the studies of docs/quality.md: hours; interrupted, it goes on where it was
	$(call studies,conversations addresses addresses-batches addresses-layers addresses-long reviews reviews-layers)

study-quick: setup-dev  ## the same in minutes: fewer values, steps and held-out rows
	$(call studies,quick-conversations quick-addresses quick-reviews)

# Each study of the list, then the pages of their results.
define studies
	$(BIN)/python -m tools.study_data
	@set -e; for name in $(1); do $(BIN)/lorasmith study studies/$$name.toml $(ARGS); done
	$(BIN)/python -m tools.quality_page --collect
endef

bench: setup-dev  ## beside PEFT with Trainer, alone on the machine, 45 minutes at most; some sections: ARGS='--only training'
	$(BIN)/python -m bench $(ARGS)

bench-quick: setup-dev  ## the same in five minutes: one round, fewer rows, settings and sections
	$(BIN)/python -m bench --quick $(ARGS)

bench-serve: setup-dev  ## serving 100 adapters, beside PEFT and transformers, and under load: 25 minutes, alone on the machine
	$(BIN)/python -m bench.serving $(ARGS)

gpu: setup-dev  ## the tests that need a GPU
	@if ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then \
	  echo 'torch finds no GPU here, so no test was run.'; \
	else \
	  $(BIN)/python -m pytest -m gpu -n 0 $(ARGS) || { \
	    status=$$?; test $$status -eq 5 && echo 'No test that needs a GPU was found, so none was run.'; }; \
	fi

clean:  ## remove .venv and everything built; runs/ and the user's cache stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up -----------------------------------------------------------------------------------------------------------

NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "lorasmith needs Python 3.11 or newer; $(1) is $$($(1) --version 2>&1). $(2)"; exit 2; }

# Without ensurepip (Debian's python3 without python3-venv) the environment starts empty; pip comes below.
$(BIN)/python:
	@$(PYTHON) $(call NEW_ENOUGH,$(PYTHON),Name another one: make PYTHON=python3.12)
	@echo 'Creating $(VENV)'
	@$(PYTHON) -m venv $$($(PYTHON) -c 'import ensurepip' 2>/dev/null || echo --without-pip) $(VENV)

# torch stands outside the hashed lock, because which build is right depends on the machine; all that it needs is inside,
# so its own line brings torch alone (and the CUDA libraries, where pip chooses a CUDA build).
define install
	@$(BIN)/python $(call NEW_ENOUGH,$(BIN)/python,Remove $(VENV) and name another one: make PYTHON=python3.12)
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 \
	  || $(PYTHON) -m pip --python $(BIN)/python install pip || uv pip install --python $(BIN)/python pip
	@echo 'Installing $(1) (up to 180 MB to fetch) and $(firstword $(TORCH)) (200 MB, with CUDA about 3 GB)'
	@$(PIP) install --quiet --require-hashes --no-deps -r $(1)
	@$(PIP) install --quiet $(TORCH)
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/ready-*
endef

$(READY): | $(BIN)/python
	$(call install,requirements.lock)
	@touch $(READY)

# The development lock holds everything of the other one, so it makes both ready.
$(READY_DEV): | $(BIN)/python
	$(call install,requirements-dev.lock)
	@touch $(READY) $(READY_DEV)

# --- the locks --------------------------------------------------------------------------------------------------------

COMPILE = build/lock/bin/pip-compile --quiet --strip-extras --generate-hashes --unsafe-package torch --no-header \
  --no-emit-index-url --no-emit-find-links --no-emit-options --annotation-style line --build-deps-for editable \
  --constraint build/torch.txt pyproject.toml

# Made with the oldest Python that is supported. Options of pip-compile: ARGS=--upgrade
lock:  ## choose and hash every version again (Python 3.11 only)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo 'make lock PYTHON=python3.11'; exit 2; }
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet pip-tools==7.6.2
	echo '$(firstword $(TORCH))' > build/torch.txt
	$(COMPILE) $(ARGS) --extra data --extra report --extra eval --extra serve -o requirements.lock
	$(COMPILE) $(ARGS) --extra dev --constraint requirements.lock -o requirements-dev.lock
	for lock in requirements.lock requirements-dev.lock; do \
	  sed '/^# WARNING/,$$d' $$lock > build/lock.txt && mv build/lock.txt $$lock; \
	done
