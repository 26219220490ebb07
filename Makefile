# Targets for working on qconsume. `make demo` and `make test` need cargo, python3, and one of: a RabbitMQ in BROKER_URL,
# rabbitmq-server on this machine, Docker, or root on Debian (then apt-get installs RabbitMQ).

CARGO ?= cargo

.PHONY: help demo recording check-recording test test-addresses fuzz test-manifests test-kubernetes soak bench image binaries dist verify-dist release deny docs manuals

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 - \2/p' Makefile

demo: ## fills a queue and consumes it, to see what qconsume does
	$(CARGO) build --workspace --locked
	QUEUE=$(if $(BROKER_URL),qconsume-demo-$$$$,job1) PATH="$${CARGO_TARGET_DIR:-target}/$$(rustc -vV | sed -n 's/^host: //p')/debug:$$PATH" $(CARGO) run --quiet --locked --package testbed --bin testbed -- broker -- tests/demo

recording: ## draws docs/demo.svg, the terminal in README.md, from a run of the demo
	tests/recording.py

check-recording: ## runs the demo, and fails if docs/demo.svg shows something else, except for times and order
	tests/recording.py --check

test: ## runs all tests, against a real RabbitMQ
	$(CARGO) test --workspace --locked --no-fail-fast

test-addresses: ## parses a million random addresses, in some minutes
	PROPTEST_CASES=250000 $(CARGO) test --locked --lib broker::reach::address

fuzz: ## six cargo-fuzz targets of untrusted input, FUZZ_SECONDS=60 each; TARGET=pem for one
	tests/fuzz/run

test-manifests: ## docker/ and examples/: checks the manifests, and runs them in Docker
	tests/manifests/run

test-kubernetes: ## follows the READMEs of examples/ on the cluster of kubectl's current context; LOAD_IMAGES='kind load docker-image' loads the images there
	tests/kubernetes/run

soak: ## causes random faults for minutes, and records every message; SOAK='--queue classic --seed 7' or SOAK='--cluster 3' for others
	$(CARGO) build --workspace --locked
	$(CARGO) run --quiet --locked --package testbed --bin soak -- $(SOAK)

bench: $(if $(BENCH_QCONSUME),,binaries) ## measures the static qconsume beside amqp-consume, and writes docs/benchmarks.md; BENCH=--quick only tries it, BENCH_QCONSUME=path measures another binary
	$(CARGO) run --quiet --locked --package testbed --bin bench -- --qconsume $(or $(BENCH_QCONSUME),dist/$(HOST_ARCH)/qconsume) --page docs/benchmarks.md $(BENCH)

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p;/^version/q' Cargo.toml)
REVISION := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)

IMAGE ?= qconsume

# ARCH is amd64 or arm64. Without it, `image` and `binaries` build for this machine's processor, and `dist` for both.
HOST_ARCH := $(patsubst aarch64,arm64,$(patsubst x86_64,amd64,$(shell uname -m)))
ARCHES := $(or $(ARCH),amd64 arm64)
ARCH ?= $(HOST_ARCH)
# The image for another processor gets another tag, so that `qconsume` always runs on this machine.
SUFFIX := $(if $(filter $(HOST_ARCH),$(ARCH)),,-$(ARCH))

# The project's address, for the image's labels: the `repository` of Cargo.toml, once there is one.
URL ?= $(shell sed -n 's/^repository = "\(.*\)"/\1/p' Cargo.toml)
LABEL := --label org.opencontainers.image
LABELS := $(if $(URL),$(LABEL).source=$(URL) $(LABEL).url=$(URL) $(LABEL).documentation=$(URL)\#readme)

BUILD_FLAGS := -f docker/Dockerfile --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(LABELS)
# Docker's legacy builder doesn't set TARGETARCH, and can't build for another --platform than its own.
BUILD := docker build $(DOCKER_BUILD_FLAGS) $(BUILD_FLAGS) $(if $(SUFFIX),--build-arg TARGETARCH=$(ARCH))

image: ## builds the image qconsume, with /qconsume and /qpublish; IMAGE=registry.example/qconsume for another name; with buildx ARCH=arm64 for another processor
	$(BUILD) $(if $(SUFFIX),--platform linux/$(ARCH),-t $(IMAGE)) -t $(IMAGE):$(VERSION)$(SUFFIX) .

# Copies them out of an image that is built without --platform, which the legacy builder doesn't have.
binaries: ## builds the static programs of that image, in dist/amd64 or dist/arm64
	$(BUILD) -t $(IMAGE):binaries-$(ARCH) .
	mkdir -p dist/$(ARCH)
	container=$$(docker create $(IMAGE):binaries-$(ARCH)) && \
	docker cp $$container:/qconsume dist/$(ARCH)/ && docker cp $$container:/qpublish dist/$(ARCH)/; \
	status=$$?; docker rm $$container >/dev/null; docker image rm $(IMAGE):binaries-$(ARCH) >/dev/null; exit $$status

dist: manuals ## writes the files of a release to dist/: static binaries for amd64 and arm64 (or ARCH=arm64), man pages, completions, .tar.gz, .deb, SBOM, checksums
	set -e; for arch in $(ARCHES); do $(MAKE) binaries ARCH=$$arch; done
	docker/dist $(ARCHES)

verify-dist: ## runs `dist` for the last commit twice, in two folders without Docker's cache, and compares the checksums
	docker/verify-dist

release: ## makes dist and pushes the image for both processors: REGISTRY=registry.example/team; without it, says what it would do
	@REGISTRY='$(REGISTRY)' VERSION=$(VERSION) docker/release $(DOCKER_BUILD_FLAGS) $(BUILD_FLAGS)

deny: ## checks licences, versions and sources of all dependencies with cargo-deny
	$(CARGO) deny --locked check licenses bans sources
	@echo 'Advisories are not checked, as that needs the network: cargo deny check advisories'

docs: ## writes docs/options.md and the tables of exit statuses
	$(CARGO) run --quiet --locked --example docgen

manuals: ## writes man pages and shell completions to dist/
	$(CARGO) run --quiet --locked --example docgen -- dist
