# Two commands: `make demo` and `make test`. Everything else is `cargo xtask --help`.

IMAGE ?=

.PHONY: demo test toolchain

# Runs a container in a virtual machine and shows how long each phase took. IMAGE=FILE.tar: an image of your own.
demo: toolchain
	@cargo xtask demo $(if $(IMAGE),--image "$(IMAGE)")

# Unit, property and integration tests; ends with "N passed, N failed, N skipped".
test: toolchain
	@cargo xtask test

toolchain:
	@sh xtask/toolchain.sh
