"""What the workers of test_executors.py do: a task's payload is a call of one of the generator functions here."""

import logging
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from layercrit.study.executors import Message, Place, Task
from layercrit.study.local_processes import LocalProcesses


def task(name, function, *arguments, affinity="model"):
    return Task(name, affinity, partial(function, *arguments))


def start(place):
    """Do what payloads say."""
    return lambda task: task.payload()


def start_counted(folder, place):
    """Leave a file for each start, and say where each task ran."""
    (folder / f"{os.getpid()} {time.monotonic_ns()}").write_text("")

    def work(task):
        yield os.getpid(), place

    return work


def start_failing_once(flag, place):
    if not flag.exists():
        flag.write_text("")
        raise RuntimeError("no driver here")
    return start(place)


def start_dying(place):
    os._exit(5)


def say(*contents):
    yield from contents


def say_pid():
    yield os.getpid()


def say_pid_often(n, seconds):
    for number in range(n):
        yield number, os.getpid()
        time.sleep(seconds)


def say_pid_and_sleep():
    yield os.getpid()
    time.sleep(60)


def say_pid_and_ignore_terminate():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield from say_pid_and_sleep()


def meet(own, other):
    """Wait until the other task has begun as well."""
    yield os.getpid()
    own.write_text("")
    deadline = time.monotonic() + 20
    while not other.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{other} did not appear")
        time.sleep(0.005)


def meet_and_say(own, other, n):
    yield from meet(own, other)
    yield from range(n)


def raise_after(error, *contents):
    yield from contents
    raise error


def say_unpicklable():
    yield "before"
    yield threading.Lock()
    yield "after"


class Unpicklable:
    def __call__(self):
        yield from ()

    def __reduce__(self):
        raise ValueError("stays at home")


class UnreadableInWorker:
    def __reduce__(self):
        return _fail_to_build, ()


def _fail_to_build():
    raise ValueError("cannot be built here")


def die(log, how, *contents):
    """Note the attempt, say something, and end the process: by a signal, by ``os._exit`` or by ``sys.exit``."""
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    yield from contents
    if how == "sys.exit":
        sys.exit(9)
    if how == "os._exit":
        os._exit(7)
    os.kill(os.getpid(), how)
    time.sleep(60)


def die_at_first(log, n_times, *contents):
    n_before = len(log.read_text().splitlines()) if log.exists() else 0
    yield from die(log, signal.SIGKILL, *contents) if n_before < n_times else contents


def fork_and_die():
    """Leave behind a process that keeps this one's pipes open."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    yield child
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def run_aloud(n_workers):
    """Be the parent in a process of its own: print the workers' ids, which stay at work."""
    tasks = [task(f"{number}", say_pid_and_sleep) for number in range(n_workers)]
    print("begin", flush=True)
    for event in LocalProcesses([Place("cpu", 1)] * n_workers).run(tasks, start):
        print(event.content if isinstance(event, Message) else event, flush=True)


def run_one():
    events = LocalProcesses([Place("cpu", 1)], attempts=1).run([task("a", say, 1)], start)
    print([event.content if isinstance(event, Message) else type(event).__name__ for event in events])


def leave_open(folder):
    """Be a parent that leaves Python while the iterator is held by a module."""
    globals()["held"] = LocalProcesses([Place("cpu", 1)]).run([task("a", say_pid_and_sleep)], start)
    (Path(folder) / "pid").write_text(str(next(globals()["held"]).content))


def log_and_start(place):
    """Log what it does, on top of which a task sends its payload."""
    logger = logging.getLogger("layercrit.jobs")
    logger.info("opened %s", "a model")

    def work(task):
        logger.info("measured %d", task.payload)
        yield task.payload

    return work
