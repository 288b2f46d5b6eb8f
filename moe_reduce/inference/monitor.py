"""What a machine does while something runs: CPU, memory, GPU and its memory, twice a second, by a thread."""

import shutil
import subprocess
import threading
import time
from types import TracebackType
from typing import NamedTuple

import psutil

SECONDS = 0.5
NVIDIA = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")


class Sample(NamedTuple):
    """One look. GPU figures are of all cards: mean use, summed memory; None where there is no nvidia-smi."""

    seconds: float  # since the first look
    cpu_percent: float  # of all cores
    ram_percent: float
    gpu_percent: float | None
    vram_mb: float | None


class Monitor:
    """`with Monitor() as monitor: …` fills monitor.samples, with the beginning and the end of what runs at least."""

    def __init__(self, pause: float = SECONDS):
        self.samples: list[Sample] = []
        self._pause, self._over = pause, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._nvidia = shutil.which(NVIDIA[0]) is not None

    def __enter__(self) -> "Monitor":
        self._started = time.perf_counter()
        psutil.cpu_percent()  # the first call compares with nothing
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def peak(self, name: str) -> float | None:
        """The largest value of a figure; None where it was never known."""
        found = [value for sample in self.samples if (value := getattr(sample, name)) is not None]
        return max(found, default=None)

    def _watch(self) -> None:
        while not self._over.wait(self._pause):
            self._look()

    def _look(self) -> None:
        seconds = time.perf_counter() - self._started
        gpu = _gpu() if self._nvidia else (None, None)
        self.samples.append(Sample(seconds, psutil.cpu_percent(), psutil.virtual_memory().percent, *gpu))


def _gpu() -> tuple[float | None, float | None]:
    try:
        text = subprocess.run(NVIDIA, capture_output=True, text=True, check=True, timeout=5).stdout
        cards = [[float(value) for value in line.split(",")] for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):  # a driver that does not answer, or says [N/A]
        return None, None
    if not cards:
        return None, None
    return sum(use for use, _ in cards) / len(cards), sum(memory for _, memory in cards)
