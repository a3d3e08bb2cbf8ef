# Everything for work in this source tree. Needs Python 3.10 or later with its headers, a C++20 compiler and make; the
# rest is downloaded into .venv.
TORCH ?= 2.11.0
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
DEMO := build/demo
# The environment is made again when these change: the stamp of another choice is another file.
CHOICE := $(shell { echo '$(TORCH) $(PYTHON)'; cat pyproject.toml; } | cksum | cut -d ' ' -f 1)
DEMO_REQUIREMENTS := .venv/demo-$(CHOICE)
MUSIC_REQUIREMENTS := .venv/music-$(CHOICE)
REQUIREMENTS := .venv/requirements-$(CHOICE)
EDITABLE := .venv/editable-$(CHOICE)

# pip compiles no bytecode: Python does, of the modules that it loads.
PIP := $(BIN)/python -m pip install --no-compile
INSTALL_DEV := $(PIP) 'torch==$(TORCH)' --group dev

# For work in this tree: where no GPU is visible, one architecture of CUDA, whose PTX the tests execute (a second one
# takes minutes), and lines of the source for profilers and reports, which double the size of the kernels.
ifeq ($(filter wheel release,$(MAKECMDGOALS)),)
  ifndef TORCH_CUDA_ARCH_LIST
    export TORCH_CUDA_ARCH_LIST := $(if $(filter test-all,$(MAKECMDGOALS)),8.0+PTX 9.0+PTX,$(shell \
      nvidia-smi -L > /dev/null 2>&1 || echo 9.0+PTX))
  endif
  export NVCC_APPEND_FLAGS += -lineinfo
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-build music test test-all docs bench gpu-model build wheel release format clean

help:
	@echo 'make demo    train on Bach chorales, with and without positions; ARGS="--steps 100" passes arguments'
	@echo 'make music   continue chorales, by the model of make demo or a new one: MIDI, pictures and sound; ARGS as above'
	@echo 'make test    C++ and Python tests, format and lint; ARGS=--long: the longest and sanitizers too'
	@echo 'make test-all  the same with all combinations of parameters, more random calls, PTX for two architectures'
	@echo 'make docs    the documentation as a site, in build/docs'
	@echo 'make bench   time and memory against the plain PyTorch reference; ARGS as above'
	@echo 'make gpu-model  predicted times of the CUDA kernels on an H100; needs nvcc, not a GPU'
	@echo 'make build   environment .venv and compiled library, which the others make too'
	@echo 'make wheel   a manylinux wheel in dist, installed and run; ARGS="--cuda --python python3.12" for more'
	@echo 'make release  checks version, changelog and tag, builds what would be uploaded; ARGS=--cuda: both wheels'
	@echo 'make format  rewrite sources in the project style'
	@echo 'make clean   remove what was built, and .venv'
	@echo
	@echo 'TORCH=$(TORCH) and PYTHON=$(PYTHON) choose another PyTorch and Python.'

demo: demo-build
	PYTHONPATH=$(DEMO)/package $(BIN)/python examples/music/chorales/train.py $(ARGS)

music: demo-build $(MUSIC_REQUIREMENTS)
	PYTHONPATH=$(DEMO)/package $(BIN)/python examples/music/train.py $(ARGS)

# A build and a package of its own, quickly made: for the instruction sets of this machine, and with the CUDA kernels
# only where there is a GPU to run them. The variables of setup.py come first.
demo-build: $(DEMO_REQUIREMENTS)
	@TORCH_SPE_CUDA=$${TORCH_SPE_CUDA-$$(nvidia-smi -L > /dev/null 2>&1 && echo AUTO || echo 0)} \
	  TORCH_SPE_INSTRUCTION_SETS=$${TORCH_SPE_INSTRUCTION_SETS-native} \
	  TORCH_SPE_BUILD_DIR=$${TORCH_SPE_BUILD_DIR-$(DEMO)} \
	  $(BIN)/python setup.py --quiet build --build-lib $(DEMO)/package

test: build
	@$(BIN)/python scripts/check.py $(ARGS)

test-all: build
	@$(BIN)/python scripts/check.py --all $(ARGS)

docs: build
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs
	@echo 'open build/docs/index.html'

bench: build
	$(BIN)/python -m benchmarks $(ARGS)

# ARGS="sine_features K=1" for one operator, with another shape.
gpu-model: build
	cmake -DTORCH_SPE_TESTS=ON -DTORCH_SPE_VIRTUAL_GPU=90 build/cmake > /dev/null
	cmake --build build/cmake --target torch_spe_virtual_gpu_90
	$(BIN)/python tests/virtual_gpu/sass_map.py
	$(BIN)/python tests/virtual_gpu/gpu_model.py $(ARGS)

build: $(EDITABLE)
	@$(BIN)/python setup.py --quiet build_ext --inplace

# The instruction sets of setup.py: all, unless TORCH_SPE_INSTRUCTION_SETS names some.
wheel: $(REQUIREMENTS)
	@$(BIN)/python scripts/make_wheel.py $(ARGS)

release: $(REQUIREMENTS)
	@$(BIN)/python scripts/release.py $(ARGS)

format: $(REQUIREMENTS)
	@$(BIN)/python scripts/check.py --fix

clean:
	rm -rf .venv build dist python/*.egg-info python/torch_spe/*.so python/torch_spe/_build_info.json

# pip changes nothing that already fits. Stamps of other choices go first: they would be untrue afterwards.
$(DEMO_REQUIREMENTS):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'torch_spe needs Python 3.10 or later, and $(PYTHON) is not one. Name another: make PYTHON=python3.11' >&2; \
	  exit 1; }
	@rm -f .venv/demo-* .venv/music-* .venv/requirements-* .venv/editable-*
	@[ "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" ] || rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(PIP) 'torch==$(TORCH)' --group build --group demo
	@touch $@

$(MUSIC_REQUIREMENTS): $(DEMO_REQUIREMENTS)
	$(PIP) 'torch==$(TORCH)' --group music
	@touch $@

$(REQUIREMENTS): $(DEMO_REQUIREMENTS)
	$(INSTALL_DEV)
	@touch $@

# Compiled while the rest of the environment is downloaded, and before the installation of the package, for which pip
# would not show how far it got.
$(EDITABLE): $(DEMO_REQUIREMENTS) setup.py
	@[ -e $(REQUIREMENTS) ] || { $(INSTALL_DEV) && touch $(REQUIREMENTS); } & \
	  $(BIN)/python setup.py --quiet build_ext --inplace; built=$$?; wait $$! && exit $$built
	$(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	@touch $@
