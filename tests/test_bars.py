"""Progress bars beside processes that are killed."""

import os
import signal
import threading
import time

import pytest

from m4.bars import tqdm


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_is_killed_while_it_draws_holds_no_bar_up(monkeypatch):
    """With tqdm's own lock this waits for ever."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        tqdm.get_lock().acquire()
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(1)
    assert os.read(reader, 1) == b"!"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    free = tqdm.get_lock().acquire(blocking=False)
    assert free
    tqdm.get_lock().release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_made_while_a_bar_is_drawn_can_draw():
    with tqdm.get_lock():
        child = os.fork()
        if child == 0:
            # In another thread of the child the lock would not be its own.
            found = []
            thread = threading.Thread(target=lambda: found.append(tqdm.get_lock().acquire(blocking=False)))
            thread.start()
            thread.join()
            os._exit(0 if found == [True] else 1)
    assert os.waitpid(child, 0)[1] == 0
