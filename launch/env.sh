# Sourced by the other scripts. Huge pages for malloc: XLA and torch take fresh gigabytes every step on a CPU, and
# filling them 4 KiB at a time costs up to a third of the step (measured: docs/speed.md).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
