# Thin on purpose: cargo builds, the scripts test. `make demo` and `make check`
# need nothing but Rust, gcc and Debian's packages, which `make deps` installs.

PREFIX  ?= /usr/local
LIBDIR  ?= $(PREFIX)/lib
BINDIR  ?= $(PREFIX)/bin
SHARE   ?= $(PREFIX)/share
DESTDIR ?=
CARGO   ?= cargo

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SONAME  := libtproxy.so.0
SOURCES := Makefile tools/shared.sh Cargo.toml Cargo.lock build.rs $(shell find src -name '*.rs')
# Which of the features check, self-test and iptables (Cargo.toml) the library has. The default is all of them. `make FEATURES=`
# builds the small library with none, `make FEATURES="check iptables"` one with these. Only the command line counts: the
# environment of package managers has a variable of this name too.
ifeq ($(origin FEATURES),command line)
CARGO_FEATURES := --no-default-features --features 'capi $(FEATURES)'
BUILD := $(if $(strip $(FEATURES)),$(subst $() ,-,features $(sort $(FEATURES))),small)
else
BUILD := cargo
endif
# A target directory for each choice: what `cargo build` leaves in the usual one has no LTO.
CARGO_DIR := build/$(BUILD)
OUT       := $(CARGO_DIR)/release

# What is installed, and where; uninstall removes just that.
LIBRARIES := $(addprefix $(LIBDIR)/,libtproxy.so libtproxy.so.0 libtproxy.so.$(VERSION) libtproxy.a)
COMPLETIONS := $(SHARE)/bash-completion/completions/tproxyctl $(SHARE)/zsh/site-functions/_tproxyctl
# man/NAME.SECTION goes to man/manSECTION.
PAGES := $(foreach section,3 7 8,$(patsubst man/%,$(SHARE)/man/man$(section)/%,$(wildcard man/*.$(section))))
INSTALLED := $(LIBRARIES) $(LIBDIR)/pkgconfig/tproxy.pc $(PREFIX)/include/tproxy.h \
	$(BINDIR)/tproxyctl $(PAGES) $(COMPLETIONS)

.PHONY: all deps install uninstall demo check bench bench-python fuzz mutants soak clean

all: $(OUT)/libtproxy.so $(OUT)/libtproxy.a $(OUT)/tproxyctl

# One crate type at a time: along with an rlib, cargo skips LTO without a word.
$(OUT)/libtproxy.so: $(SOURCES)
	CARGO='$(CARGO)' CARGO_TARGET_DIR=$(CARGO_DIR) sh tools/shared.sh $(CARGO_FEATURES)
	@touch $@

# rustc says what a program that links the archive needs besides.
$(OUT)/libtproxy.a: $(SOURCES) | $(OUT)/libtproxy.so
	$(CARGO) rustc --release --lib --crate-type staticlib --target-dir $(CARGO_DIR) $(CARGO_FEATURES) -- --print native-static-libs \
		2> $(OUT)/staticlib.log || { cat $(OUT)/staticlib.log >&2; exit 1; }
	@sed -n 's/^note: native-static-libs: //p' $(OUT)/staticlib.log | tail -n 1 > $(OUT)/native-static-libs
	@test -s $(OUT)/native-static-libs || { rm -f $@; echo 'rustc did not name the native libraries' >&2; exit 1; }
	@touch $@

# By the library that was just built. Installed, it looks beside itself, then where the system has its libraries.
CFLAGS ?= -O2
TPROXYCTL := $(addprefix tools/tproxyctl/,tproxyctl.c options.c)
$(OUT)/tproxyctl: $(TPROXYCTL) tools/tproxyctl/options.h include/tproxy.h $(OUT)/libtproxy.so
	$(CC) -std=c11 -pedantic -Wall -Wextra $(CFLAGS) -Iinclude -o $@ $(TPROXYCTL) $(OUT)/libtproxy.so \
		-Wl,-rpath,'$$ORIGIN/../lib' $(LDFLAGS)

deps:
	@sh tests/deps.sh

install: all
	install -d $(sort $(dir $(addprefix $(DESTDIR),$(INSTALLED))))
	install -m 755 $(OUT)/tproxyctl $(DESTDIR)$(BINDIR)/tproxyctl
	for section in 3 7 8; do install -m 644 man/*.$$section $(DESTDIR)$(SHARE)/man/man$$section || exit 1; done
	install -m 644 completions/tproxyctl.bash $(DESTDIR)$(SHARE)/bash-completion/completions/tproxyctl
	install -m 644 completions/tproxyctl.zsh $(DESTDIR)$(SHARE)/zsh/site-functions/_tproxyctl
	install -m 755 $(OUT)/libtproxy.so $(DESTDIR)$(LIBDIR)/libtproxy.so.$(VERSION)
	ln -sf libtproxy.so.$(VERSION) $(DESTDIR)$(LIBDIR)/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(LIBDIR)/libtproxy.so
	install -m 644 $(OUT)/libtproxy.a $(DESTDIR)$(LIBDIR)/libtproxy.a
	install -m 644 include/tproxy.h $(DESTDIR)$(PREFIX)/include/tproxy.h
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' -e 's|@VERSION@|$(VERSION)|' \
		-e "s|@PRIVATE@|$$(cat $(OUT)/native-static-libs)|" tproxy.pc.in > $(DESTDIR)$(LIBDIR)/pkgconfig/tproxy.pc

uninstall:
	rm -f $(addprefix $(DESTDIR),$(INSTALLED))

# The main job on a network of its own, from nothing to a table of what happened.
demo: deps
	@$(MAKE) --no-print-directory -s install DESTDIR= PREFIX=$(CURDIR)/build/stage LIBDIR=$(CURDIR)/build/stage/lib
	@PKG_CONFIG_PATH=$(CURDIR)/build/stage/lib/pkgconfig $(MAKE) --no-print-directory -s -C examples-c OUT=$(CURDIR)/build/examples
	@python3 examples-c/demo.py build/examples

check: deps
	@bash tests/check.sh

# Measures the library beside what users would take instead, and writes docs/benchmarks.md. SECTION="rules calls" measures only these sections.
# QUICK=1 tests in seconds that every benchmark works, and writes to build/bench/quick.
bench:
	@sh tests/deps.sh bench
	@CARGO='$(CARGO)' QUICK='$(QUICK)' DOCS='$(DOCS)' bash benches/run.sh $(SECTION)

# Ten million hostile messages. libFuzzer's hooks (the flags that cargo-fuzz sets) are stable; -Z sanitizer asks for the bootstrap variable.
FUZZ_RUNS ?= 10000000
fuzz: HOST = $(shell rustc -vV | sed -n 's/^host: //p')
fuzz:
	@mkdir -p build/fuzz-corpus
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Z sanitizer=address -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
		-C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
		-C llvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -C codegen-units=1 -C debug-assertions" \
		$(CARGO) build --quiet --release --manifest-path fuzz/Cargo.toml --target $(HOST) --target-dir build/fuzz
	build/fuzz/$(HOST)/release/control -runs=$(FUZZ_RUNS) -max_len=512 -print_final_stats=1 build/fuzz-corpus

# Changes the source in small ways, one at a time, and prints the changes that no test notices (docs/mutants.md).
FILES ?= src/prefix.rs src/prefix/set.rs
TESTS ?= --lib --test golden
mutants:
	@FILES='$(FILES)' TESTS='$(TESTS)' SHARD='$(SHARD)' sh tests/mutants.sh

# A mixed load on the relay, with clients and servers that are killed: every byte compared, nothing left, nothing stuck.
SOAK_SECONDS ?= 900
soak: deps
	@$(MAKE) --no-print-directory -s install DESTDIR= PREFIX=$(CURDIR)/build/stage LIBDIR=$(CURDIR)/build/stage/lib
	@PKG_CONFIG_PATH=$(CURDIR)/build/stage/lib/pkgconfig $(MAKE) --no-print-directory -s -C examples-c OUT=$(CURDIR)/build/examples
	@$(CC) -std=c11 -O2 -pthread tests/c/tcp_load.c -o build/tcp_load
	@python3 tests/c/relay.py build/examples build/tcp_load $(SOAK_SECONDS)

# The fast paths of the Python package, beside the same by hand.
bench-python: $(OUT)/libtproxy.so
	@LIBTPROXY=$(CURDIR)/$< PYTHONPATH=$(CURDIR)/bindings/python python3 bindings/python/bench.py

clean:
	$(CARGO) clean
	rm -rf build
