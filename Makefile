# Thin on purpose: cargo builds, the scripts test. `make demo` and `make check`
# need nothing but Rust, gcc and Debian's packages, which `make deps` installs.

PREFIX  ?= /usr/local
LIBDIR  ?= $(PREFIX)/lib
DESTDIR ?=
CARGO   ?= cargo

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SONAME  := libtproxy.so.0
SOURCES := Makefile Cargo.toml Cargo.lock build.rs $(shell find src -name '*.rs')
# A target directory of its own: what `cargo build` leaves in the usual one has no LTO.
CARGO_DIR := build/cargo
OUT       := $(CARGO_DIR)/release

# What is installed, and where; uninstall removes just that.
LIBRARIES := $(addprefix $(LIBDIR)/,libtproxy.so libtproxy.so.0 libtproxy.so.$(VERSION) libtproxy.a)
INSTALLED := $(LIBRARIES) $(LIBDIR)/pkgconfig/tproxy.pc $(PREFIX)/include/tproxy.h

.PHONY: all deps install uninstall demo check bench bench-python clean

all: $(OUT)/libtproxy.so $(OUT)/libtproxy.a

# One crate type at a time: along with an rlib, cargo skips LTO without a word.
$(OUT)/libtproxy.so: $(SOURCES)
	$(CARGO) rustc --release --lib --crate-type cdylib --target-dir $(CARGO_DIR)
	@touch $@

# rustc says what a program that links the archive needs besides.
$(OUT)/libtproxy.a: $(SOURCES) | $(OUT)/libtproxy.so
	$(CARGO) rustc --release --lib --crate-type staticlib --target-dir $(CARGO_DIR) -- --print native-static-libs \
		2> $(OUT)/staticlib.log || { cat $(OUT)/staticlib.log >&2; exit 1; }
	@sed -n 's/^note: native-static-libs: //p' $(OUT)/staticlib.log | tail -n 1 > $(OUT)/native-static-libs
	@test -s $(OUT)/native-static-libs || { rm -f $@; echo 'rustc did not name the native libraries' >&2; exit 1; }
	@touch $@

deps:
	@sh tests/deps.sh

install: all
	install -d $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(PREFIX)/include
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

# What the rules cost, beside nft, iptables and ip. As root without a user namespace, where nft cannot send a large set.
bench: HOST_RUNNER = --config 'target.$(shell rustc -vV | sed -n 's/^host: //p').runner=["unshare", "--net"]'
bench:
	@$(CARGO) $(if $(filter 0,$(shell id -u)),$(HOST_RUNNER)) bench --quiet --bench rules

# The fast paths of the Python package, beside the same by hand.
bench-python: $(OUT)/libtproxy.so
	@LIBTPROXY=$(CURDIR)/$< PYTHONPATH=$(CURDIR)/bindings/python python3 bindings/python/bench.py

clean:
	$(CARGO) clean
	rm -rf build
