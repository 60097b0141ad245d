#!/bin/sh
# What it takes to build xtask, which finds the rest: Rust and a linker.
set -eu
needed=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)

if ! command -v cargo > /dev/null; then
    echo "cargo is missing. Install Rust $needed or newer with rustup: https://rustup.rs" >&2
    exit 1
fi
found=$(cargo --version | cut -d ' ' -f 2)
if [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -n 1)" != "$needed" ]; then
    echo "cargo is $found, and Rust $needed or newer is needed: rustup update stable (https://rustup.rs)" >&2
    exit 1
fi
if ! command -v cc > /dev/null; then
    echo "installing Debian packages: build-essential" >&2
    if [ "$(id -u)" -eq 0 ]; then root=; else root=sudo; fi
    $root apt-get update -q > /dev/null
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends build-essential > /dev/null
fi
