# The same verbs as the command line; each sets up .venv first if needed. `make` alone prints the help.
MODEL ?= digits_resnet
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
BIN := .venv/bin
REPOSITORY ?= models
# The folder name that the command chooses: timm/x in timm_x, nets/mine.py:build in mine_build.
NAME = $(if $(findstring .py:,$(MODEL)),$(notdir $(subst .py:,_,$(MODEL))),$(subst /,_,$(MODEL)))
DIR = $(or $(OUT),build/$(NAME))
ENGINE = $(or $(wildcard $(DIR)/engine.plan),$(DIR)/engine.onnx)
DENSE_ENGINE = $(or $(wildcard $(DIR)/dense_engine.plan),$(DIR)/dense_engine.onnx)

.DEFAULT_GOAL := help
.PHONY: help setup engine parity deploy test test-all mutants lint schema bench clean

help: ## This help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: .venv/.ready ## Install maskplan with its learn and dev extras into .venv

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[learn,dev]'
	@# By itself: where NVIDIA has no wheel for this machine, everything but the backend tensorrt-rtx works without it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[rtx]' \
	  || echo 'TensorRT-RTX could not be installed; everything works without it, but the backend tensorrt-rtx'
	@mkdir -p .venv/typing/maskplan
	@ln -sfn $(foreach folder,pipeline exporters calibration engines,$(CURDIR)/$(folder)) .venv/typing/maskplan/
	@touch $@

# TensorRT's Python bindings without its libraries: the tests compare the stand-in with them. Without them these tests skip.
TENSORRT_BINDINGS := cu12-10.3.0 cu12-10.13.3.9 cu12-10.16.1.11 cu13-11.4.0.106

.venv/.bindings: .venv/.ready
	for each in $(TENSORRT_BINDINGS); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/bindings/$${each#*-} \
	    tensorrt-$${each%%-*}-bindings==$${each#*-} || exit 0; \
	done; touch $@

# Triton's message definitions; they need another protobuf than ONNX, hence a folder of their own.
.venv/.triton: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .venv/triton \
	  'tritonclient[grpc,http]==2.73.0' && touch $@ || true

# The server itself, and an environment for the backends in tests/support/triton_backends: it needs numpy below 2.
.venv/.tritonserver: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/tritonserver/server \
	  nvidia-pytriton==0.7.0 && \
	$(BIN)/python -m venv .venv/tritonserver/python && \
	.venv/tritonserver/python/bin/python -m pip install --quiet --disable-pip-version-check \
	  numpy==1.26.4 $$(grep ^onnxruntime= constraints.txt) && \
	chmod +x .venv/tritonserver/server/pytriton/tritonserver/bin/tritonserver && touch $@ || true

engine: .venv/.ready ## Checkpoint to engine: MODEL= WEIGHTS= DATA= MASKS= PERMUTE=1 PRECISION= BACKEND= OUT=
	$(BIN)/maskplan engine $(strip $(MODEL) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(DATA),--data $(DATA)) \
	  $(if $(MASKS),--masks $(MASKS)) $(if $(PERMUTE),--permute) $(if $(PRECISION),--precision $(PRECISION)) \
	  $(if $(BACKEND),--backend $(BACKEND)) $(if $(OUT),--out $(OUT)))

parity: .venv/.ready ## Compare the engines of MODEL= again, with DATA= and ARGS="--use-ci ..."; fails when accuracy is lost
	$(BIN)/maskplan compare $(DENSE_ENGINE) $(ENGINE) $(if $(DATA),--data $(DATA)) $(ARGS)

deploy: .venv/.ready ## Add the engine of MODEL= to the Triton model repository REPOSITORY=
	$(BIN)/maskplan deploy $(ENGINE) --repository $(REPOSITORY)

# One OpenMP thread a process: more only spin on models this small. Two processes: tests that build engines need 2 GB each.
# Bytecode is written even where the environment forbids it: the tests start over a hundred processes.
PYTEST = PYTHONDONTWRITEBYTECODE= TRITONCLIENT=$$(test -e .venv/.triton && echo $(CURDIR)/.venv/triton) \
  TRITONSERVER=$$(test -e .venv/.tritonserver && echo $(CURDIR)/.venv/tritonserver) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
  $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: .venv/.bindings .venv/.triton .venv/.tritonserver ## The tests except the slow ones
	$(PYTEST) -m 'not slow'

test-all: .venv/.bindings .venv/.triton .venv/.tritonserver ## All tests
	$(PYTEST)

mutants: .venv/.ready ## Break the code in one place at a time: a test must notice each fault (ARGS="--folder engines")
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: .venv/.ready ## Style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

schema: .venv/.ready ## Generate docs/report.schema.json after a record of the report has changed
	$(BIN)/python -m maskplan.pipeline.report.schema > docs/report.schema.json

BENCHMARKS := line conformance mask_step mask_search transposable permute_networks norms gate
bench: .venv/.ready ## The benchmarks that need no data from you; they write JSON next to their scripts
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/performance/$$name.py || exit 1; done

clean: ## Remove what `make engine` wrote
	rm -rf build
