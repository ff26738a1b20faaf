# Every target sets up what it needs in .venv first (.ci/setup); a second call starts at once.
#
# ARGS are passed on:   make demo ARGS='--explain --json out.json'      make test ARGS='-k planner'
# PYTHON names another interpreter for .venv (3.10 to 3.13):            make test PYTHON=python3.12

SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=
export PYTHON

.PHONY: help setup demo test test-vllm test-llamacpp test-sglang test-compose test-long lint format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup:  ## create .venv with everything in it
	@.ci/setup python

demo: setup  ## a real model reuses KV from host memory, disk and Redis
	@.ci/setup redis
	@.venv/bin/kvstore demo $(ARGS)

lint: setup  ## ruff and mypy --strict
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup  ## let ruff rewrite what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

test: lint  ## lint, types and all tests but the slow ones
	@.ci/setup redis
	@.ci/setup model
	@$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-vllm: setup  ## the tests with a real vLLM engine, in an environment of their own
	@.ci/setup redis
	@.ci/setup model
	@.ci/test-vllm $(ARGS)

test-llamacpp: setup  ## the tests with a real llama-server, whose package is kept outside of the clone
	@.ci/test-llamacpp $(ARGS)

test-sglang: setup  ## the tests with SGLang's real cache classes, in an environment of their own
	@.ci/setup redis
	@.ci/test-sglang $(ARGS)

test-compose: setup  ## docker-compose.yml really brought up; skipped without a Docker engine
	@.ci/test-compose $(ARGS)

test-long: override ARGS += --run-slow
test-long: test  ## the slow tests too

bench: setup  ## all workloads beside their ceilings; JSON in bench.json
	@.ci/setup redis
	@dir=$$(mktemp -d ./bench.XXXXXX) && trap 'rm -rf "$$dir"' EXIT && \
	.venv/bin/kvstore bench hash index planner host device service service-bytes disk "$$dir" $$(command -v redis-server >/dev/null && echo redis local) \
	    --out bench.json $(ARGS)

clean:  ## remove .venv, caches and what was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.png
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.so' -delete
