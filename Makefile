# make help lists the commands. Each one builds its own environment in .venv first.
SHELL := bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help book test test-helpers test-lessons test-site lab serve lint format clean lock

VENV ?= .venv
PORT ?= 8000

# The first Python that can run the course. Another one: make PYTHON=/path/to/python3.12 book
CAN_RUN := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(CAN_RUN)' 2>/dev/null && { echo "$$p"; break; }; done)

BIN := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
PY := "$(BIN)/python"
STAGE := .stage

# Kernels, Ray's workers and `!` lines find the environment's own commands first.
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export COURSE_PROGRESS := $(CURDIR)/_build/progress.txt

# Start of a recipe: the lessons append what they are doing to COURSE_PROGRESS, and each line of it
# appears in the terminal while the rest of the recipe runs.
watch = mkdir -p _build && : > _build/progress.txt && \
	{ tail -n0 -f _build/progress.txt & } && watcher=$$! && trap 'kill $$watcher 2>/dev/null' EXIT

# Installs quietly about what is there already, and loudly about what is not.
install = set -o pipefail; PYTHONWARNINGS=ignore $(PY) -m pip install $(1) | { grep -v '^Requirement already satisfied' || true; }

help:
	@echo "make book    run every lesson on this machine and build the site in _build/html"
	@echo "make test    test helpers, run every lesson once in a small size, build and check the site"
	@echo "             (its parts: make test-helpers, make test-lessons, make test-site)"
	@echo "make lab     open JupyterLab at the lessons"
	@echo "make serve   show the built site at http://127.0.0.1:$(PORT)/ (PORT=... for another port)"
	@echo "make clean   remove everything that was built; the environment stays"
	@echo "make lint    check the style with ruff (make format mends it)"
	@echo "make lock    renew constraints.txt, the pinned versions"
	@echo
	@echo "Size of a run: COURSE_IMAGES=256 COURSE_REPEATS=5 make book"
	@echo "Python for the environment (3.11 to 3.13): make PYTHON=python3.12 book"

# --- environment -----------------------------------------------------------------------------

$(VENV)/bin/python:
	@"$(PYTHON)" -c '$(CAN_RUN)' 2>/dev/null || { \
	  echo "The course needs Python 3.11, 3.12 or 3.13, and found: $$("$(or $(PYTHON),python3)" --version 2>&1)."; \
	  echo "Install one and name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -f "$(VENV)"/bin/python*; \
	  echo "Python could not create an environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

NEEDS := $(VENV)/bin/python requirements.txt constraints.txt pyproject.toml

$(VENV)/.course: $(NEEDS)
	@echo "Installing the course into $(VENV). The first time this takes minutes: PyTorch is large."
	@$(call install,-r requirements.txt)
	@touch $@

$(VENV)/.course-tests: $(NEEDS) tests/requirements.txt
	@echo "Installing the course and its tests into $(VENV). The first time this takes minutes."
	@$(call install,-r tests/requirements.txt)
	@touch $(VENV)/.course $@

# Every kernel says that it listens on TCP, which is what Jupyter does by default.
quiet = grep --line-buffered -v 'Kernel is running over TCP without encryption'

# --- the site --------------------------------------------------------------------------------

book: $(VENV)/.course
	@rm -rf _build/html _build/.doctrees _build/results _build/failure.txt
	@$(watch); jupyter-book build . -W -n --keep-going --all 2> >($(quiet) >&2) || { \
	  echo; echo "make book failed."; \
	  cat _build/failure.txt 2>/dev/null || echo "The cause stands above: an error, or a warning."; \
	  exit 1; }
	@echo
	@echo "The site is ready. Open it in a browser:"
	@echo "  $$($(PY) -c 'import pathlib; print(pathlib.Path("_build/html/index.html").resolve().as_uri())')"
	@echo "or run: make serve"

serve:
	@test -f _build/html/index.html || $(MAKE) --no-print-directory book
	@echo "The site is at http://127.0.0.1:$(PORT)/ (stop with Ctrl-C)"
	@python3 -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

lab: $(VENV)/.course
	@jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/lessons

# --- tests -----------------------------------------------------------------------------------

test: $(VENV)/.course-tests
	@failed=""; sub="$(MAKE) --no-print-directory"; \
	$$sub test-helpers || failed="$$failed, helpers"; \
	if $$sub test-lessons; then $$sub test-site || failed="$$failed, site"; \
	else failed="$$failed, lessons (so the site was not built)"; fi; \
	echo; \
	if [ -n "$$failed" ]; then echo "make test FAILED: $${failed#, }. The cause stands above."; exit 1; fi; \
	echo "make test passed: helpers, lessons, site."; \
	$(PY) tests/test_site.py || true

# Everything that needs neither an executed lesson nor the site.
test-helpers: $(VENV)/.course-tests
	@echo "== helpers and structure =="
	@$(PY) -m pytest -m "not site" --timeout=600 tests

quick_size = export COURSE_IMAGES="$${COURSE_IMAGES:-24}" COURSE_REPEATS="$${COURSE_REPEATS:-1}"

# One run of every lesson, in a copy: the notebooks in lessons/ stay without outputs.
# (The copy cannot lie in _build, which nbmake never looks into.)
test-lessons: $(VENV)/.course-tests
	@echo "== lessons =="
	@rm -rf $(STAGE) && mkdir -p $(STAGE) && cp -R lessons book helpers _config.yml _toc.yml $(STAGE)/
	@$(watch); export COURSE_RESULTS="$(CURDIR)/$(STAGE)/_build/results"; \
	$(quick_size); \
	$(PY) -m pytest --nbmake --overwrite -v --durations=0 --durations-min=1 -p no:cacheprovider $(STAGE)/lessons

# The site with the outputs of that run, then the checks of the site.
test-site: $(VENV)/.course-tests
	@echo "== site =="
	@test -d $(STAGE)/lessons || { echo "Run make test-lessons first."; exit 1; }
	@rm -rf $(STAGE)/_build/html $(STAGE)/_build/.doctrees $(STAGE)/book
	@cp -R book _config.yml _toc.yml $(STAGE)/
	@export COURSE_RESULTS="$(CURDIR)/$(STAGE)/_build/results" COURSE_LESSONS_EXECUTED=1; \
	$(quick_size); \
	jupyter-book build $(STAGE) -W -n --keep-going --all || { \
	  echo; echo "The site did not build."; cat $(STAGE)/_build/failure.txt 2>/dev/null; exit 1; }
	@COURSE_SITE="$(CURDIR)/$(STAGE)/_build/html" $(PY) -m pytest -m site --tb=short --timeout=600 tests/test_site.py

# --- upkeep ----------------------------------------------------------------------------------

lint: $(VENV)/.course-tests
	@ruff check . && ruff format --check .

format: $(VENV)/.course-tests
	@ruff check --fix . ; ruff format .

clean:
	rm -rf _build $(STAGE) .pytest_cache .ruff_cache
	@echo "The environment stays; to remove it too: rm -rf $(VENV)"

# One lock for all supported versions of Python; options like "-e ." are left out of it.
lock: $(VENV)/bin/python
	@$(PY) -m pip install --quiet uv
	@mkdir -p _build
	@grep -hvE '^(-|#)' requirements.txt tests/requirements.txt > _build/lock.in
	@$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --output-file _build/lock.txt _build/lock.in > /dev/null
	@{ echo '# Every version of the course, for Python 3.11 to 3.13 on Linux and macOS. Written by `make lock`.'; \
	  cat _build/lock.txt; } > constraints.txt
	@git --no-pager diff --stat -- constraints.txt 2>/dev/null || true
