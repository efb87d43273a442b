# Everything from a fresh clone: `make demo` and `make test` install what they need by themselves.
SHELL := /bin/bash
DEVICE ?= cpu
# DEVICE=cuda has an environment of its own, with CUDA builds of torch and vLLM
VENV := $(if $(findstring cuda,$(DEVICE)),.venv-cuda,.venv)
PY := $(VENV)/bin/python
RUN := $(PY) -m sophiavl_fast
STAMP := $(VENV)/.installed
SEED ?= 0
# another layout of the trainer, such as PARALLEL="tensor=2" or PARALLEL="tensor=2 data=2": torchrun starts the product of the counts
PARALLEL ?=
# the default seed owns the plain names; other seeds get folders of their own
SUFFIX := $(if $(filter-out 0,$(SEED)),-s$(SEED),)
DEMO_RUN := runs/demo$(SUFFIX)
DEMO_DATA := data/demo$(SUFFIX)
DEMO_MODEL := models/demo$(SUFFIX)
DEMO_SET := run.seed=$(SEED) device=$(DEVICE) data.registry=$(DEMO_DATA)/dataset_info.json
# two million parameters want no 0.4 of a GPU: a cache of a million blocks costs the engine's Python more than the model costs the GPU
GPU_SET := $(if $(findstring cuda,$(DEVICE)),rollout.gpu_memory_utilization=0.1)
# the RL run under torchrun, where a layout is named: rollouts then come from servers, one a replica
COUNTS := $(filter tensor=% pipeline=% data=% context=%,$(PARALLEL))
RANKS := $(if $(PARALLEL),$(shell (echo $$(( 1 $(foreach p,$(COUNTS),* $(lastword $(subst =, ,$(p)))) ))) 2>/dev/null || echo 1))
RL := $(if $(PARALLEL),$(PY) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) -m sophiavl_fast,$(RUN))
LAYOUT := $(if $(PARALLEL),rollout.engine=server $(addprefix parallel.,$(PARALLEL)))

.PHONY: aot install demo demo-judge test test-all bench-env lint clean-demo kernels
install: $(STAMP)

$(STAMP): requirements/$(if $(findstring cuda,$(DEVICE)),gpu,cpu).txt pyproject.toml setup.py scripts/install.sh
	bash scripts/install.sh $(VENV) $(DEVICE)
	touch $@

# data and a random tiny model -> warm start -> thinking reward model -> Trust-GRPO -> the before/after table
demo: $(STAMP)
	$(if $(PARALLEL),@bash -c 'here=. PYTHON=$(PY); source scripts/common.sh; read_config "$$@"' PARALLEL $(RANKS) configs/demo.yaml $(DEMO_SET) $(LAYOUT) >/dev/null)
	$(PY) -m sophiavl_fast.data.demo --out $(DEMO_DATA) --model $(DEMO_MODEL)-init --seed $(SEED)
	$(RUN) train configs/demo_warmup.yaml $(DEMO_SET) run.dir=runs/demo_warmup$(SUFFIX) run.export=$(DEMO_MODEL) model.path=$(DEMO_MODEL)-init
	$(RUN) train configs/demo_judge.yaml $(DEMO_SET) run.dir=runs/demo_judge$(SUFFIX) run.export=$(DEMO_MODEL)-judge model.path=$(DEMO_MODEL)
	$(RL) train configs/demo.yaml $(DEMO_SET) run.dir=$(DEMO_RUN) model.path=$(DEMO_MODEL) thinking.path=$(DEMO_MODEL)-judge $(GPU_SET) $(LAYOUT)

# traces -> annotate -> balance -> a tiny thinking reward model -> serve -> evaluate, on the demo's data and warm-started model
demo-judge: $(STAMP)
	PYTHON=$(PY) DATA=$(DEMO_DATA) MODEL=$(DEMO_MODEL) OUT=runs/demo_judge_traces$(SUFFIX) bash scripts/thinking_reward_demo.sh

# what a person runs before a commit: JOBS files of tests at a time, each on its own share of the cores (JOBS=0: one after the other)
JOBS ?= 2
test: $(STAMP)
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not kill" tests --ignore tests/kernels/interpreter
	TRITON_INTERPRET=1 $(PY) -m pytest -n $(JOBS) -m "not slow" tests/kernels/interpreter

# everything: layouts, kills, long runs
test-all: $(STAMP)
	$(PY) -m pytest tests --ignore tests/kernels/interpreter
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels/interpreter

# registers, spills and matrix instructions of every Triton kernel that ships, compiled here by both supported Tritons; no GPU
aot: $(STAMP)
	test -d build/triton-3.6.0 || $(PY) -m pip install -q --no-deps --target build/triton-3.6.0 triton==3.6.0
	$(PY) benchmarks/aot.py --triton build/triton-3.6.0 --out benchmarks/results/aot.json

# TRL's packages for benchmarks/rl_step.py, beside the environment and never in it
bench-env: $(STAMP)
	$(PY) -m pip install -q --no-deps --target build/trl -r benchmarks/requirements-trl.txt

# the optional C++ CPU kernels, in place; `make install` has tried it already
kernels: $(STAMP)
	$(PY) kernels/csrc/build.py

lint: $(STAMP)
	$(VENV)/bin/ruff check sophiavl_fast kernels tests benchmarks
	$(VENV)/bin/mypy

clean-demo:
	rm -rf runs/demo$(SUFFIX) runs/demo_warmup$(SUFFIX) runs/demo_judge$(SUFFIX) $(DEMO_DATA) $(DEMO_MODEL) $(DEMO_MODEL)-init $(DEMO_MODEL)-judge
