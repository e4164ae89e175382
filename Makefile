# make demo   sets everything up and explains a real photo
# make test   sets everything up and runs the tests (no GPU needed; GPU tests run where there is one)
# make gpu    on a machine with CUDA and torch: the GPU tests, then the benchmark
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MINIMUM := 3.11

.PHONY: demo test test-main test-interpreter lint gpu bench readme clean

demo: $(INSTALLED)
	$(BIN)/vitexplain demo --output vitexplain_demo.png

test: lint test-main test-interpreter

test-main: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

# Interpreting and compiling Triton kernels cannot share a process: the interpreter is chosen when triton is imported.
test-interpreter: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -m interpreter

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The GPU machine may have no network: its own torch, triton, timm and scikit-build-core are used.
gpu:
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
	.venv-gpu/bin/python -m pytest -m gpu
	.venv-gpu/bin/python -m bench.cost --device cuda --dtype bfloat16 --model vit_base_patch16_224 --batch 64

bench: $(INSTALLED)
	$(BIN)/python -m bench.cost
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.readme

readme: $(INSTALLED)
	$(BIN)/python -m bench.readme

$(INSTALLED): pyproject.toml CMakeLists.txt
	@$(PYTHON) -c "import sys; v = tuple(map(int, '$(MINIMUM)'.split('.'))); sys.exit(sys.version_info < v and 'expected Python >= $(MINIMUM), received ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build dist .pytest_cache .ruff_cache
