# Everything starts from nothing: each target first installs what is missing (scripts/bootstrap).
PY := .venv/bin/python

# What a run keeps for the next one: images, mostly. Safe to delete.
CACHE := .cache

.PHONY: demo test unit e2e lab lab-kvm lint format bench bench-lab docs clean help

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo:  ## build a Debian guest; run, snapshot, fork, restore it; say how long each step took
	@scripts/bootstrap
	@$(PY) scripts/demo.py

test: lint  ## lint, then every test but those in a lab (make lab)
	$(PY) -m pytest -m "not lab" $(PYTEST_ARGS)

unit:  ## the tests that start no guest; seconds
	@scripts/bootstrap dev
	$(PY) -m pytest -m "not guest" $(PYTEST_ARGS)

e2e:  ## the tests on real guests
	@scripts/bootstrap dev
	$(PY) -m pytest -m "guest and not lab" $(PYTEST_ARGS)

lab:  ## the tests in a machine in which /dev/kvm is real
	@scripts/bootstrap dev
	POSADA_QEMU="$$($(PY) scripts/lab_qemu.py)" $(PY) -m pytest -m lab $(PYTEST_ARGS)

lab-kvm:  ## a shell in such a machine
	@scripts/bootstrap dev
	@POSADA_QEMU="$$($(PY) scripts/lab_qemu.py)" $(PY) scripts/lab.py kvm

lint:  ## style, types, layers, file rules, generated files
	@scripts/bootstrap dev
	@PY=$(PY) scripts/lint

format:  ## apply the style
	@scripts/bootstrap dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench:  ## measure, beside the peers that are installed, into docs/BENCH.md (BENCH_ARGS=--quick for a taste)
	@scripts/bootstrap
	$(PY) bench/run.py $(BENCH_ARGS)

bench-lab:  ## the kvm engine beside QEMU with KVM, in the lab, into docs/BENCH-LAB.md; 15 minutes (BENCH_ARGS="--only boot" for a part)
	@scripts/bootstrap dev
	$(PY) bench/lab.py $(BENCH_ARGS)

docs:  ## regenerate what is generated: the sync API, its reference, the command line's, the schema
	@scripts/bootstrap dev
	$(PY) scripts/unasync.py
	@for generator in scripts/gen_*.py; do echo $$generator; $(PY) $$generator || exit 1; done

clean:  ## remove what make made, images included
	rm -rf .venv $(CACHE) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
