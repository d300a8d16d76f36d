# The short words. Each makes its own virtual environment first; only python3 (3.11 or later), make and a package index are needed.
# EXTRAS=cuda (also tpu, prepare, bucket, or several with commas between) goes with any of them and installs those as well.
PYTHON ?= python3
EXTRAS ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed$(EXTRAS:%=-%)
RESULTS ?= runs/results
COMPILE = $(or $(wildcard $(BIN)/uv),uv) pip compile --quiet --universal --python-version 3.11 --no-header --annotation-style line setup.py -o requirements.lock

.PHONY: help install run test test-slow test-gpu lint lab docs record bench readme lock wheel clean

help:          ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)   ## create .venv with the locked versions and this package

$(STAMP): requirements.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"resnet_rs needs Python 3.11 or later, $(PYTHON) is {v[0]}.{v[1]}; say make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	$(if $(EXTRAS),$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[$(EXTRAS)]')
	@touch $@

run: $(STAMP)       ## re-run the paper's Table 1 on the embedded data (SCALE=smoke for a minute's look)
	$(BIN)/papermill nbs/ablation.ipynb -p scale $(or $(SCALE),laptop) -p seeds $(or $(SEEDS),$(if $(filter smoke,$(SCALE)),1,3)) -p results_dir $(RESULTS)

test: $(STAMP)      ## sync of notebooks and library, notebooks (five slow ones apart), tests/
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(STAMP) ## what carries the slow flag
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

test-gpu: $(STAMP)  ## what carries the gpu flag, on one accelerator (EXTRAS=cuda or EXTRAS=tpu)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)      ## slips in notebooks, tests and scripts, and in the workflows
	$(BIN)/ruff check nbs tests benchmarks docs setup.py
	$(BIN)/zizmor --offline --quiet .github

lab: $(STAMP)       ## JupyterLab on the notebooks, which are cleaned as they are saved (LAB_ARGS="--port 9999")
	cd nbs && $(abspath $(BIN))/jupyter lab --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter $(LAB_ARGS)

docs: $(STAMP)      ## the site, built offline into _docs/
	$(BIN)/python docs/build.py

record: $(STAMP)    ## pack finished runs from $(RESULTS) into results/, the committed evidence
	$(BIN)/python -m resnet_rs.records $(RESULTS) results $(if $(ALLOW_DIRTY),--allow-dirty)

bench: $(STAMP)     ## ratios measured on this machine
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

readme: $(STAMP)    ## README.md from nbs/index.ipynb, run anew, and the experiments' saved outputs, from results/
	$(BIN)/python docs/outputs.py
	$(BIN)/python -m jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/index.ipynb
	$(BIN)/python -m jupyter nbconvert --log-level ERROR --to markdown --TemplateExporter.exclude_raw=True --RegexRemovePreprocessor.patterns='^#\|\s*hide' --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=hide_input --NbConvertApp.output_files_dir=docs/images --output-dir . --output README nbs/index.ipynb
	$(BIN)/nbdev_clean --fname nbs/index.ipynb

# First versions that all extras can live with, then the same ones for what `make install` needs.
lock:               ## renew requirements.lock, after `make install` or with uv on the path (UPGRADE=1: all to the newest)
	$(COMPILE) --all-extras $(if $(UPGRADE),--upgrade)
	$(COMPILE) --extra dev

wheel: $(STAMP)     ## source distribution and wheel, into dist/
	$(BIN)/python -m build

clean:              ## remove the environment and build products; runs/ stays
	rm -rf $(VENV) build dist _docs _proc *.egg-info
