# make demo   train and evaluate on the built-in corpus, in its own virtual environment
# make test   format, types and all tests, in the same environment
# make ir     execute what Triton compiles for three GPU architectures, on the CPU
# make native compile the C++ kernels again after their sources changed (an install compiles them too)
# make sanitize  the C++ kernels, built with the address, undefined-behaviour and thread sanitizers, on random calls (long)
# make aot    compile the shipped kernels for every architecture; compare registers, spills, memory and loops with
#             benchmarks/aot_table.json (minutes)
# make gpu    proof and speed of everything on a GPU, MINUTES=8 at most, into build/gpu; PEERS=a folder of peers' wheels
# make compiles  compile the recipes' kernels with an older Triton, TRITON=3.6.0 (two minutes)
# make versions  kernels and tests with the oldest and the newest torch and Triton, in environments of their own
#             under build/versions (long, gigabytes); some alone: ONLY='3.6.0 3.9.0', by their Triton
#
# torch is chosen for your hardware, once, and never replaced:
#   torch already in $(PYTHON)      used as it is (the environment sees it)
#   NVIDIA GPU found, or macOS      torch==2.13.0 from PyPI
#   no GPU                          torch==2.13.0+cpu, from PyTorch's CPU index if your registry has no such build
# make demo TORCH='torch==2.14.1'   any other build, by pip's name for it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# tools lie in the environment, or beside the python whose torch (and what else it had) is used
TOOLS = PATH="$(abspath $(BIN)):$$(dirname "$$(command -v $(PYTHON))"):$$PATH"
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# numpy comes after torch, which warns until it is there
ASK_TORCH := -W ignore -c
COMPILING := @echo "installing antlm_fast and compiling its C++ kernels: a minute or two on two cores"
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH ?=
# pip puts this cap on every later install, so no dependency can bring another torch
PINNED := $(VENV)/torch.txt

# the type checker cannot follow antlm_fast.kernels to the top-level folder: it is shown the package as a wheel has it
TYPED := $(VENV)/typed/antlm_fast

# the verifier of `make ir`; its package names Python 3.12, and runs on 3.11 too
TTSEM := ttsem==0.1.0
# what the Triton kernels' sources are tested by, in a process whose Triton interprets
INTERPRETED := tests/kernels/test_attention.py tests/kernels/test_attention_properties.py \
  tests/kernels/test_linear_cross_entropy.py tests/kernels/test_triton_cross_entropy.py \
  tests/kernels/test_disentangled_attention.py tests/kernels/test_disentangled_attention_properties.py \
  tests/kernels/test_triton_relative.py tests/kernels/test_triton_relative_mutants.py \
  tests/kernels/test_triton_tiles.py tests/kernels/test_triton_ops.py tests/kernels/test_triton_mutants.py \
  tests/kernels/test_every_op.py \
  tests/kernels/triton_support tests/benchmarks/test_plain_flash_attention.py

.PHONY: demo test native sanitize ir aot gpu compiles versions lint clean

demo: $(VENV)/train.installed
	$(BIN)/python -m antlm_fast.cli train --recipe demo --output runs/demo --resume

test: lint native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto  # a worker a core: more threads would fight for it
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(INTERPRETED)

# without a compiler the other implementations serve, and the tests of these say so
native: $(VENV)/dev.installed
	$(BIN)/python -m antlm_fast.kernels.native.build --if-needed || true

# CASES random calls of each op, dtype and instruction set: ten thousand in all
CASES ?= 320
PRELOADED = $$(g++ -print-file-name=lib$(1).so)
FUZZ = ANTLM_FAST_FUZZ_CASES=$(CASES) ANTLM_FAST_FUZZ_LIBRARY=build/native-$(1).so \
  $(BIN)/python -m pytest -q -n auto tests/kernels/test_native_fuzz.py
sanitize: native
	$(BIN)/python -m antlm_fast.kernels.native.build --sanitize address --output build/native-address.so
	LD_PRELOAD="$(call PRELOADED,asan) $(call PRELOADED,ubsan)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	  $(call FUZZ,address)
	$(BIN)/python -m antlm_fast.kernels.native.build --sanitize thread --output build/native-thread.so
	LD_PRELOAD="$(call PRELOADED,tsan)" TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
	  OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(call FUZZ,thread)

ir: $(VENV)/dev.installed
	@if $(PIP) install --no-deps --ignore-requires-python '$(TTSEM)'; \
	then OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/kernels/ir; \
	else echo "make ir: skipped: $(TTSEM) could not be installed"; fi

aot: $(VENV)/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/aot.py --compare

# what `antlm-fast prime` compiles for the recipes, float16 and grouped heads beside it, and the loss
TRITON ?= 3.6.0
OTHER_TRITON = $(VENV)/triton-$(TRITON)
compiles: $(VENV)/dev.installed
	@if [ -d $(OTHER_TRITON) ] || { $(PIP) install --no-deps --target $(OTHER_TRITON).part 'triton==$(TRITON)' \
	  && mv $(OTHER_TRITON).part $(OTHER_TRITON); }; \
	then OMP_NUM_THREADS=1 PYTHONPATH=$(OTHER_TRITON) $(BIN)/python benchmarks/aot.py --compiles \
	  --archs sm_80 sm_90 sm_100 --head-dims 64 768 --kinds half; \
	else echo "make compiles: skipped: Triton $(TRITON) could not be installed"; fi

MINUTES ?= 8
PEERS ?=
gpu: $(VENV)/dev.installed
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES) --output build/gpu $(if $(PEERS),--peers $(PEERS))

ONLY ?=
versions: native
	$(BIN)/python tests/versions.py $(if $(ONLY),--triton $(ONLY)) --interpreted $(INTERPRETED)

lint: $(VENV)/dev.installed
	$(TOOLS) ruff check .
	$(TOOLS) ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED) && ln -s $(CURDIR)/antlm_fast/* $(TYPED)
	rm $(TYPED)/kernels && ln -s $(CURDIR)/kernels $(TYPED)/kernels
	cd $(TYPED)/.. && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml -p antlm_fast

$(PINNED):
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; got " + sys.version'
	@$(PYTHON) -m venv $(VENV)
	@echo "looking for torch in $(PYTHON); without it one is installed, hundreds of megabytes"
	@if [ -n "$(TORCH)" ]; then $(PIP) install '$(TORCH)'; \
	elif $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  home=$$($(PYTHON) $(ASK_TORCH) 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])'); \
	  echo "torch: the one in $$home"; \
	  echo "$$home" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_python.pth; \
	elif [ "$$(uname -s)" = Darwin ] || nvidia-smi >/dev/null 2>&1; then $(PIP) install torch==2.13.0; \
	else $(PIP) install torch==2.13.0+cpu 2>/dev/null || $(PIP) install torch==2.13.0 --index-url $(CPU_INDEX); fi
	@$(BIN)/python $(ASK_TORCH) 'import torch; print("torch==" + torch.__version__)' > $@.part && mv $@.part $@ && cat $@

$(VENV)/train.installed: $(PINNED) pyproject.toml setup.py
	$(COMPILING)
	$(PIP) install --constraint $(PINNED) --editable '.[train]'
	@touch $@

$(VENV)/dev.installed: $(PINNED) pyproject.toml setup.py
	$(COMPILING)
	$(PIP) install --constraint $(PINNED) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
