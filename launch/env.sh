# Sourced by the other scripts. Sets malloc for CPU runs: XLA and torch allocate and free gigabytes in every step, and
# the kernel zeroes fresh memory each time. Huge pages make that cheaper, and one arena that is never returned (no mmap, no
# trimming) makes it happen once, which saves a quarter of a training step (docs/results/speed.md).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456}"
ROOT="${ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
