# Everything runs in .venv, which is made on first use: Python >= 3.11, make and git are
# all that has to be there.
#
#   make train EXP=quickstart [RUN=runs/quickstart] [ARGS="--steps 3 --seed 1"]
#   make reward-model EXP=alignment_reward_model [RUN=…] [ARGS=…]
#   make eval RUN=runs/quickstart [STEP="60 120"] [OUT=…] [ARGS="--eval.samples 16"]
#   make eval RUN=Qwen/Qwen2.5-0.5B-Instruct ARGS="--eval.benchmarks math500 aime24"
#   make compare RUNS="runs/a runs/b" [OUT=directory]
#   make sample RUN=runs/quickstart PROMPT="a3b4c2"
#   make report RUN=…       make export RUN=… OUT=directory
#   make variance RUN=… [ARGS="--steps 0 60 120 --prompts 64"]
#   make plan EXP=quickstart TOPOLOGY=v5e:2x2 [ARGS="--search"]
#   make test [WORKERS=2] [ARGS="tests/losses_test.py -k clip"]
#   make lint               make bench
#   make bench-peers        (the same beside TRL and Tunix, which get a .venv-peers)
#   make test-parity        beside transformers; installs PyTorch into .venv-parity
#   make test-plan          for absent TPUs; installs libtpu into .venv-plan

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
  && echo $$p && break; done)
# Which JAX: of a TPU VM, of an NVIDIA driver, or of neither. JAX_EXTRA= overrides.
JAX_EXTRA ?= $(shell \
  if [ -n "$$(ls /dev/accel* /dev/vfio/[0-9]* 2>/dev/null)" ] \
    && grep -qi google /sys/class/dmi/id/product_name 2>/dev/null \
    && ! nvidia-smi -L >/dev/null 2>&1; then echo tpu; \
  elif nvidia-smi -L >/dev/null 2>&1; then echo cuda; fi)
OPO := $(VENV)/bin/python -m opo_jax
EXTRAS = $(if $(JAX_EXTRA),[$(JAX_EXTRA)])
RUN ?= runs/$(EXP)

.PHONY: install train reward-model eval compare sample report variance export plan \
  test test-parity parity-table test-plan lint bench bench-peers clean
.DEFAULT_GOAL := help

help:
	@sed -n '4,/^$$/s/^# \{0,1\}//p' Makefile

# One stamp for what running needs, one for what testing needs besides.
INSTALLED := $(VENV)/.installed-$(or $(JAX_EXTRA),cpu)
PIP := $(VENV)/bin/python -m pip
INSTALL := $(PIP) install -q --disable-pip-version-check -c constraints.txt

$(INSTALLED): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it (make PYTHON=...)." >&2; exit 2; }
	@echo "Installing into $(VENV) (once; $(or $(JAX_EXTRA),cpu) JAX)"
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(INSTALL) -e '.$(EXTRAS)'
	@touch $@

$(VENV)/.installed-dev: $(INSTALLED)
	@$(INSTALL) -e '.[dev]'
	@touch $@

install: $(INSTALLED)

train: $(INSTALLED)
	@test -n "$(EXP)" || { echo "error: which experiment? make train EXP=quickstart; there are: $$(cd experiments && ls [a-z]*.py | sed 's/\.py//' | tr '\n' ' ')" >&2; exit 2; }
	@$(OPO) train $(EXP) --run "$(RUN)" $(ARGS)

reward-model: $(INSTALLED)
	@test -n "$(EXP)" || { echo "error: which experiment? make reward-model EXP=alignment_reward_model" >&2; exit 2; }
	@$(OPO) reward-model $(EXP) --run "$(RUN)" $(ARGS)

eval: $(INSTALLED)
	@$(OPO) eval "$(RUN)" $(if $(STEP),--step $(STEP)) $(if $(OUT),--out "$(OUT)") $(ARGS)

compare: $(INSTALLED)
	@test -n "$(RUNS)" || { echo "error: which runs? make compare RUNS=\"runs/a runs/b\"" >&2; exit 2; }
	@$(OPO) compare $(RUNS) $(if $(OUT),--out "$(OUT)")

sample: $(INSTALLED)
	@test -n "$(PROMPT)" || { echo "error: which prompt? make sample RUN=$(RUN) PROMPT=\"...\"" >&2; exit 2; }
	@$(OPO) sample "$(RUN)" "$(PROMPT)" $(ARGS)

report: $(INSTALLED)
	@$(OPO) report "$(RUN)"

variance: $(INSTALLED)
	@$(OPO) variance "$(RUN)" $(ARGS)

export: $(INSTALLED)
	@test -n "$(OUT)" || { echo "error: where to? make export RUN=$(RUN) OUT=directory" >&2; exit 2; }
	@$(OPO) export "$(RUN)" "$(OUT)" $(ARGS)

# A worker needs 2 GiB and runs whole files, so that a file's fixtures are made once.
WORKERS ?= 2
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev
	@$(VENV)/bin/python $(PYTEST) $(ARGS)

# PyTorch and libtpu stay out of $(VENV): with libtpu there, JAX looks for a TPU at every
# start. Each has a venv of its own, with the extra of its name.
PARITY_VENV ?= .venv-parity
PARITY_PYTHON := $(PARITY_VENV)/bin/python
PLAN_VENV ?= .venv-plan
PLAN_PYTHON := $(PLAN_VENV)/bin/python

$(PARITY_VENV)/.installed: EXTRA := parity
$(PARITY_VENV)/.installed: WITH := PyTorch
$(PLAN_VENV)/.installed: EXTRA := plan
$(PLAN_VENV)/.installed: WITH := libtpu, 205 MB
$(PARITY_VENV)/.installed $(PLAN_VENV)/.installed: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it (make PYTHON=...)." >&2; exit 2; }
	@echo "Installing into $(@D) (once; with $(WITH))"
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,$(EXTRA)]'
	@touch $@

test-parity: $(PARITY_VENV)/.installed
	@$(PARITY_PYTHON) $(PYTEST) tests/parity $(ARGS)

# The table in docs/models.md.
parity-table: $(PARITY_VENV)/.installed
	@JAX_PLATFORMS=cpu $(PARITY_PYTHON) tests/parity/make_table.py

plan: $(PLAN_VENV)/.installed
	@test -n "$(EXP)" && test -n "$(TOPOLOGY)" || { echo "error: what, and on what? make plan EXP=quickstart TOPOLOGY=v5e:2x2" >&2; exit 2; }
	@$(PLAN_PYTHON) -m opo_jax plan "$(EXP)" "$(TOPOLOGY)" $(ARGS)

test-plan: $(PLAN_VENV)/.installed
	@$(PLAN_PYTHON) $(PYTEST) tests/attention_test.py tests/planning_test.py -k absent $(ARGS)

lint: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

bench: $(INSTALLED)
	@for file in benchmarks/*.py; do echo "== $$file"; $(VENV)/bin/python $$file || exit 1; done

# The peers have a Python of their own (Tunix needs 3.12) and packages of their own.
PEERS_VENV ?= .venv-peers
PEERS_PYTHON ?= $(shell for p in python3.12 python3.13 python3 python; do \
  $$p -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null \
  && echo $$p && break; done)
PEERS := benchmarks/peers/requirements.txt

$(PEERS_VENV)/.installed: $(PEERS)
	@test -n "$(PEERS_PYTHON)" || { echo "error: no Python 3.12 or 3.13 found, which Tunix needs; install one, or name it (make bench-peers PEERS_PYTHON=...)." >&2; exit 2; }
	@echo "Installing TRL and Tunix into $(PEERS_VENV) (once; torch and JAX, minutes)"
	@$(PEERS_PYTHON) -m venv --clear $(PEERS_VENV)
	@$(PEERS_VENV)/bin/python -m pip install -q --disable-pip-version-check -r $(PEERS)
	@touch $@

bench-peers: $(INSTALLED) $(PEERS_VENV)/.installed
	@for name in rollouts step; do echo "== benchmarks/$$name.py"; $(VENV)/bin/python benchmarks/$$name.py --peers $(PEERS_VENV)/bin/python $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(PLAN_VENV) $(PEERS_VENV)
