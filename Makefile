# make demo | make test | make emulate | make clients | make lint | make smoke | make gpu. To use an environment that is active already, with its own
# torch (for CUDA, say):
#     make test PYTHON=python VENV=
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
TRITON ?= triton==3.7.1; sys_platform == 'linux'
# Libraries that this is tested with; those of make test without their dependencies, which they do without there.
CLIENTS := tests/clients/requirements.txt
LIBRARIES ?= $(shell grep -E '^(timm|monai)==' $(CLIENTS)) ptflops==0.7.5

ifeq ($(VENV),)
  RUN := $(PYTHON)
  CLANG_FORMAT := clang-format
  INSTALLED := installed-in-active-environment
else
  RUN := $(VENV)/bin/python
  CLANG_FORMAT := $(VENV)/bin/clang-format
  INSTALLED := $(VENV)/.installed
endif

.PHONY: demo test emulate clients lint smoke gpu versions wheel sdist sanitize clean installed-in-active-environment

demo: $(INSTALLED)
	$(RUN) -m densenet_fast train --data digits --compare reference

test: $(INSTALLED) lint
	$(RUN) -m pytest -n auto --dist worksteal

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(CLANG_FORMAT) --style=file:csrc/.clang-format --dry-run -Werror \
		$(wildcard $(foreach kind,cpp h cu,csrc/*.$(kind) csrc/*/*.$(kind)) tests/backends/cuda/*.h)

# The backends for GPUs on one, in this checkout, with the torch and Triton of an environment that is there: nothing is
# installed. make gpu FLAGS=--dry-run does the same without a GPU.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/.installed),$(RUN),$(PYTHON))
smoke:
	$(GPU_PYTHON) tests/gpu.py --smoke $(FLAGS)

gpu:
	$(GPU_PYTHON) tests/gpu.py $(FLAGS)

# What takes long of what is known of GPUs without one: faults put into the 3x3 kernels in CUDA C++, each of which the
# emulation must find; every emulated kernel with its threads in reverse order; the kernels compiled by the newest Triton;
# the long command for a GPU, dry.
emulate: $(INSTALLED)
	$(RUN) -m pytest -n auto --dist worksteal tests/on_gpu/full_dry_run.py tests/backends/triton/newest.py \
		tests/backends/cuda/every_order.py tests/backends/cuda/mutations.py

# Other libraries' networks, as they are on PyPI, converted, beside themselves: in an environment of their own, with all
# that they depend on (1.5 gigabytes), and the compiled library of this checkout. Some minutes.
clients: $(INSTALLED) build/clients/.installed
	build/clients/bin/python -m pytest -n auto --dist worksteal tests/clients/clients.py

build/clients/.installed: $(CLIENTS)
	$(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip install --quiet $(TORCH) numpy tqdm "pytest>=8" pytest-xdist
	build/clients/bin/python -m pip install --quiet --no-deps $(TORCHVISION)
	build/clients/bin/python -m pip install --quiet --requirement $(CLIENTS)
	touch $@

# The library under other versions of torch, as installed and built with each, in environments of their own (some
# gigabytes each).
VERSIONS ?= 2.11.0 2.13.0 newest
versions: $(INSTALLED)
	$(RUN) tests/load_library.py $(VERSIONS)

# A wheel for every Python 3 and every Linux with glibc 2.28 or newer, and what it can be built from, in dist/.
wheel: $(INSTALLED)
	$(RUN) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

sdist: $(INSTALLED)
	$(RUN) setup.py --quiet sdist

# The kernel tests with the compiled kernels, the product in tile registers emulated, and the kernels in CUDA C++
# emulated, under the address and undefined-behaviour sanitizers.
SANITIZERS := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
SANITIZED = ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)"
sanitize: $(INSTALLED)
	DENSENET_FAST_CUDA=0 CXXFLAGS="$(SANITIZERS) -DDENSENET_FAST_EMULATED_TILES -I$(CURDIR)/tests/backends" LDFLAGS="$(SANITIZERS)" $(RUN) setup.py --quiet build_ext \
		--build-temp build/sanitize --build-lib build/sanitized
	DENSENET_FAST_LIBRARY=build/sanitized/densenet_fast/_kernels.so $(SANITIZED) $(RUN) -m pytest \
		tests/backends/test_kernels.py tests/backends/test_pool_kernels.py tests/backends/test_extension.py \
		tests/ops/test_walk.py -k "cpu- or threads or arguments or walks"
	DENSENET_FAST_LIBRARY=build/sanitized/densenet_fast/_kernels.so $(SANITIZED) $(RUN) -m pytest \
		tests/ops/test_chain.py tests/ops/test_network.py tests/ops/test_convolution.py
	if grep -qw avx512_bf16 /proc/cpuinfo; then \
		DENSENET_FAST_CPU=amx_bf16 DENSENET_FAST_LIBRARY=build/sanitized/densenet_fast/_kernels.so $(SANITIZED) \
		$(RUN) -m pytest tests/backends/test_kernels.py -k "cpu- and bfloat16 and conv"; fi
	if library=$$(SANITIZE=1 $(RUN) tests/backends/cuda/emulation.py); then \
		DENSENET_FAST_LIBRARY=$$library $(SANITIZED) $(RUN) -m pytest \
			tests/backends/cuda/*on_device.py; fi

clean:
	rm -rf $(or $(VENV),build) build runs *.egg-info

$(VENV)/.installed: setup.py pyproject.toml Makefile $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH) "$(TRITON)" setuptools ninja
	$(RUN) -m pip install --quiet --no-build-isolation --editable '.[test]'
	$(RUN) -m pip install --quiet --no-deps $(TORCHVISION) $(LIBRARIES)
	touch $@

installed-in-active-environment:
	$(RUN) -c "import torch"
	$(RUN) -m pip install --quiet --no-build-isolation --editable '.[test]'
