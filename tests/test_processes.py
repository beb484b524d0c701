"""Nothing that a command started goes on after it, whatever ended it."""

from __future__ import annotations

import signal
import sys
import time

import pytest
from support.running import DEAF, Command

from emo_megatron.processes import stops_on_signals

RETURN_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGKILL: -signal.SIGKILL}


def command(code: str) -> list[str]:
    """A command that does this, with the command line's handling of signals."""
    lines = [
        "import sys",
        "from emo_megatron.processes import start, run, stops_on_signals",
        "try:",
        "    with stops_on_signals():",
        *(f"        {line}" for line in code.strip().splitlines()),
        "except KeyboardInterrupt:",
        "    sys.exit(130)",
    ]
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.fixture
def deaf(tmp_path):
    """Command line of such a process, and how many of them are up."""
    script, marks = tmp_path / "deaf.py", tmp_path / "up"
    script.write_text(DEAF)
    marks.mkdir()
    return [str(script), str(marks)], lambda: len(list(marks.iterdir()))


@pytest.mark.parametrize("number", RETURN_CODES)
def test_a_process_ends_with_its_command(deaf, number):
    arguments, num_up = deaf
    started = Command(command(f"run({[sys.executable, *arguments]}, stdout=None)"))
    started.wait_for(lambda: num_up() == 2)
    assert started.end(number) == RETURN_CODES[number]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_and_its_ranks_end_with_their_command(deaf, number):
    arguments, num_up = deaf
    code = f"""
from emo_megatron.runners.launch import python
run(python(*{arguments}, processes=2), stdout=None)
"""
    started = Command(command(code))
    started.wait_for(lambda: num_up() == 4)
    assert started.end(number) == RETURN_CODES[number]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_of_a_test_end_with_it(number):
    code = "import textwrap, time; from support.ranks import Ranks; Ranks(2).run(textwrap.dedent, text=''); "
    code += "time.sleep(600)"
    started = Command([sys.executable, "-c", code])
    # and the process that they are forked from
    started.wait_for(lambda: sum("forkserver" in line for line in started.running()) == 3)
    started.end(number)


WRITING = """
from pathlib import Path
import sys, time
from emo_megatron.cli import main
from emo_megatron.commands import env
from emo_megatron.files import whole

def run(options):
    with whole(Path(folder) / "result") as unfinished:
        unfinished.write_text("half")
        time.sleep(600)

env.run = run
folder = sys.argv[1]
sys.exit(main(["env"]))
"""


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
def test_what_is_half_written_goes_with_its_command(tmp_path, numbers):
    script, folder = tmp_path / "writing.py", tmp_path / "folder"
    script.write_text(WRITING)
    folder.mkdir()
    arguments = [sys.executable, str(script), str(folder)]
    # on a loaded machine a second may pass between two signals that follow each other
    code = f"""
from emo_megatron import processes
processes.GRACE_SECONDS = 60
run({arguments}, stdout=None)
"""
    started = Command(command(code))
    started.wait_for(lambda: any(path.stat().st_size for path in folder.iterdir()))
    assert started.end(*numbers) == RETURN_CODES[numbers[0]]
    assert list(folder.iterdir()) == []


def test_what_a_process_spawned_ends_with_it(tmp_path):
    script, up = tmp_path / "spawn.py", tmp_path / "up"
    script.write_text(f"""
import emo_megatron, multiprocessing, time
def child():
    open({str(up)!r}, "w").close()
    time.sleep(600)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child).start()
    time.sleep(600)
""")
    started = Command(command(f"run({[sys.executable, str(script)]}, stdout=None)"))
    started.wait_for(up.exists)
    assert started.end(signal.SIGKILL) == -signal.SIGKILL


def test_a_fork_of_a_thread_outlives_the_thread(tmp_path):
    script, done = tmp_path / "fork.py", tmp_path / "done"
    script.write_text(f"""
import emo_megatron, os, threading, time
def fork():
    if os.fork() == 0:
        time.sleep(0.5)
        open({str(done)!r}, "w").close()
        os._exit(0)
thread = threading.Thread(target=fork)
thread.start()
thread.join()
os.wait()
""")
    started = Command(command(f"run({[sys.executable, str(script)]}, stdout=None)"))
    assert started.process.wait() == 0, started.process.stdout.read()
    assert done.exists()


def test_a_process_that_another_one_started_is_left_alone(tmp_path):
    # a shell lies between: it is not for us to say how long its children live
    shell = ["bash", "-c", f"{sys.executable} -c 'import emo_megatron; print(1)'; true"]
    started = Command(command(f"run({shell}, stdout=None)"))
    assert started.process.communicate() == ("1\n", None)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops_on_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def _hears_ctrl_c():
    """A process that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_hears_ctrl_c")
def test_a_second_signal_is_heard_only_later(monkeypatch):
    with stops_on_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 5)
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143
