#!/usr/bin/env bash
# A quarter of an hour on a card: everything that only a GPU can tell, in order of worth, into one file of JSON.
#
#     bash benchmarks/gpu_run.sh                                   all rows, in 12 minutes at most
#     bash benchmarks/gpu_run.sh --minutes 9 --out results.json    another budget, another file
#     bash benchmarks/gpu_run.sh --list                            the rows and their limits
#     bash benchmarks/gpu_run.sh --only kernels decode-8b          these rows
#     bash benchmarks/gpu_run.sh --rehearse                        all of it on the CPU with tiny shapes, in minutes
#
# Needs Python, the program's own packages and nothing from a network; a peer that is not installed is left out and
# named. The same --out again goes on with the rows that are not there yet. PYTHON names another interpreter.
# Then `python benchmarks/gpu_tables.py FILE.json` writes the tables.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_run.py" "$@"
