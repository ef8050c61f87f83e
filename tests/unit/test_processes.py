"""Children that end with their parent, Ctrl-C that waits for its place, and the command a user typed."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from dsft import processes
from dsft.processes import HeldInterrupt
from tests.helpers import COMMANDS, ROOT, hear_interrupts

SECONDS = 10
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's PR_SET_PDEATHSIG")
CHILD = """
import os, sys, time
from dsft.processes import end_with_parent
end_with_parent(int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid(), *map(int, sys.argv[2:]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}])
time.sleep(60)
"""


def start(code: str, *words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )


def has_ended(process: psutil.Process) -> bool:
    give_up = time.monotonic() + SECONDS
    while time.monotonic() < give_up:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_when_its_parent_is_killed(number):
    with start(PARENT) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.ppid() == parent.pid
        parent.send_signal(number)
        parent.wait(SECONDS)
        gone = has_ended(child)
        if not gone:
            child.kill()
        assert gone


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_whose_parent_died_before_it_asked_ends_at_once(number):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait(SECONDS)
    with start(CHILD, dead.pid, int(number)) as child:
        assert child.wait(SECONDS) == -number
        assert child.stdout.read() == ""


@linux
def test_a_child_of_a_living_parent_lives():
    with start(CHILD, os.getpid()) as child:
        assert int(child.stdout.readline()) == child.pid
        assert child.poll() is None
        child.kill()


@linux
def test_a_child_of_process_1_lives():
    """As in a container, where a command is process 1 of its own."""
    code = (
        f"import os, subprocess, sys; assert os.getpid() == 1; subprocess.run([sys.executable, '-c', {CHILD!r}, '1'])"
    )
    words = ["unshare", "--map-root-user", "--user", "--pid", "--fork", "--kill-child", sys.executable, "-c"]
    if subprocess.run([*words, ""], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine gives no namespaces")
    with subprocess.Popen([*words, code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as container:
        assert container.stdout.readline() == "2\n"  # so its parent is process 1
        assert container.poll() is None
        container.kill()


# Ctrl-C


@pytest.fixture
def hears_interrupts():
    """Also where pytest was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_control_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("hears_interrupts")
def test_control_c_waits_until_it_is_let_through():
    with HeldInterrupt() as interrupt:
        press_control_c()
        with pytest.raises(KeyboardInterrupt), interrupt.let_through():
            raise AssertionError("it came before")


@pytest.mark.usefixtures("hears_interrupts")
def test_where_it_is_let_through_it_ends_a_wait_at_once():
    reader, _writer = os.pipe()
    started = time.monotonic()
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt), HeldInterrupt() as interrupt, interrupt.let_through():
        os.read(reader, 1)
    assert time.monotonic() - started < SECONDS


@pytest.mark.usefixtures("hears_interrupts")
def test_an_interrupt_that_was_swallowed_is_raised_again():
    with HeldInterrupt() as interrupt:
        with suppress(KeyboardInterrupt), interrupt.let_through():
            press_control_c()
        with pytest.raises(KeyboardInterrupt), interrupt.let_through():
            raise AssertionError("it went on")


@pytest.mark.usefixtures("hears_interrupts")
def test_a_second_one_does_not_cut_a_clean_up_short():
    with HeldInterrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.let_through():
            press_control_c()
        press_control_c()


@pytest.mark.usefixtures("hears_interrupts")
def test_a_second_one_may_be_let_through_alone():
    with HeldInterrupt() as interrupt:
        press_control_c()
        with interrupt.let_through(another=True):
            pass
        with pytest.raises(KeyboardInterrupt), interrupt.let_through(another=True):
            press_control_c()


@pytest.mark.usefixtures("hears_interrupts")
def test_other_signals_can_do_the_same():
    before = signal.getsignal(signal.SIGTERM)
    with HeldInterrupt(signal.SIGTERM) as interrupt:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), interrupt.let_through():
            raise AssertionError("it came before")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("hears_interrupts")
def test_an_interrupt_during_a_fork_is_not_lost():
    """What Python does around a fork swallows exceptions."""
    os.register_at_fork(after_in_parent=lambda: forks and forks.pop()())
    forks = [press_control_c]
    with HeldInterrupt() as interrupt:
        subprocess.run(["true"], preexec_fn=lambda: None, check=True)
        assert not forks
        with pytest.raises(KeyboardInterrupt), interrupt.let_through():
            raise AssertionError("it came before")


@pytest.mark.usefixtures("hears_interrupts")
def test_after_the_block_an_interrupt_is_raised_as_ever():
    with HeldInterrupt() as interrupt, interrupt.let_through():
        pass
    with pytest.raises(KeyboardInterrupt):
        press_control_c()


@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_a_handler_of_somebody_else_stays(handler):
    signal.signal(signal.SIGINT, handler)
    with HeldInterrupt() as interrupt:
        assert signal.getsignal(signal.SIGINT) is handler
        press_control_c()
        with interrupt.let_through():
            pass
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_than_the_main_one_sets_no_handler():
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: HeldInterrupt().__enter__()).result(SECONDS)


# The command that was typed


def chain(monkeypatch, *command_lines: str) -> None:
    """The launchers of this process, its parent first."""
    monkeypatch.setattr(processes, "launchers", lambda: [(None, shlex.split(line)) for line in command_lines])
    on_path = {"python": "/v/bin/python", "python3": "/v/bin/python3", "torchrun": "/v/bin/torchrun"}
    monkeypatch.setattr(processes.shutil, "which", {**on_path, "deepspeed": "/v/bin/deepspeed"}.get)


@pytest.mark.parametrize(
    ("lines", "typed"),
    [
        (["/v/bin/python3 /v/bin/torchrun --standalone dsft/train.py"], "torchrun --standalone dsft/train.py"),
        (["/v/bin/python3 .venv/bin/torchrun dsft/train.py"], ".venv/bin/torchrun dsft/train.py"),
        (["/w/bin/python3 /w/bin/torchrun dsft/train.py"], "/w/bin/torchrun dsft/train.py"),
        (["python -m torch.distributed.run -m dsft.train"], "python -m torch.distributed.run -m dsft.train"),
        (["/v/bin/python -m torch.distributed.run -m dsft.train"], "python -m torch.distributed.run -m dsft.train"),
        (
            [
                "/v/bin/python3 -u -m deepspeed.launcher.launch --world_info=eyJ9 dsft/train.py",
                "/v/bin/python3 /v/bin/deepspeed dsft/train.py",
            ],
            "deepspeed dsft/train.py",
        ),
        (["/v/bin/python3 /v/bin/torchrun dsft/train.py", "bash run_pipeline.sh"], "bash run_pipeline.sh"),
        (["python dsft/train.py --output_dir 'my run'"], "python dsft/train.py --output_dir 'my run'"),
    ],
)  # fmt: skip
def test_the_command_as_it_was_typed(monkeypatch, lines, typed):
    chain(monkeypatch, *lines)
    assert processes.launch_command() == typed


def test_flags_of_one_start_alone_are_left_out(monkeypatch):
    chain(monkeypatch)
    for words in ("--stop_after_steps 3 --lr 1 --resume a/b", "--resume=a/b --lr 1 --stop_after_steps=3"):
        monkeypatch.setattr(sys, "orig_argv", f"python -m dsft.train {words} --resume_override lr".split())
        command = processes.launch_command(without=("resume", "stop_after_steps"))
        assert command == "python -m dsft.train --lr 1 --resume_override lr"


@pytest.mark.parametrize("own", ["/v/bin/python -m dsft.train --lr 1", "python -m dsft.train --lr 1"])
def test_without_launchers_the_command_is_ones_own(monkeypatch, own):
    chain(monkeypatch)
    monkeypatch.setattr(sys, "orig_argv", own.split())
    assert processes.launch_command() == "python -m dsft.train --lr 1"


@pytest.mark.parametrize(
    "word",
    [
        "dsft/train.py",
        "/a/dsft/validate.py",
        "dsft.train",
        "dsft-train",
        "/v/bin/dsft-train",
        *(f"dsft.{name}" for name in COMMANDS),
        "scripts/run_pipeline.sh",
    ],
)
def test_words_that_are_commands_of_ours(word):
    assert processes._is_command(word)


@pytest.mark.parametrize("word", ["bash", "dsft-run", "out/dsft.txt", "scripts/nothing.sh", "-c", "x.py", "train.py"])
def test_words_that_are_not(word):
    assert not processes._is_command(word)


def test_launchers_are_the_parents_with_a_word_of_ours():
    """From a script of any name, through a process that names it, up to one that does not."""
    code = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
    script = "some/script.py"
    inner = f"import sys; sys.argv[0] = {script!r}; from dsft.processes import launchers; print(len(launchers()))"
    for word, count in ((script, "2"), ("another.py", "0")):
        words = [*[sys.executable, "-c", code] * 2, sys.executable, "-c", inner, word]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == count


def test_a_parent_that_cannot_be_read_ends_the_climb(monkeypatch):
    def refuse(self):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "cmdline", refuse)
    assert processes.launchers() == []
    assert processes.launch_command()
