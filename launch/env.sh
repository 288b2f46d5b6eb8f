# Sourced by the other scripts. malloc on a CPU: XLA and torch take fresh gigabytes every step and give them back, and
# the kernel fills them with zeros each time. Huge pages make that cheaper, and one arena that is kept (no mmap, no
# trimming) makes it happen once: a quarter of a training step (measured: docs/results/speed.md).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456}"
ROOT="${ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
