# Every target sets up what it needs in .venv; nothing has to be run before it.
#
#   make demo      the main job on the embedded model: prints text and a table
#   make test      the whole test suite
#   make check     formatting, lint, types, tests
#   make gpu-test  the kernels' and the engine's tests on a GPU; says so where there is none
#   make gpu-bench the tables of paged attention on a GPU, of decoding and of prompts, beside its peers
#   make gpu-compile-test    compiles the GPU kernels for six GPUs, none of which is needed (1.3 GB of wheels)
#   make client-test         clients of OpenAI's API against the server, each in its environment (3.5 GB in .cache)
#
#   make PYTHON=/path/to/python3.13 test     uses that interpreter (3.12 to 3.14)
#   make EXTRAS=dev,cuda13 gpu-test          with the CUDA 13 build of jax
#   make CLIENTS=openai client-test          with some of the clients
#   make GPU_PYTHON=python3 gpu-test         with an interpreter that has jax for CUDA: nothing is installed

EXTRAS = dev
PYTEST_ARGS =
# A process for each core, four at most; the tests of one file stay together and share its fixtures.
PARALLEL = -n auto --maxprocesses 4 --dist loadfile
# A PYTHON from the environment is only one more candidate; one from the command line binds.
BOUND_PYTHON := $(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON))
PY := .venv/bin/python
# One stamp for each choice made on the command line; .ready is the one of plain `make`.
CHOICE := $(subst /,_,$(BOUND_PYTHON))$(if $(filter-out dev,$(EXTRAS)),+$(EXTRAS))
READY := .venv/.ready$(CHOICE)
# An interpreter to use as it is, from the checkout, in the gpu-* targets that need a GPU.
GPU_PYTHON =
GPU_RUN = $(or $(GPU_PYTHON),$(PY)) scripts/from_checkout.py
GPU_READY = $(if $(GPU_PYTHON),,$(READY))
GPU_BENCH_ARGS = --quick
GPU_PREFILL_ARGS = --quick
CLIENTS =
SOURCES := jaxpaged models pallas_kernels serve tests benchmarks notebooks scripts setup.py
CHECKED = $(wildcard $(SOURCES))

.PHONY: demo test gpu-test gpu-bench gpu-compile-test client-test check lint format format-check typecheck bench notebook venv clean distclean help

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

venv: $(READY)

$(READY): pyproject.toml setup.py
	@sh scripts/setup_venv.sh "$(EXTRAS)" $(if $(BOUND_PYTHON),"$(BOUND_PYTHON)")
	@touch .venv/.ready $@

demo: $(READY)
	@$(PY) -m jaxpaged.serve demo

test: $(READY)
	$(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

# The options of pyproject.toml name plugins that an interpreter of the user's may lack, and what its packages
# warn of is not ours: so neither applies here.
gpu-test: $(GPU_READY)
	@$(GPU_RUN) benchmarks.gpu.device
	$(GPU_RUN) pytest -o addopts= --import-mode=importlib -ra --tb=short -W default --gpu tests/gpu $(PYTEST_ARGS)

gpu-bench: $(GPU_READY)
	@$(GPU_RUN) benchmarks.gpu.device
	$(GPU_RUN) benchmarks.gpu.paged_attention $(GPU_BENCH_ARGS)
	$(GPU_RUN) benchmarks.gpu.prefill $(GPU_PREFILL_ARGS)

# One process: the tests compile for several GPUs, on all cores, by themselves.
gpu-compile-test:
	@$(MAKE) test EXTRAS="$(EXTRAS),gpu-compile" PARALLEL= PYTEST_ARGS="tests/gpu_compile $(PYTEST_ARGS)"

client-test: $(READY)
	@$(PY) -m tests.clients.run $(CLIENTS)

check: format-check lint typecheck test

lint: $(READY)
	$(PY) -m ruff check $(CHECKED)

format: $(READY)
	$(PY) -m ruff format $(CHECKED)
	$(PY) -m ruff check --fix $(CHECKED)

format-check: $(READY)
	$(PY) -m ruff format --check $(CHECKED)

typecheck: $(READY)
	$(PY) scripts/typecheck.py

bench: $(READY)
	$(PY) benchmarks/run.py

notebook: $(READY)
	$(PY) -m jupytext --sync notebooks/*.py
	$(PY) -m pytest --overwrite notebooks

clean:
	rm -rf build dist *.egg-info .cache .typecheck .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -not -path './.uv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .uv
