# `make demo` and `make test` set up everything they need. They assume cargo, python3 (3.10 or later)
# with pip and venv, and a C linker.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONPATH := $(abspath python)$(if $(PYTHONPATH),:$(PYTHONPATH))
export KERAS_BACKEND ?= jax
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Stamps: the package installed in $(VENV), with what the demo needs and with everything.
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
SOURCES := pyproject.toml Cargo.toml Cargo.lock $(shell find src -name '*.rs')
# Without build isolation pip uses the venv's maturin, and a rebuild needs no network.
INSTALL := $(BIN)/pip install --quiet --no-build-isolation --editable
# A wheel of `make wheel` that is newer than the sources spares the build: its extension is taken. So is
# an older one where nothing can be built.
WHEEL = $(shell ls -t dist/kconv-*.whl 2>/dev/null | head -1)
CARGO = $(shell command -v cargo 2>/dev/null)
FRESH = $(and $(WHEEL),$(if $(and $(CARGO),$(shell find $(SOURCES) -newer $(WHEEL))),,$(WHEEL)))
UNPACK = import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); [z.extract(n, "python") for n in z.namelist() if n.endswith(".so")]

.DEFAULT_GOAL := help

# With one stride more than by default a step takes half the time, and two epochs still come to 60 %.
.PHONY: demo
demo: $(DEMO) ## Train a kEffNet-B0 on the images in the package; minutes
	$(BIN)/kconv train --skip-strides 2

.PHONY: test
test: $(DEV) ## Build and run all tests: cargo, pytest, doctests
	@if command -v cargo >/dev/null; then cargo test --quiet; \
	  else echo "make test: cargo's tests are skipped, as there is no cargo"; fi
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: check
check: lint stubs test ## What continuous integration runs: lint, stubs, test

.PHONY: lint
lint: $(DEV) ## Check format, style and types
	cargo fmt --check
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/python tools/check_words.py
	cargo clippy --quiet --all-targets -- --deny warnings
	cargo clippy --quiet --all-targets --features python -- --deny warnings
	$(BIN)/mypy

.PHONY: stubs
stubs: $(DEV) ## Compare _kconv.pyi with the built module
	$(BIN)/python -m mypy.stubtest kconv._kconv

.PHONY: fmt
fmt: $(DEV) ## Format the code
	cargo fmt
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Random calls of each kind; SEED repeats a run.
FUZZ ?= 5000
SEED := $(or $(SEED),$(shell date +%s))

.PHONY: fuzz
fuzz: $(DEV) ## Call the kernels at random; minutes
	@echo "make fuzz SEED=$(SEED) FUZZ=$(FUZZ)"
	KCONV_FUZZ_EXAMPLES=$(FUZZ) $(BIN)/python -m pytest tests/kernels/test_fuzz.py --hypothesis-seed=$(SEED)

# On the path without special instructions, as not all checkers know them.
CHECKED := KCONV_ISA=portable KCONV_NUM_THREADS=1
VALGRIND := valgrind --quiet --error-exitcode=1 --leak-check=full
VALGRIND += --show-leak-kinds=definite --errors-for-leak-kinds=definite

.PHONY: valgrind
valgrind: ## Run cargo's tests under valgrind; minutes
	@# All but the one that changes the number of threads, for which a pool is left behind, and the one that asks for
	@# more memory than there is.
	$(CHECKED) cargo test --quiet --config "target.'cfg(all())'.runner='$(VALGRIND)'" \
	  --lib -- --test-threads 1 --skip every_task_runs_once --skip no_memory_ends_the_operation_only

# A nightly toolchain's files, where there is one; rustup is not to install it unasked.
NIGHTLY = $(shell RUSTUP_AUTO_INSTALL=0 rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib
# Miri keeps the environment from the tests unless told otherwise.
MIRIFLAGS := -Zmiri-env-forward=KCONV_ISA -Zmiri-env-forward=KCONV_NUM_THREADS

.PHONY: miri
miri: ## Run cargo's tests under Miri; minutes
	@if [ -d "$(NIGHTLY)/src" ] && cargo +nightly miri --version >/dev/null 2>&1; then \
	  $(CHECKED) MIRIFLAGS="$(MIRIFLAGS)" cargo +nightly miri test --quiet --lib; \
	else \
	  echo "make miri: skipped, there is no nightly toolchain with the components miri and rust-src"; \
	fi

# With every instruction set of this machine. The pool left behind when a test changes the number of threads is no leak,
# and a test asks for more memory than there is.
.PHONY: asan
asan: ## Run cargo's tests with AddressSanitizer; minutes
	@target=$$(rustc -vV | sed -n 's/^host: //p'); \
	if ls "$(NIGHTLY)/$$target/lib/"*_rt.asan.a >/dev/null 2>&1; then \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 RUSTFLAGS=-Zsanitizer=address \
	    cargo +nightly test --quiet --lib --target "$$target" --target-dir target/asan; \
	else \
	  echo "make asan: skipped, there is no nightly toolchain with AddressSanitizer"; \
	fi

.PHONY: sanitize
sanitize: valgrind miri asan ## Run all three

# Seconds, as there is no end to it.
SECONDS ?= 60

.PHONY: fuzz-programs
fuzz-programs: ## Read and run fused programs of random bytes; SECONDS=60
	@if [ -d "$(NIGHTLY)" ] && cargo +nightly fuzz --version >/dev/null 2>&1; then \
	  cargo +nightly fuzz run program -- -max_total_time=$(SECONDS) -max_len=4096; \
	else \
	  echo "make fuzz-programs: skipped, there is no nightly toolchain with cargo-fuzz"; \
	fi

.PHONY: bench
bench: $(DEV) ## Time the kernels beside other libraries
	for what in pointwise interleave depthwise memory frameworks; do $(BIN)/python benches/compare.py $$what || exit; done

# On Linux, zig links against an old glibc, so that one file serves all systems from 2018 on.
ifeq ($(shell uname -s),Linux)
PORTABLE := --zig --compatibility manylinux_2_28
endif

.PHONY: wheel
wheel: | $(BIN)/maturin ## Build dist/kconv-*.whl, and try it on every Python that is here
	$(BIN)/pip install --quiet ziglang auditwheel
	rm -rf dist
	$(BIN)/maturin build --release $(PORTABLE) --out dist
	$(BIN)/maturin sdist --out dist
	$(BIN)/python tools/check_wheel.py dist/kconv-*.whl

.PHONY: docs
docs: $(DEV) ## Build the documentation's site, strictly
	$(INSTALL) '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: clean
clean: ## Remove what building and testing made, but not $(VENV) and runs/
	cargo clean
	rm -rf dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache python/kconv/*.so
	rm -f $(DEMO) $(DEV)
	find python tests -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help
help: ## Show this
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(BIN)/maturin:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kconv needs Python 3.10 or later, not " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'maturin>=1.16,<2'

$(DEMO): EXTRAS := jax
$(DEV): EXTRAS := all,dev
$(DEMO) $(DEV): $(SOURCES) | $(BIN)/maturin
	@if [ -n "$(FRESH)" ]; then \
	  echo "Installing $(FRESH)[$(EXTRAS)]: minutes, the first time."; \
	  $(BIN)/pip install --quiet '$(FRESH)[$(EXTRAS)]' && $(BIN)/python -c '$(UNPACK)' '$(FRESH)'; \
	else \
	  echo "Building kconv and installing it with [$(EXTRAS)]: many minutes, the first time."; \
	  $(INSTALL) '.[$(EXTRAS)]'; \
	fi
	@touch $@ $(DEMO)
