# Two commands do everything, from a bare clone: `make reproduce` and `make test`.
PYTHON  ?= python3
PROFILE ?= tiny
PY      := .venv/bin/python
STAMP   := .venv/.installed
EXTRAS  := cpu,track,onnx,dev
DOCS    := .venv/.docs

.DEFAULT_GOAL := help
.PHONY: help install reproduce results test test-isa test-gpu lint readme notebooks docs lab clean

help:
	@echo "make reproduce   the whole companion at PROFILE=$(PROFILE) -> reports/$(PROFILE)/index.html; ALL=1: sister systems too"
	@echo "make results     what the pages of reports/$(PROFILE) show, into reports/README.md and reports/results"
	@echo "make test        notebooks, pytest, nbdev checks, papermill runs; FAST=1: what answers within three minutes"
	@echo "make lint        ruff on notebooks and tests, and what ruff cannot tell"
	@echo "make test-isa    precision tests and a smoke road under each instruction set of this CPU"
	@echo "make test-gpu    every CUDA path against its CPU twin, with a report to paste"
	@echo "make lab         JupyterLab on the notebooks"
	@echo "make docs        notebooks, README and a page a module as a static site -> _site/index.html"
	@echo "make readme      README.md from nbs/index.ipynb"
	@echo "make notebooks   nbdev_export + nbdev_clean (before every commit)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cion_nb needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: on Debian or Ubuntu, apt-get install python3-venv"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)

reproduce: $(STAMP)
	$(PY) -m cion_nb reproduce --profile $(PROFILE) $(if $(ALL),--all)

results: $(STAMP)
	$(PY) -c "from cion_nb.companion.publishing import keep_pages, publish; keep_pages('$(PROFILE)'); publish()"

test: $(STAMP)
	@FAST=$(FAST) $(PY) .ci/test.py

lint: $(STAMP)
	@$(PY) .ci/lint.py

test-isa: $(STAMP)
	@$(PY) .ci/test_isa.py

test-gpu: $(STAMP)
	@$(PY) .ci/test_gpu.py

readme: $(STAMP)
	$(PY) .ci/readme.py

notebooks: $(STAMP)
	$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"
	$(PY) -c "from nbdev.clean import nbdev_clean; nbdev_clean()"

$(DOCS): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $(DOCS)

docs: $(DOCS)
	@$(PY) .ci/docs.py

lab: $(STAMP)
	$(PY) -m jupyter lab nbs

clean:
	rm -rf .venv runs reports/tiny reports/small reports/paper_runs build _site *.egg-info
