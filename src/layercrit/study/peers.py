"""The processes that run one study at the same time: they must mean the same study, and see the same folder."""

import hashlib
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layercrit.errors import StudyError, UnfinishedPilotError
from layercrit.locks import about_holder, is_free
from layercrit.machine import versions
from layercrit.study.file import StudyFile
from layercrit.study.ranks import Shard
from layercrit.study.shards import holders, shard_folder
from layercrit.study.store import FILE, Store

__all__ = ["about_run", "check_folder", "check_peers", "wait_for_pilots"]

_STARTS = "shards/starts"
_PATIENCE = 120.0  # seconds for processes that were started together to appear
_LOOK_AGAIN, _LONGEST_PAUSE = 0.5, 10.0  # seconds
_SAME_VERSIONS = ("layercrit", "torch")


def about_run(study: StudyFile, shard: Shard | None) -> dict[str, Any]:
    """Return what a process tells others while it runs a study."""
    return {
        "shard": None if shard is None else str(shard),
        "study": hashlib.sha256(study.to_toml().encode()).hexdigest(),
        "versions": versions(),
    }


def check_peers(folder: Path, number: int, about: Mapping[str, Any]) -> None:
    """Make sure that processes that run the study in a folder now are about the same, and share it alike.

    Args:
        folder: of the study.
        number: of this process' shard, from 1; 0: it runs the whole study.
        about: what this process tells of itself, see `about_run`.

    Raises:
        StudyError: one is not.
    """
    for other, who in holders(folder).items():
        theirs = about_holder(shard_folder(folder, other))
        if other == number or not theirs:
            continue
        why = _conflict(folder, number, about, other, who, theirs)
        if why and not is_free(shard_folder(folder, other)):  # on another machine it may have been killed just now
            raise StudyError(why)


def _conflict(
    folder: Path, number: int, about: Mapping[str, Any], other: int, who: str, theirs: Mapping[str, Any]
) -> str | None:
    """Say why this process and another one that runs cannot share the study; None if they can."""
    they = f"shard {theirs.get('shard')}" if other else "the whole study"
    if number == 0 or other == 0:
        return (
            f"The study in {folder} is being run by {who}, as {they}. A study is run by one process or in shards, "
            "not both. Wait for it, or stop it."
        )
    if theirs.get("study") != about["study"]:
        return (
            f"{they} of the study in {folder} ({who}) is of another study file: their models, images or settings "
            "differ. Give all shards the same file, or another folder with --out."
        )
    if _n_shards(theirs) != _n_shards(about):
        return (
            f"{who} runs as shard {theirs.get('shard')} of the study in {folder}, and this process is shard "
            f"{about['shard']}: all shards that run at the same time must have the same N. Wait for the others, "
            "or stop them; what has been measured is not measured again."
        )
    unlike = [
        f"{name} {theirs.get('versions', {}).get(name)} on {theirs.get('machine')}, {version} on {platform.node()}"
        for name, version in about["versions"].items()
        if name in _SAME_VERSIONS and theirs.get("versions", {}).get(name) != version
    ]
    if unlike:
        return (
            f"The shards of the study in {folder} run under different versions: {'; '.join(unlike)}. Install the "
            "same ones on all machines: numbers of different versions are not to be mixed."
        )
    return None


def check_folder(folder: Path, shard: Shard) -> None:
    """Make sure that all shards that a launcher started together see one folder: the first one leaves a file in it.

    Raises:
        StudyError: this process does not see the file.
    """
    if shard.start is None or "ARRAY" in shard.origin:  # whose jobs may begin hours after each other
        return
    mark = folder / _STARTS / hashlib.sha256(shard.start.encode()).hexdigest()[:32]
    if shard.number == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        for former in mark.parent.iterdir():
            former.unlink(missing_ok=True)
        mark.write_text(platform.node(), encoding="utf-8")
        return
    deadline = time.monotonic() + _PATIENCE
    while not mark.exists():
        if time.monotonic() > deadline:
            raise StudyError(
                f"{platform.node()} does not see in {folder} what shard 1/{shard.of} has written there: either that is "
                "another folder, on a disk of each machine, or shard 1 did not start. Name a folder that all machines "
                "share, with --out."
            )
        if mark.parent.is_dir():
            list(mark.parent.iterdir())  # which makes clients of network file systems look again
        time.sleep(_LOOK_AGAIN)


def wait_for_pilots(
    folder: Path, shard: Shard, mark: Mapping[str, Any], store: Store, say: Callable[[str], Any]
) -> None:
    """Wait until all shards have run their share of the pilot, from which the further trials are planned.

    Args:
        folder: of the study.
        shard: that of this process, which has run its own share.
        mark: what each shard writes when its share is run.
        store: of this shard.
        say: told once for which shards it waits.

    Raises:
        UnfinishedPilotError: nobody runs the shards that are missing.
    """
    with store.transaction():
        store.put_meta("pilot", mark)
    said, last_seen, pause = False, time.monotonic(), _LOOK_AGAIN
    missing = [n for n in range(1, shard.of + 1) if n != shard.number + 1]
    while missing := [n for n in missing if not _has(folder, n, mark)]:
        listed = ", ".join(map(str, missing[:10])) + ("..." if len(missing) > 10 else "")
        if set(missing) & holders(folder).keys():
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > _PATIENCE:
            raise UnfinishedPilotError(
                f"The pilot, from which the further trials are planned, is not finished: nobody runs shard {listed} of "
                f"{shard.of}. Run these, and then all shards again; what has been measured is kept."
            )
        if not said:
            say(f"waiting for the pilots of shard {listed} of {shard.of}")
            said = True
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)


def _has(folder: Path, number: int, mark: Mapping[str, Any]) -> bool:
    own = shard_folder(folder, number)
    if not (own / FILE).is_file():
        return False
    with Store(own, read_only=True) as store:
        return bool(store.meta("pilot") == mark)


def _n_shards(about: Mapping[str, Any]) -> str:
    return str(about.get("shard")).partition("/")[2]
