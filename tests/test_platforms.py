"""Where the system is neither Linux nor macOS: nothing needs what only these have."""

import subprocess
import sys

import pytest

from small_studies import OPTIONS, write_images, write_weights

# What Windows and, partly, macOS lack. What other libraries take of it they have taken when they were imported.
WITHOUT = """
import errno, importlib, os, pkgutil, runpy, shutil, signal, sys
import filelock, matplotlib.pyplot, pandas, plotly, pyarrow.parquet, timm, torch, torchvision

sys.modules.update(dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios", "tty"]))  # importing them fails
for name in ("EDQUOT", "ENOTSUP", "EOPNOTSUPP"):
    delattr(errno, name)
for name in ("sched_getaffinity", "fork", "forkpty", "killpg", "getpgid", "setsid", "sysconf", "mkfifo", "geteuid",
             "getuid", "uname", "O_NONBLOCK", "register_at_fork"):
    delattr(os, name)
shutil._use_fd_functions = False  # as on Windows; they take O_NONBLOCK
for name in ("SIGHUP", "SIGCHLD", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGPIPE", "pthread_sigmask", "setitimer"):
    delattr(signal, name)

import layercrit
for module in pkgutil.walk_packages(layercrit.__path__, "layercrit."):
    importlib.import_module(module.name)
from layercrit.cli.root import main
main()
"""


@pytest.mark.slow
def test_layercrit__without_what_only_posix_has(tmp_path):
    write_weights(tmp_path / "m0.safetensors", 0)
    write_images(tmp_path / "images.npz", 24)
    command = [
        "measure",
        f"file:m0.safetensors?{OPTIONS}",
        "--images",
        "images.npz",
        "--trials",
        "2",
        "--out",
        "result",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "criticality" in ran.stdout
    assert (tmp_path / "result").is_dir()
