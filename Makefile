# `make demo` and `make test` need nothing but Python 3.11: each makes its own environment first.
#   PYTHON=…   the interpreter to build it from            EXTRAS=gpu,test   for a machine with a GPU
#   ARGS=…     more arguments for pytest (make test)          WORKERS=…   processes that test (2; one with ARGS)
#   CONSTRAINTS=…   the versions to install; with another file take another folder too: VENV=…

VENV := .venv
EXTRAS := cpu,test
PYTHON ?=
ARGS :=
# Chosen tests run in one process, where --pdb and -s work as everybody knows them.
WORKERS := $(if $(ARGS),0,2)
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin

DEMO_OUTPUT := out
DEMO = $(BIN)/uso-engine generate --config uso-tiny \
	--prompt "the mushroom in front of rolling hills, as a stained glass window" \
	--image $(DEMO_OUTPUT)/content.png --image $(DEMO_OUTPUT)/style.png --seed 7 --num-images 2 \
	--output $(DEMO_OUTPUT)/demo.png --contact-sheet $(DEMO_OUTPUT)/sheet.png

# A GPU machine's packages and nothing else, of Python 3.12 as there: PyTorch is the CUDA build, several GB.
REHEARSAL := .rehearsal
REHEARSAL_PYTHON := $(if $(PYTHON),$(PYTHON),python3.12)
REHEARSAL_READY := $(REHEARSAL)/.ready-$(shell (pwd; echo "$(PYTHON)"; cat benchmarks/gpu/rehearsal.txt) | cksum | tr ' ' '-')

# An environment whose interpreter is gone (moved, upgraded) is no environment.
ifneq ($(wildcard $(VENV)),)
$(shell $(BIN)/python -c '' 2>/dev/null || rm -f $(VENV)/.base $(VENV)/.ready-*)
endif

# Contents, not dates, decide whether it is up to date: a checkout changes dates. The folder counts, since an environment
# holds absolute paths.
READY := $(VENV)/.ready-$(shell (pwd; echo "$(PYTHON) $(EXTRAS)"; cat pyproject.toml $(CONSTRAINTS)) | cksum | tr ' ' '-')

.DEFAULT_GOAL := help
.PHONY: help demo test lint format environment rehearse-gpu clean

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

demo: $(READY) ## generate a picture with the embedded model into out/
	@$(BIN)/python -m uso_engine.evaluation.demo_pictures $(DEMO_OUTPUT)
	$(DEMO)

test: $(READY) ## run the tests that need no GPU and no downloaded weights
	$(BIN)/python -m pytest --durations=10 -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY) ## ruff's rules, ruff's format, mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## let ruff format the code and fix what it safely can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

environment: $(READY) ## make or renew .venv only

rehearse-gpu: $(REHEARSAL_READY) ## run both GPU campaigns at tiny size on this CPU, in an environment of a GPU machine's packages
	PYTHON=$(REHEARSAL)/bin/python benchmarks/gpu/wheels.sh
	PYTHON=$(CURDIR)/$(REHEARSAL)/bin/python benchmarks/gpu/first.sh out/gpu tiny
	PYTHON=$(CURDIR)/$(REHEARSAL)/bin/python benchmarks/gpu/second.sh out/gpu tiny

clean: ## remove the environment, caches and build outputs (out/ stays)
	rm -rf $(VENV) $(REHEARSAL) .whl dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .base is written last and removed first: what an interrupted installation left behind is thrown away, and a complete
# environment is brought up to date in place. Nothing is built in isolation, so that $(CONSTRAINTS) pins the build, too.
$(READY):
	@set -e; \
	set -- $(if $(PYTHON),"$(PYTHON)",python3.11 python3 python3.12 python3.13 python); \
	python=; \
	for candidate; do \
		if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
		then python=$$candidate; break; fi; \
	done; \
	if test -z "$$python"; then \
		echo "uso-engine needs Python 3.11 or newer with its venv and ensurepip modules (on Debian: the package python3-venv)." >&2; \
		echo "None of these will do; name another one with 'make PYTHON=/path/to/python …':" >&2; \
		for candidate; do echo "  $$candidate: $$("$$candidate" --version 2>&1 | tail -n 1)" >&2; done; \
		exit 1; \
	fi; \
	base="$$(pwd) $(EXTRAS) $$("$$python" --version)"; \
	if test "$$(cat $(VENV)/.base 2>/dev/null)" != "$$base"; then \
		echo "Making $(VENV) with $$("$$python" --version); this downloads and unpacks about 2 GB, once."; \
		"$$python" -m venv --clear $(VENV); \
	fi; \
	rm -f $(VENV)/.base $(VENV)/.ready-*; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c $(CONSTRAINTS) torch hatchling; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c $(CONSTRAINTS) \
		--no-build-isolation --editable '.[$(EXTRAS)]'; \
	printf '%s' "$$base" > $(VENV)/.base; \
	touch $@

$(REHEARSAL_READY):
	rm -rf $(REHEARSAL)
	$(REHEARSAL_PYTHON) -m venv $(REHEARSAL)
	$(REHEARSAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r benchmarks/gpu/rehearsal.txt
	touch $@
