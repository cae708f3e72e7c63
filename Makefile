# Everything runs in .venv; constraints.txt pins every package, torch's CPU build among them.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo picture test check bench bench-peers clean iproute2

demo: $(STAMP)
	$(BIN)/longspan demo

# The README's picture is the demo's.
picture: demo
	cp runs/demo/picture.svg docs/demo.svg

# Tests wait for processes half of their time; those that take times go by themselves.
BESIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(STAMP) iproute2
	$(BIN)/python -m pytest -m "not alone" $(BESIDE)
	$(BIN)/python -m pytest -m alone

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

# One after the other, so that none disturbs another's times.
bench: bench-peers
	@for file in $$(grep -l '^def main' benchmarks/*.py); do \
		echo "== $$file"; $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; done

# What benchmarks compare with; --no-deps, as they would bring another torch.
OTEL := api==1.39.0 sdk==1.39.0 proto==1.39.0 semantic-conventions==0.60b0
OTEL += exporter-otlp-proto-http==1.39.0 exporter-otlp-proto-common==1.39.0
bench-peers: $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-deps setuptools hjson py-cpuinfo psutil msgpack einops
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-deps --no-build-isolation deepspeed==0.19.8
	$(BIN)/pip install -q --no-deps torchft==0.2.0 $(addprefix opentelemetry-,$(OTEL)) \
		protobuf==6.33.2 googleapis-common-protos==1.72.0

# Debian leaves the venv module out of python3; where it is missing, root can mend it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import ensurepip" 2>/dev/null || { apt-get update -qq && apt-get install -y -qq python3-venv; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The lab's tests need ip and tc; root on Debian gets them here, elsewhere those tests skip.
iproute2:
	@if [ "$$(id -u)" = 0 ] && ! command -v tc >/dev/null && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -y -qq iproute2; } >/dev/null 2>&1 || true; fi

clean:
	rm -rf .venv runs
