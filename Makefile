# `make test` is what CI runs; `make fast` is for the minutes between two edits.
PYTHON ?= python

.PHONY: test fast slow golden lint types format figures bench

test:  # two processes; the tests of a file stay in one, since they share what its fixtures have made
	$(PYTHON) -m pytest -n 2 --dist loadfile

fast:  # no processes of torchrun, no killed runs, no kernels in Triton's interpreter
	$(PYTHON) -m pytest -x --ignore tests/test_resume.py --ignore tests/test_faults.py --ignore tests/test_distributed.py \
		--ignore tests/test_triton.py --ignore tests/test_cuda_offline.py

slow:
	$(PYTHON) -m pytest -m slow

golden:  # the numbers of six small jobs, to the bit, against an earlier commit: make golden REV=main~1
	$(PYTHON) tests/golden.py --against $(REV)

lint:
	ruff check .
	ruff format --check .
	codespell

types:  # mypy over the root and kernels/, as .ci/run does
	$(PYTHON) -m mypy

format:
	ruff check --fix .
	ruff format .

figures:
	$(PYTHON) tests/support/figures.py --step

bench:
	$(PYTHON) benchmarks/peers.py dense
	$(PYTHON) benchmarks/peers.py task
