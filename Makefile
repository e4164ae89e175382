# make demo   sets everything up and explains a real photo
# make test   sets everything up and runs the tests (no GPU needed; GPU tests run where there is one)
# make lint   style and types
# make docs   the documentation, into build/site; make serve: the page in a browser where a photo is dropped
# make bench  everything that is measured on a CPU, then the plots and the README's tables
# make regressions   a few small cases, timed and compared with the last time
# make gpu    on a machine with CUDA and torch: all of the following, one after the other; make -k goes on past one that fails
#   gpu-tests         the GPU tests
#   gpu-tune          the decision between one backward pass and two
#   gpu-goals         the largest models' explanations beside their rivals, and the largest images
#   gpu-ablation      what each way of saving work buys; the other image sizes
#   gpu-operations    single operations on a layer
#   gpu-explanations  every method of every provider
#   gpu-rest          processes' starts, evaluations, data sets
#             Each benchmark begins nothing after BUDGET seconds and names what it left out: what was begun is finished, so that
#             each takes at most ten minutes or so. RESULTS=DIR: write there (at home: python -m bench merge DIR/*/benchmark.csv;
#             decisions.csv goes back to kernels/attention_backward).
# make gpu-bench CASES="explanations --work tokentm"   any part of the benchmark, there
# make tune   there: the launch table and the decision between one backward pass and two, by measuring
# make faithfulness   which method is faithful to its model: the README's tables, on the data beside the repository
# make aot    anywhere: every kernel compiled ahead of time, and each held to its budget
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_DEMO := $(VENV)/.installed-for-demo
MINIMUM := 3.11

.PHONY: demo test browser test-main test-interpreter lint docs serve gpu gpu-tests gpu-tune gpu-goals gpu-ablation gpu-operations \
	gpu-explanations gpu-rest gpu-bench tune aot faithfulness bench regressions readme clean

demo: $(INSTALLED_FOR_DEMO)
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
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -m interpreter tests/kernels

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/vitexplain
	@ln -s "$(CURDIR)"/vitexplain/* "$(CURDIR)/kernels" $(TYPED)/vitexplain && ln -s "$(CURDIR)/tests/typing_check.py" $(TYPED)
	cd $(TYPED) && "$(abspath $(BIN))/mypy" --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -n 2 -p vitexplain -m typing_check

# Links to the sources as they are installed: elsewhere mypy does not find vitexplain.kernels.
TYPED := build/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

serve: $(INSTALLED)
	$(BIN)/vitexplain serve

# The GPU machine may have no network: its own torch, triton, timm and scikit-build-core are used.
GPU_BIN := .venv-gpu/bin
GPU_INSTALLED := .venv-gpu/.installed

BUDGET ?= 500
HALF_BUDGET = $(shell expr $(BUDGET) / 2)
RESULTS ?=
ON_GPU = $(GPU_BIN)/python -m bench run --device cuda $(if $(RESULTS),--results $(RESULTS))

gpu: gpu-tests gpu-tune gpu-goals gpu-ablation gpu-operations gpu-explanations gpu-rest

# Files are named because others import what a machine without network lacks.
gpu-tests: $(GPU_INSTALLED)
	$(GPU_BIN)/python -m pytest -m gpu -n 8 -q $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests)

gpu-tune: $(GPU_INSTALLED)
	$(GPU_BIN)/python -m bench.tune --decisions
	$(if $(RESULTS),mkdir -p $(RESULTS) && cp kernels/attention_backward/decisions.csv $(RESULTS))

gpu-goals: $(GPU_INSTALLED)
	$(ON_GPU) explanations --size 'vit_large*/64/*' --size 'vit_base*/128/*' --work tokentm --budget $(HALF_BUDGET); first=$$?; \
	$(ON_GPU) resolution --size '*/16385/*' --size '*/4097/*' --budget $(HALF_BUDGET) && exit $$first

gpu-ablation: $(GPU_INSTALLED)
	$(ON_GPU) ablation --budget $(HALF_BUDGET); first=$$?; \
	$(ON_GPU) resolution --size '*/5477/*' --size '*/1370/*' --size '*/197/*' --budget $(HALF_BUDGET) && exit $$first

gpu-operations: $(GPU_INSTALLED)
	$(ON_GPU) operations --budget $(BUDGET)

gpu-explanations: $(GPU_INSTALLED)
	$(ON_GPU) explanations --budget $(BUDGET)

gpu-rest: $(GPU_INSTALLED)
	$(ON_GPU) cold_start evaluations data_sets --budget $(BUDGET)

CASES ?=

gpu-bench: $(GPU_INSTALLED)
	$(ON_GPU) $(CASES) --budget $(BUDGET)

tune: $(GPU_INSTALLED)
	$(GPU_BIN)/python -m bench.tune
	$(GPU_BIN)/python -m bench.tune --decisions

# Where $(PYTHON) is of a virtual environment itself, a new one sees what its base has, not what it has: it is named here.
OWN_PACKAGES = import sysconfig; print(*dict.fromkeys(map(sysconfig.get_path, ('purelib', 'platlib'))), sep='\n')

$(GPU_INSTALLED): pyproject.toml CMakeLists.txt
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	$(PYTHON) -c "$(OWN_PACKAGES)" > "$$($(GPU_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
	$(GPU_BIN)/python -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
	touch $@

aot: $(INSTALLED)
	cmake -B build/aot -DVITEXPLAIN_AOT=ON -DPython_EXECUTABLE="$(abspath $(BIN))/python"
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

$(INSTALLED_FOR_DEMO): pyproject.toml CMakeLists.txt
	@$(PYTHON) -c "import sys; v = tuple(map(int, '$(MINIMUM)'.split('.'))); sys.exit(sys.version_info < v and 'expected Python >= $(MINIMUM), received ' + sys.version.split()[0])"
	@echo "installing into $(VENV): torch alone is some gigabytes, and takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

# On top of it everything else: what tests, documentation and benchmarks need.
$(INSTALLED): $(INSTALLED_FOR_DEMO)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build dist .pytest_cache .ruff_cache .mypy_cache
