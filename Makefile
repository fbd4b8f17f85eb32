# The two commands: `make demo` and `make test`. Both install what they need on Debian or Ubuntu (as root), build, and say where time goes.
# A machine without VT-x or AMD-V runs Linux guests in an emulated KVM host (tests/rig).

SHELL := /bin/bash
PROFILE := debug
STEP = tests/step

.PHONY: all bench browser clients deb demo fuzz-api install peers test test-native test-linux lint images build setup clean

all: build images

setup:
	$(STEP) setup guest-images/linux/need gcc=gcc curl=curl python3=python3 debugfs=e2fsprogs

build: setup
	$(STEP) build cargo build --workspace --all-targets

# The digests are noted beside the images: over the rig's 9p a file's holes cannot be skipped.
images: build
	$(STEP) images guest-images/linux/build
	$(STEP) hostile guest-images/hostile/build
	target/$(PROFILE)/stasis templates --images-dir target/images

# Programs and images for this machine, below PREFIX: README's first steps.
PREFIX := /usr/local
install: setup
	$(STEP) build-install cargo build --release --workspace --bins
	$(STEP) images guest-images/linux/build
	packaging/install target/release target/images $(PREFIX)

# The main job, to be watched: create, count, write, pause, look into the bucket, resume, the count goes on.
demo: build images
	$(STEP) demo tests/rig/here-or-rig --time-limit 900 --mem 6144 -- tests/demo target/$(PROFILE)

# Everything: unit and property tests, pulse guests on this machine's /dev/kvm, Debian guests here or in the rig.
test: build images clients browser test-native test-linux
	@$(STEP) --summary

# The VMMs that the benchmark sets beside ours: QEMU of Debian, Firecracker (tests/peers/firecracker).
peers: setup
	guest-images/linux/need qemu-system-x86_64=qemu-system-x86
	tests/peers/firecracker target/peers

# The benchmark, optimised, with the peers that are there. `make bench ARGS=--help` says what can be chosen; without ARGS all of it, about 20 minutes,
# into BENCHMARKS.md.
bench: setup
	$(STEP) build-bench cargo build --release --workspace --bins
	$(STEP) pulse guest-images/pulse/build
	$(STEP) images guest-images/linux/build
	target/release/stasis templates --images-dir target/images
	$(STEP) bench $(if $(ARGS),target/release/stasis-bench $(ARGS),tests/benchmark target/release)

lint: setup
	$(STEP) format cargo fmt --all --check
	$(STEP) clippy cargo clippy --workspace --all-targets -- -D warnings

# The public clients of the API and schemathesis, in environments of their own.
clients: setup
	$(STEP) clients tests/sdk/venvs

# The browser that the page for people is tested in. Without it the test says that it was left out.
browser: setup
	$(STEP) browser guest-images/linux/need chromium=chromium || echo "make: no browser, so the tests of the page are left out" >&2

# Servers in network namespaces are what the egress proxy is tested against.
test-native: build images clients browser
	guest-images/linux/need nft=nftables ip=iproute2
	$(STEP) test-native tests/native

test-linux: build images
	$(STEP) test-linux tests/linux target/$(PROFILE)

# A Debian package of the programs, the service and the scripts that make images: target/debian/stasis_*.deb.
deb: setup
	$(STEP) build-deb cargo build --release --workspace --bins
	$(STEP) agent guest-images/agent/build
	$(STEP) deb packaging/deb target/release target/images/stasis-agent

# The API against its own description, for as long as ARGS (of schemathesis) say.
fuzz-api: ARGS ?= --max-examples 200 --seed 7
fuzz-api: build clients
	$(STEP) fuzz-api env STASIS_SCHEMATHESIS="$(ARGS)" $(SHELL) -c 'cargo test --workspace --test schemathesis'

clean:
	cargo clean
