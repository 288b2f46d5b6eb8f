"""What a process of several tells the others when it ends, through a store in memory."""

from types import SimpleNamespace

import jax
import pytest

from moe_reduce.core.errors import PeerLost
from moe_reduce.training import processes


class Store:
    """The key-value store of the processes, with the heartbeat of a second process."""

    def __init__(self):
        self.values = {f"{processes.KEYS}1": "1"}

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(processes, "distributed", SimpleNamespace(global_state=SimpleNamespace(client=found)))
    monkeypatch.setattr(processes, "PULSE_SECONDS", 0.01)
    return found


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(143), SystemExit),
        (ValueError("a defect"), ValueError),
        (RuntimeError("Gloo: connection closed by peer"), PeerLost),
    ],
)
def test_a_process_that_fails_or_is_interrupted_tells_the_others(store, error, raised):
    with pytest.raises(raised), processes.together():
        raise error
    assert store.values[f"{processes.KEYS}0"] == processes.FAILED


def test_a_process_that_is_done_leaves(store):
    with processes.together():
        pass
    assert store.values[f"{processes.KEYS}0"] == processes.LEFT
