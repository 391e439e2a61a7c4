# Every target sets up .venv, or VENV, first, where pyproject.toml or the pinned versions changed. `make` alone lists the targets.

CONF ?= conf/experiment/shapes.yaml
VENV ?= .venv
PY := $(VENV)/bin/python
SETUP := $(VENV)/.setup-done
export VENV

# The prompt is taken as typed and travels through the environment: neither make nor the shell reads its $, ` or ".
override PROMPT := $(value PROMPT)
export PROMPT

.DEFAULT_GOAL := help
.NOTPARALLEL:
TARGETS := help setup train generate demo evaluate lecture test test-full test-slurm test-browser lint format bench docker docker-train clean
.PHONY: $(TARGETS)

UNKNOWN := $(filter-out $(TARGETS) $(SETUP),$(MAKECMDGOALS))
ifneq ($(UNKNOWN),) # before anything is made of the targets that there are
$(error there is no target $(UNKNOWN); `make` lists them, and a prompt is given as PROMPT="a dog")
endif

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  CONF=$(CONF)  PROMPT="a small red circle"  CHECKPOINT=file'
	@echo '  ARGS="more arguments"  TORCH=cpu (at set-up: torch without CUDA)  PYTHON=python3.12 (at set-up)'
	@echo '  VENV=folder in place of .venv  LOWEST=1 (at set-up: the oldest versions allowed)'

setup: $(SETUP) ## Make .venv (or VENV) with the tested versions

$(SETUP): pyproject.toml constraints.txt requirements-no-deps.txt docker/setup.sh
	@sh docker/setup.sh
	@touch $@

train: $(SETUP) ## Train the experiment CONF; Ctrl-C saves a checkpoint
	@exec $(PY) -m pipeline fit -c $(CONF) $(ARGS)

generate: $(SETUP) ## Draw PROMPT (or a few default prompts) with the newest checkpoint, or CHECKPOINT
	@exec $(PY) -m pipeline generate $${PROMPT:+"$$PROMPT"} $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

demo: $(SETUP) ## Open a page that draws with the newest checkpoint, or CHECKPOINT
	@exec $(PY) -m pipeline demo $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

evaluate: $(SETUP) ## Measure the newest checkpoint, or CHECKPOINT
	@exec $(PY) -m pipeline evaluate $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

lecture: $(SETUP) ## Climb the lecture's ladder (seven minutes or so) and write docs/lecture.md
	@exec $(PY) benchmarks/lecture.py $(ARGS)

test: $(SETUP) ## Run the quick tests, some files at once (ARGS="-n 0": one after the other)
	@exec $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-full: $(SETUP) ## Run all tests, the slow ones too
	@exec $(PY) -m pytest $(ARGS)

test-slurm: $(SETUP) ## Install SLURM from Debian, start it on this machine, and preempt a job
	@command -v slurmctld munged >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge; }
	@exec $(PY) -m pytest tests/test_slurm.py $(ARGS)

test-browser: $(SETUP) ## Install Chromium from Debian, and open the page of `demo` in it
	@command -v chromium >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	@$(PY) -m pip install --quiet "playwright>=1.50"
	@exec $(PY) -m pytest tests/test_demo.py $(ARGS)

lint: $(SETUP) ## Check style, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright

format: $(SETUP) ## Format, and mend what ruff can mend
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

bench: $(SETUP) ## Run the benchmarks that need no checkpoint and take minutes, one by one
	@set -e; for bench in step train sampling data scaling world evaluation mcmc; do echo "== $$bench"; $(PY) benchmarks/$$bench.py $(ARGS); done

docker: ## Build the image of a GPU trainer
	docker build -f docker/Dockerfile -t conditional-score-pipeline $(ARGS) .

docker-train: ## Train CONF in that image, on all GPUs, into runs/ (DATA=folder: it is /data there)
	@install -d runs
	docker run --rm --init --gpus all --ipc host --user "$$(id -u):$$(id -g)" -e HOME=/tmp -e HF_HOME=/tmp/hub -e WANDB_API_KEY \
	    -v "$(CURDIR)/runs:/app/runs" $(if $(DATA),-v "$(abspath $(DATA)):/data:ro") \
	    conditional-score-pipeline fit -c $(CONF) $(ARGS)

clean: ## Remove .venv and caches; runs/ stays
	rm -rf .venv .venv-* .pytest_cache .ruff_cache dist
	find pipeline tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
