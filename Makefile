# Each target sets up what it needs: a virtual environment in .venv, with the tested versions of constraints.txt.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
TESTS := python -m pytest -n 2 --dist loadgroup
# Python keeps what it has compiled: where it is told not to, every process compiles torch again, which takes longer than importing it.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONWARNINGS = ignore::DeprecationWarning

.PHONY: help setup train test recipes slow lab docs check bench clean
help:            ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 18

setup: $(READY)  ## the environment, by itself
$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aaai_lt needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV): a few minutes, about 6 GB"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(RUN) python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@git config --local include.path ../.gitconfig 2>/dev/null || true
	@touch $(READY)

train: $(READY)  ## the main job on the built-in data: outputs/train.ipynb is the report
	@mkdir -p outputs
	@$(RUN) papermill nbs/train.ipynb outputs/train.ipynb --no-progress-bar --log-output 2>&1 | grep -v -e 'without encryption' -e '^$$' -e '^Executing Cell' -e '^Ending Cell' -e '^<' ; exit $${PIPESTATUS[0]}
	@echo "the report: outputs/train.ipynb (make lab opens it)"

test: $(READY)   ## the tests, in minutes; `make recipes` runs the others that a change must pass
	@$(RUN) $(TESTS) $(ARGS)

recipes: $(READY) ## every recipe, quick, and the longer tests and notebooks
	@$(RUN) $(TESTS) --recipes --timeout=600 $(ARGS)

slow: $(READY)   ## all of them, with hundreds of kills and the cells marked slow
	@$(RUN) $(TESTS) --slow --nb-flags slow --timeout=7200 $(ARGS)

lab: $(READY)    ## JupyterLab on the run notebooks
	@$(RUN) jupyter lab $$([ $$(id -u) = 0 ] && echo --allow-root) nbs/train.ipynb

docs: $(READY)   ## README.md and the site in _docs/
	@$(RUN) python tools/docs.py readme
	@$(RUN) python tools/docs.py site

check: $(READY)  ## notebooks clean, package and README what they export
	@$(RUN) tools/sync

bench: $(READY)  ## the benchmarks; their rows go to benchmarks/results/
	@$(RUN) python benchmarks/throughput.py --data ../shared/data/gtsrb

clean:           ## the environment and what can be built again
	rm -rf $(VENV) build *.egg-info _docs _proc _site_src data/cache data/builtin
