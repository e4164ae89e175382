# make demo   sets everything up and explains a real photo
# make test   sets everything up and runs the tests (no GPU needed; GPU tests run where there is one)
# make bench  everything that is measured on a CPU, then the plots and the README's tables
# make regressions   a few small cases, timed and compared with the last time
# make gpu    on a machine with CUDA and torch: the GPU tests (make gpu-tests), then the benchmark (make gpu-bench); each within
#             ten minutes
# make tune   there: the launch table and the decision between one backward pass and two, by measuring
# make faithfulness   which method is faithful to its model: the README's tables, on the data beside the repository
# make aot    anywhere: every kernel compiled ahead of time, and each held to its budget
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MINIMUM := 3.11

.PHONY: demo test browser test-main test-interpreter lint gpu gpu-tests gpu-bench tune aot faithfulness bench regressions readme clean

demo: $(INSTALLED)
	$(BIN)/vitexplain demo --output vitexplain_demo.png

test: lint test-main test-interpreter

test-main: $(INSTALLED) browser
	@[ -n "$(CHROMIUM)" ] || export VITEXPLAIN_NO_BROWSER=1; $(BIN)/python -m pytest -n auto --dist loadgroup

# The report's tests open it in Chromium; where there is none and it cannot be installed they skip, and say so.
CHROMIUM = $(shell which chromium chromium-browser google-chrome 2>/dev/null | head -n 1)

browser:
	@[ -n "$(CHROMIUM)" ] || (apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium) >/dev/null 2>&1 \
		|| echo "no Chromium here, and it cannot be installed: the tests that need it skip"

# Interpreting and compiling Triton kernels cannot share a process: the interpreter is chosen when triton is imported.
test-interpreter: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -m interpreter

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The GPU machine may have no network: its own torch, triton, timm and scikit-build-core are used.
GPU_BIN := .venv-gpu/bin
GPU_INSTALLED := .venv-gpu/.installed

gpu: gpu-tests gpu-bench

gpu-tests: $(GPU_INSTALLED)
	$(GPU_BIN)/python -m pytest -m gpu -n 8 -q

# The most telling sizes come first; what the budget leaves out is named. CASES="explanations --work tokentm" for a part.
CASES ?=
BUDGET ?= 480

gpu-bench: $(GPU_INSTALLED)
	$(GPU_BIN)/python -m bench run $(CASES) --device cuda --budget $(BUDGET)

tune: $(GPU_INSTALLED)
	$(GPU_BIN)/python -m bench.tune
	$(GPU_BIN)/python -m bench.tune --decisions

$(GPU_INSTALLED): pyproject.toml CMakeLists.txt
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	$(GPU_BIN)/python -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
	touch $@

aot: $(INSTALLED)
	cmake -B build/aot -DVITEXPLAIN_AOT=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/aot
	ctest --test-dir build/aot --output-on-failure

# The project's own faithfulness tables, from the data beside the repository; it takes hours on a CPU, and goes on where it was.
faithfulness: $(INSTALLED)
	$(BIN)/python -m bench.faithfulness
	$(BIN)/python -m bench table

bench: $(INSTALLED)
	$(BIN)/python -m bench run --device cpu
	$(BIN)/python -m bench.scale
	$(BIN)/python -m bench.tune --decisions --device cpu
	$(BIN)/python -m bench plot
	$(BIN)/python -m bench table

regressions: $(INSTALLED)
	$(BIN)/python -m pytest tests/bench/test_regressions.py --benchmark-autosave --benchmark-compare

readme: $(INSTALLED)
	$(BIN)/python -m bench table

$(INSTALLED): pyproject.toml CMakeLists.txt
	@$(PYTHON) -c "import sys; v = tuple(map(int, '$(MINIMUM)'.split('.'))); sys.exit(sys.version_info < v and 'expected Python >= $(MINIMUM), received ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build dist .pytest_cache .ruff_cache
