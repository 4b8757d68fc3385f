PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PROTOS := $(wildcard protos/lorafold/v1/*.proto)

.PHONY: demo test check protos bench format

demo: $(READY)
	$(BIN)/lorafold demo

test: $(READY)
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=server --grpc_python_out=server --pyi_out=server --mypy_grpc_out=quiet:server $(PROTOS)

bench: $(READY)
	$(BIN)/python -m bench.exactness --quick
	$(BIN)/python -m bench.swap --quick
	$(BIN)/python -m bench.overhead --quick
	$(BIN)/python -m bench.fidelity --quick
	$(BIN)/python -m bench.throughput --quick
	$(BIN)/python -m bench.swap_under_load --quick
	$(BIN)/python -m bench.policy --quick
	$(BIN)/python -m bench.many_adapters --quick
	$(BIN)/python -m bench.metering --quick

# One environment for everything; made again when what it is made from changes.
$(READY): pyproject.toml constraints.txt
	@echo "installing what pyproject.toml and constraints.txt name into .venv; minutes, the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
