import contextlib
import functools
import gc
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import executor_jobs as jobs
from layercrit.errors import ProtocolError
from layercrit.study import local_processes
from layercrit.study.executors import Failed, Finished, Message, Place, Task
from layercrit.study.local_processes import LocalProcesses, local_places

PLACE = Place("cpu", 1)
TESTS = Path(__file__).parents[1]

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at /proc")


def run(tasks, n_workers=1, start=jobs.start, attempts=3):
    """Run tasks to their end; every task must have ended once, with its messages before."""
    events = []
    with contextlib.closing(LocalProcesses([PLACE] * n_workers, attempts=attempts).run(tasks, start)) as happening:
        for event in happening:
            assert not any(ended(before, event.task) for before in events), f"{event} after the task's end"
            events.append(event)
    assert sorted(e.task.name for e in events if not isinstance(e, Message)) == sorted(task.name for task in tasks)
    return events


def ended(event, task):
    return not isinstance(event, Message) and event.task == task


def contents(events, name):
    return [event.content for event in events if isinstance(event, Message) and event.task.name == name]


def end_of(events, name):
    return next(event for event in events if not isinstance(event, Message) and event.task.name == name)


def state_and_group(pid):
    """The state of a process, Z for one that waits to be reaped, and its process group; nothing if there is none."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return state, int(group)


def is_alive(pid):
    return state_and_group(pid)[0] not in ("", "Z")


def alive_in_group(group):
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if is_alive(pid) and state_and_group(pid)[1] == group]


def wait_until_gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def exists(pid):
    """Whether a process runs or is a zombie."""
    return Path(f"/proc/{pid}").exists()


def test_run__messages_come_in_order_and_before_the_end():
    tasks = [jobs.task(f"task {i}", jobs.say, *range(i, i + 5)) for i in range(4)]
    events = run(tasks, 2)
    for i, task in enumerate(tasks):
        of_task = [event for event in events if event.task == task]
        assert of_task == [*(Message(task, number) for number in range(i, i + 5)), Finished(task)]


def test_run__many_tiny_tasks():
    tasks = [jobs.task(f"{i}", jobs.say, i, -i, affinity=f"{i % 7}") for i in range(200)]
    events = run(tasks, 3)
    assert all(contents(events, f"{i}") == [i, -i] for i in range(200))
    assert len(events) == 600


def test_run__no_tasks():
    assert run([]) == []


@pytest.mark.parametrize(("level", "logged"), [(logging.INFO, ["opened a model", "measured 1"]), (logging.WARNING, [])])
def test_run__what_workers_log_is_logged_here(level, logged, caplog):
    with caplog.at_level(level, "layercrit"):
        events = run([Task("a", "x", 1)], start=jobs.log_and_start)
    assert contents(events, "a") == [1]
    of_worker = [record for record in caplog.records if record.name == "layercrit.jobs"]
    assert [record.getMessage() for record in of_worker] == logged
    assert all(record.process != os.getpid() for record in of_worker)


def test_run__large_messages():
    events = run([jobs.task(f"{i}", jobs.say, b"x" * 3_000_000, "end") for i in range(4)], 2)
    assert all([len(content) for content in contents(events, f"{i}")] == [3_000_000, 3] for i in range(4))


def test_run__start_is_called_once_in_each_worker_with_its_place(tmp_path):
    places = [Place("cpu", 3), Place("cpu", 5)]
    start = functools.partial(jobs.start_counted, tmp_path)
    events = list(LocalProcesses(places).run([Task(f"{i}", "model", None) for i in range(20)], start))
    ran_at = {event.content for event in events if isinstance(event, Message)}
    starts = [int(path.name.split()[0]) for path in tmp_path.iterdir()]
    assert len(starts) == len(set(starts)) == 2
    assert len({pid for pid, _ in ran_at}) == len(ran_at), "a worker worked at two places"
    assert {place for _, place in ran_at} <= set(places)


def test_run__no_more_workers_than_tasks(tmp_path):
    start = functools.partial(jobs.start_counted, tmp_path)
    list(LocalProcesses([PLACE] * 5).run([Task("a", "a", None), Task("b", "b", None)], start))
    assert len(list(tmp_path.iterdir())) == 2


def test_run__one_worker_goes_from_affinity_to_affinity():
    names = ["a1", "b1", "a2", "c1", "b2", "a3"]
    events = run([jobs.task(name, jobs.say, affinity=name[0]) for name in names])
    assert [event.task.name for event in events] == ["a1", "a2", "a3", "b1", "b2", "c1"]


def test_run__a_worker_keeps_to_its_affinity(tmp_path):
    pairs = [(tmp_path / f"a{i}", tmp_path / f"b{i}") for i in range(4)]
    # Listed a0 a1 b0 a2 b1 a3 b2 b3; the two tasks of a pair can end only while both run.
    a = [jobs.task(path.name, jobs.meet, path, other, affinity="a") for path, other in pairs]
    b = [jobs.task(path.name, jobs.meet, path, other, affinity="b") for other, path in pairs]
    events = run([a[0], a[1], b[0], a[2], b[1], a[3], b[2], b[3]], 2)
    assert all(isinstance(end_of(events, task.name), Finished) for task in a + b)
    assert len({contents(events, task.name)[0] for task in a}) == 1
    assert len({contents(events, task.name)[0] for task in b}) == 1
    begun = [event.task for event in events if isinstance(event, Message)]
    assert [task for task in begun if task in a] == a, "not in the given order"


def test_run__a_free_worker_prefers_an_affinity_that_no_other_is_on(tmp_path):
    first = jobs.task("a1", jobs.meet, tmp_path / "a1", tmp_path / "c1", affinity="a")
    last = jobs.task("c1", jobs.meet, tmp_path / "c1", tmp_path / "a1", affinity="c")
    events = run([first, *(jobs.task(n, jobs.say_pid, affinity=n[0]) for n in ("a2", "a3", "b1")), last], 2)
    begun = [event.task.name for event in events if isinstance(event, Message)]
    assert begun.index("c1") < min(begun.index("a2"), begun.index("a3"))
    assert contents(events, "b1") == contents(events, "c1") != contents(events, "a1")


def test_run__workers_share_an_affinity_when_no_other_is_left(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    events = run([jobs.task("one", jobs.meet, one, two), jobs.task("two", jobs.meet, two, one)], 2)
    assert all(isinstance(event, Message | Finished) for event in events)
    assert contents(events, "one") != contents(events, "two")


def test_run__a_worker_of_many_words_does_not_keep_others_waiting(tmp_path):
    many = jobs.task("many", jobs.meet_and_say, tmp_path / "many", tmp_path / "few", 500, affinity="many")
    few = jobs.task("few", jobs.meet, tmp_path / "few", tmp_path / "many", affinity="few")
    others = [jobs.task(f"{i}", jobs.say, affinity="few") for i in range(5)]
    finished = []
    for event in LocalProcesses([PLACE] * 2).run([many, few, *others], jobs.start):
        time.sleep(0.001)  # slower than words come
        if isinstance(event, Finished):
            finished.append(event.task)
    assert finished == [few, *others, many]


def test_run__an_exception_fails_its_task_and_the_worker_lives_on():
    events = run(
        [
            jobs.task("before", jobs.say_pid),
            jobs.task("bad", jobs.raise_after, ValueError("three\nlines\nof text"), 1),
            jobs.task("bare", jobs.raise_after, NotImplementedError()),
            jobs.task("after", jobs.say_pid),
        ]
    )
    failed = end_of(events, "bad")
    assert failed.error == "ValueError: three\nlines\nof text"
    assert failed.details.startswith("Traceback (most recent call last):")
    assert "in raise_after" in failed.details
    assert contents(events, "bad") == [1]
    assert end_of(events, "bare").error == "NotImplementedError"
    assert contents(events, "before") == contents(events, "after")


def test_run__an_exception_in_start_fails_the_task_and_the_next_gets_a_new_worker(tmp_path):
    start = functools.partial(jobs.start_failing_once, tmp_path / "flag")
    events = run([jobs.task("first", jobs.say, 1), jobs.task("second", jobs.say, 2)], start=start, attempts=1)
    failed = end_of(events, "first")
    assert failed.error == "RuntimeError: no driver here"
    assert "start_failing_once" in failed.details
    assert events[1:] == [Message(events[1].task, 2), Finished(events[1].task)]


def test_run__a_worker_that_dies_in_start_fails_the_task():
    events = run([jobs.task("a", jobs.say), jobs.task("b", jobs.say)], start=jobs.start_dying, attempts=2)
    assert {event.task.name for event in events} == {"a", "b"}
    assert all("died 2 times (exit code 5, exit code 5)" in event.error for event in events)


def test_run__a_message_that_cannot_be_pickled_fails_its_task():
    events = run([jobs.task("a", jobs.say_pid), jobs.task("bad", jobs.say_unpicklable), jobs.task("b", jobs.say_pid)])
    assert contents(events, "bad") == ["before"]
    assert "cannot pickle '_thread.lock' object" in end_of(events, "bad").error
    assert contents(events, "a") == contents(events, "b")


def test_run__a_payload_that_cannot_be_sent_fails_its_task():
    events = run(
        [
            jobs.task("before", jobs.say_pid),
            jobs.task("unpicklable", jobs.Unpicklable()),
            jobs.task("unreadable", jobs.say, jobs.UnreadableInWorker()),
            jobs.task("after", jobs.say_pid),
        ]
    )
    assert end_of(events, "unpicklable").error == "ValueError: stays at home"
    assert "__reduce__" in end_of(events, "unpicklable").details
    assert end_of(events, "unreadable").error == "ValueError: cannot be built here"
    assert contents(events, "before") == contents(events, "after")


def test_run__a_start_that_cannot_be_pickled():
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        LocalProcesses([PLACE]).run([], lambda place: None)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGKILL, r"on cpu died 3 times \(SIGKILL, SIGKILL, SIGKILL\)\. .*memory.*fewer workers.*batch size"),
        (signal.SIGSEGV, r"died 3 times \(SIGSEGV, SIGSEGV, SIGSEGV\)\. Native code crashed"),
        (signal.SIGTERM, r"died 3 times \(SIGTERM, .*job scheduler"),
        ("os._exit", r"died 3 times \(exit code 7, exit code 7, exit code 7\)\. .*stderr"),
        ("sys.exit", r"died 3 times \(exit code 9, exit code 9, exit code 9\)\. Its last output is on stderr"),
    ],
    ids=["kill", "segmentation fault", "terminate", "os._exit", "sys.exit"],
)
def test_run__a_task_that_always_kills_fails_alone(tmp_path, how, words):
    log = tmp_path / "log"
    deadly = jobs.task("deadly", jobs.die, log, how, "last words")
    others = [jobs.task(f"{i}", jobs.say, i) for i in range(6)]
    events = run([*others[:2], deadly, *others[2:]], 2)
    failed = end_of(events, "deadly")
    assert isinstance(failed, Failed)
    assert failed.details == ""
    assert re.search(words, failed.error), failed.error
    assert contents(events, "deadly") == ["last words"] * 3
    assert len(set(log.read_text().split())) == 3, "not in three workers"
    assert [contents(events, f"{i}") for i in range(6)] == [[i] for i in range(6)]


def test_run__attempts_are_counted(tmp_path):
    task = jobs.task("deadly", jobs.die, tmp_path / "log", signal.SIGKILL)
    (failed,) = run([task], attempts=1)
    assert "died once (SIGKILL)" in failed.error
    assert len((tmp_path / "log").read_text().split()) == 1


def test_run__a_task_whose_worker_died_is_run_again(tmp_path):
    task = jobs.task("weak", jobs.die_at_first, tmp_path / "log", 2, "one", "two")
    after = jobs.task("after", jobs.say)
    assert run([task, after]) == [
        *(Message(task, content) for content in ["one", "two"] * 3),
        Finished(task),
        Finished(after),
    ]


def test_run__what_a_worker_said_before_it_died_is_delivered(tmp_path):
    task = jobs.task("deadly", jobs.die, tmp_path / "log", signal.SIGKILL, *range(50))
    events = []
    for event in LocalProcesses([PLACE], attempts=1).run([task], jobs.start):
        if not events:
            time.sleep(0.3)  # meanwhile it says the rest and dies
        events.append(event)
    assert contents(events, "deadly") == list(range(50))
    assert "died once" in events[-1].error


@pytest.mark.parametrize("seed", range(2))
def test_run__workers_killed_at_random_moments(seed):
    generator = random.Random(seed)
    tasks = [jobs.task(f"{i}", jobs.say_pid_often, 4, 0.01, affinity=f"{i % 4}") for i in range(24)]
    events, n_killed = [], 0
    for event in LocalProcesses([PLACE] * 3, attempts=100).run(tasks, jobs.start):
        events.append(event)
        if isinstance(event, Message) and generator.random() < 0.15:
            time.sleep(generator.random() * 0.02)
            with contextlib.suppress(ProcessLookupError):
                os.kill(event.content[1], signal.SIGKILL)
                n_killed += 1
    assert n_killed > 5
    assert sorted(event.task.name for event in events if isinstance(event, Finished)) == sorted(t.name for t in tasks)
    for task in tasks:
        said = contents(events, task.name)
        assert [number for number, _ in said[-4:]] == [0, 1, 2, 3], "the last attempt is not whole"
        by_worker = {pid: [number for number, of in said if of == pid] for _, pid in said}
        assert all(numbers == list(range(len(numbers))) for numbers in by_worker.values())


def test_run__a_dead_worker_is_noticed_although_a_process_it_forked_lives():
    began = time.monotonic()
    (message, failed) = run([jobs.task("forks", jobs.fork_and_die)], attempts=1)
    os.kill(message.content, signal.SIGKILL)
    assert "SIGKILL" in failed.error
    assert time.monotonic() - began < 10


@needs_proc
@pytest.mark.parametrize("how", ["to the end", "close", "throw", "collect"])
def test_run__leaves_no_process_and_no_pipe(how):
    run([jobs.task("first", jobs.say)])  # starts what multiprocessing keeps for all later processes
    gc.collect()
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    job = jobs.say_pid if how == "to the end" else jobs.say_pid_and_sleep
    happening = LocalProcesses([PLACE] * 2).run([jobs.task(f"{i}", job) for i in range(3)], jobs.start)
    pids = [next(happening).content]
    if how == "to the end":
        pids += [event.content for event in happening if isinstance(event, Message)]
    else:
        pids.append(next(happening).content)
        assert all(map(is_alive, pids))
    began = time.monotonic()
    if how == "close":
        happening.close()
    elif how == "throw":
        with pytest.raises(KeyError):
            happening.throw(KeyError("from the consumer"))
    del happening
    gc.collect()
    assert time.monotonic() - began < 2
    assert not any(map(exists, pids))
    assert len(list(Path("/proc/self/fd").iterdir())) == n_open


@needs_proc
def test_run__kills_a_worker_that_does_not_terminate(monkeypatch):
    monkeypatch.setattr(local_processes, "_PATIENCE", 0.3)
    happening = LocalProcesses([PLACE]).run([jobs.task("stubborn", jobs.say_pid_and_ignore_terminate)], jobs.start)
    pid = next(happening).content
    happening.close()
    assert not exists(pid)


def begin_parent(code, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=TESTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@needs_proc
def test_run__workers_end_when_the_parent_is_killed():
    with begin_parent("import executor_jobs; executor_jobs.run_aloud(2)") as parent:
        assert parent.stdout.readline() == "begin\n"
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(map(is_alive, pids))
        parent.kill()
        assert wait_until_gone(pids, 2)
        assert parent.stderr.read() == ""


@needs_proc
@pytest.mark.parametrize("moment", ["at work", 0.03, 0.05, 0.1, 0.2])
@pytest.mark.usefixtures("interruptible")
def test_run__ctrl_c_ends_all_with_one_traceback(moment):
    with begin_parent("import executor_jobs; executor_jobs.run_aloud(3)", start_new_session=True) as parent:
        assert parent.stdout.readline() == "begin\n"
        pids = [int(parent.stdout.readline()) for _ in range(3)] if moment == "at work" else []
        if moment != "at work":
            time.sleep(moment)
        os.killpg(parent.pid, signal.SIGINT)
        said = parent.stderr.read()  # until the last process of the group has closed it
        assert parent.wait(60) == -signal.SIGINT
    assert said.count("Traceback") == 1, said
    assert said.endswith("KeyboardInterrupt\n")
    assert not any(map(is_alive, pids))
    assert wait_until_gone(alive_in_group(parent.pid), 2)  # the resource tracker of multiprocessing ends last


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="cannot hold back signals")
@pytest.mark.usefixtures("interruptible")
def test_interrupts_held__also_from_threads_that_do_not_block_them():
    passed, end = [], threading.Event()
    other = threading.Thread(target=end.wait)

    def interrupt_inside():
        with local_processes._interrupts_held():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
            passed.append(True)

    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_inside()
    finally:
        end.set()
        other.join()
    assert passed == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_run__a_worker_ignores_ctrl_c():
    happening = LocalProcesses([PLACE], attempts=1).run([jobs.task("a", jobs.say_pid_often, 3, 0.1)], jobs.start)
    events = [next(happening)]
    os.kill(events[0].content[1], signal.SIGINT)
    events += happening
    assert [number for number, _ in contents(events, "a")] == [0, 1, 2]
    assert isinstance(events[-1], Finished)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="cannot hold back signals")
@pytest.mark.usefixtures("interruptible")
def test_run__a_worker_ignores_ctrl_c_while_its_interpreter_begins(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "import executor_jobs; executor_jobs.run_one()"
    with begin_parent(code, env={**os.environ, "PYTHONPATH": path}) as parent:
        assert parent.stdout.read() == "[1, 'Finished']\n"
        assert parent.stderr.read() == ""


@needs_proc
def test_run__leaving_python_with_an_open_iterator_ends_the_workers(tmp_path):
    with begin_parent(f"import executor_jobs; executor_jobs.leave_open({str(tmp_path)!r})") as parent:
        assert parent.wait(60) == 0
        assert parent.stderr.read() == ""
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_run__a_later_worker_that_cannot_begin_is_replaced(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from executor_jobs import *\n"
        "n = len(Path('begun').read_text()) if Path('begun').exists() else 0\n"
        "if __name__ == '__main__':\n"
        "    events = LocalProcesses([Place('cpu', 1)]).run([task('a', die_at_first, Path('log'), 1, 'said')], start)\n"
        "    print(*(type(event).__name__ for event in events))\n"
        "else:\n"
        "    Path('begun').write_text('.' * (n + 1))\n"
        "    assert n != 1\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "Message Message Finished\n", done.stderr
    assert (tmp_path / "begun").read_text() == "..."


def test_run__a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from executor_jobs import *\n"
        "print('imported')\n"
        "print(*LocalProcesses([Place('cpu', 1)]).run([task(f'{i}', say) for i in range(5)], start))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "imported\n" * 2, "in more than one worker"
    way_out = "must do so below `if __name__ == '__main__':`"
    assert re.search(f"StudyError: This process is a worker, .*{way_out}", done.stderr), "the worker's"
    ended = f"StudyError: A worker ended with exit code 1 before it began. Its last output is on stderr. .*{way_out}"
    assert re.search(ended, done.stderr.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LocalProcesses([]), "no places for workers: expected at least one"),
        (lambda: LocalProcesses([PLACE], attempts=0), "attempts is 0; expected 1 or more"),
        (
            lambda: LocalProcesses([PLACE]).run([Task("a", "x", 1), Task("b", "x", 1), Task("a", "y", 2)], jobs.start),
            "Two tasks are named 'a'; expected unique names",
        ),
        (lambda: local_places(0, "cpu", 0), "The number of workers is 0; expected a whole number of at least 1"),
        (lambda: local_places(-2, "auto", 4), "The number of workers is -2; expected a whole"),
        (lambda: local_places("2", "cpu", 0), "The number of workers is '2'; expected a whole"),
        (lambda: local_places(None, "cuda", 0), "torch sees no GPU here. Use 'cpu', or 'auto'"),
    ],
    ids=["no place", "no attempt", "same name", "no worker", "fewer than no worker", "a text for workers", "no gpu"],
)
def test_errors__say_what_was_expected(call, words):
    with pytest.raises(ProtocolError, match=words):
        call()


@pytest.mark.parametrize(
    ("n_workers", "device", "n_gpus", "devices", "n_threads"),
    [
        (None, "cpu", 4, ["cpu"], 8),
        (None, "auto", 0, ["cpu"], 8),
        (3, "cpu", 0, ["cpu"] * 3, 2),
        (20, "auto", 0, ["cpu"] * 20, 1),
        (None, "auto", 2, ["cuda:0", "cuda:1"], 4),
        (None, "cuda", 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], 2),
        (1, "cuda", 4, ["cuda:0"], 8),
        (3, "auto", 2, ["cuda:0", "cuda:1", "cuda:0"], 2),
        (None, "cuda:1", 2, ["cuda:1"], 8),
        (2, "cuda:1", 2, ["cuda:1", "cuda:1"], 4),
        (None, "mps", 0, ["mps"], 8),
    ],
)
def test_local_places__shares_gpus_and_cores(monkeypatch, n_workers, device, n_gpus, devices, n_threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert local_places(n_workers, device, n_gpus) == [Place(name, n_threads) for name in devices]


def test_local_places__without_affinity_all_cores_are_divided(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert local_places(2, "cpu", 0) == [Place("cpu", 3)] * 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert local_places(2, "cpu", 0) == [Place("cpu", 1)] * 2


def test_import__loads_nothing_that_takes_seconds():
    code = "import sys, layercrit.study.local_processes; print(sorted({'torch', 'pandas', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
