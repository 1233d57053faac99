"""The trackers that layercrit comes with; each imports its library only when it is chosen."""

import contextlib
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercrit.errors import TrackingError, first_line
from layercrit.trackers.tracker import Tracker, metric_of, need, plain_name, tracker

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OLDEST_TRACKIO", "Mlflow", "TensorBoard", "Trackio", "WandB"]

OLDEST_TRACKIO = (0, 22)
"""Earlier versions have no tables, or others."""

_PROJECT = "layercrit"
_SECONDS_TO_ANSWER = 3.0  # for W&B's server
_SECONDS_TO_OPEN = 20.0  # a run on W&B's server
_OK = "ok"


@tracker("wandb")
class WandB(Tracker):
    """W&B (Weights & Biases); offline where no API key is configured or the server does not answer."""

    def __init__(self) -> None:
        self._wandb: Any = need("wandb", "wandb", "wandb")
        self._run: Any = None

    def begin(self, name: str, config: Mapping[str, Any], folder: Path) -> str:
        """Begin or resume the run whose id is kept in the folder; the user's own WANDB_ variables go first."""
        given = {"project": _PROJECT, "name": name, "dir": str(folder), "id": _kept(folder / "wandb-run-id", _new_id)}
        variables = {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "dir": "WANDB_DIR", "id": "WANDB_RUN_ID"}
        given = {key: value for key, value in given.items() if not os.environ.get(variables[key])}
        mode, why = self._mode()
        sync = "wandb sync"
        if mode == "online":
            try:
                self._open(mode, given, config)
            except self._wandb.errors.Error as error:  # the key is wrong, or the server does not answer to it
                mode, why = "offline", f", as W&B did not take the run ({first_line(error)})"
                sync += f" --id {given.get('id') or os.environ['WANDB_RUN_ID']}"
                given["id"] = _new_id()  # W&B's service has the other one in use until this process ends
        if self._run is None:
            with _variable("WANDB_ERROR_REPORTING", "false"):  # else W&B reports on itself to its server, offline, too
                self._open(mode, given, config)
        self._run.define_metric("criticality/*", step_metric="trial")
        self._run.define_metric("progress/*", step_metric="progress/n_done")
        if mode == "online":
            return str(self._run.url)
        files = Path(self._run.settings.sync_dir).parent
        return f"offline{why}; upload with `{sync} {files}/offline-run-*`" if mode == "offline" else mode

    def _open(self, mode: str, given: Mapping[str, str], config: Mapping[str, Any]) -> None:
        self._run = self._wandb.init(
            **given,
            mode=mode,
            config=dict(config),
            resume="allow" if mode == "online" else None,  # offline files of one id are one run once they are synced
            reinit="create_new",  # the user's own runs in this process stay open
            settings=self._wandb.Settings(silent=True, console="off", init_timeout=_SECONDS_TO_OPEN),
        )

    def _mode(self) -> tuple[str, str]:
        """Return the mode, and why it is so in words."""
        settings = self._wandb.setup().settings
        if settings.mode != "online":
            return str(settings.mode), ""
        requests = need("requests", "requests", "wandb")  # W&B's own dependency
        if not (settings.api_key or settings.identity_token_file or requests.utils.get_netrc_auth(settings.base_url)):
            return "offline", ", as no API key is configured (`wandb login`)"
        if os.environ.get("WANDB_MODE") == "online" or _answers(settings.base_url):
            return "online", ""
        return "offline", f", as {settings.base_url} does not answer"

    def config(self, values: Mapping[str, Any]) -> None:
        """Add to the run's config."""
        self._run.config.update(dict(values), allow_val_change=True)

    def cell(self, row: Mapping[str, Any]) -> None:
        """Log a cell against its trial."""
        if row["status"] == _OK:
            self._run.log({metric_of(row): row["cosine"], "trial": row["trial"]})

    def progress(self, n_done: int, n_planned: int) -> None:
        """Log the progress."""
        self._run.log(_progress(n_done, n_planned))

    def result(self, summary: Mapping[str, float], layers: "pd.DataFrame", figures: Mapping[str, Path]) -> None:
        """Log the summary, the table and the figures."""
        self._run.summary.update(dict(summary))
        images = {f"figures/{name}": self._wandb.Image(str(path)) for name, path in figures.items()}
        self._run.log({"layers": self._wandb.Table(dataframe=layers), **images})

    def end(self, ok: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=0 if ok else 1)


@tracker("mlflow")
class Mlflow(Tracker):
    """MLflow: the server of MLFLOW_TRACKING_URI, or else a database in the run's folder."""

    def __init__(self) -> None:
        self._mlflow: Any = need("mlflow", "mlflow", "mlflow")
        self._server = os.environ.get("MLFLOW_TRACKING_URI")
        if not self._server:
            need("sqlalchemy", "mlflow", "mlflow")  # which mlflow-skinny leaves out
        self._client: Any = None
        self._run_id, self._config = "", dict[str, Any]()

    def begin(self, name: str, config: Mapping[str, Any], folder: Path) -> str:
        """Begin the run, or go on with the one whose id is kept in the folder."""
        local = f"sqlite:///{folder / 'mlflow.db'}"
        self._client = self._mlflow.MlflowClient(tracking_uri=self._server or local)
        kept = folder / "mlflow-run-id"
        with contextlib.suppress(OSError, self._mlflow.exceptions.MlflowException):  # none yet, or of another server
            known = self._client.get_run(kept.read_text(encoding="utf-8").strip())
            if known.info.lifecycle_stage == "active":
                self._run_id = known.info.run_id
                self._client.update_run(self._run_id, status="RUNNING")
        if not self._run_id:
            made = self._client.create_run(self._experiment(folder), run_name=name)
            self._run_id = made.info.run_id
            kept.write_text(self._run_id, encoding="utf-8")
        self.config(config)
        return self._server or f"look at it with `mlflow ui --backend-store-uri {local}`"

    def _experiment(self, folder: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        if known := self._client.get_experiment_by_name(name):
            return str(known.experiment_id)
        place = None if self._server else (folder / "mlflow-artifacts").as_uri()  # else the working directory
        return str(self._client.create_experiment(name, artifact_location=place))

    def config(self, values: Mapping[str, Any]) -> None:
        """Log parameters that are new, since MLflow lets none be changed, and all of the configuration as a file."""
        self._config |= values
        known = self._client.get_run(self._run_id).data.params
        for name, value in _flat(self._config):
            if (key := plain_name(name)) not in known:
                self._client.log_param(self._run_id, key, str(value)[:6000])  # MLflow takes no longer ones
        self._client.log_dict(self._run_id, self._config, "config.json")

    def cell(self, row: Mapping[str, Any]) -> None:
        """Log a cell with its trial as step."""
        if row["status"] == _OK:
            self._log({metric_of(row): row["cosine"]}, row["trial"])

    def progress(self, n_done: int, n_planned: int) -> None:
        """Log the progress, with the cells that are done as step."""
        self._log(_progress(n_done, n_planned), n_done)

    def result(self, summary: Mapping[str, float], layers: "pd.DataFrame", figures: Mapping[str, Path]) -> None:
        """Log the summary as metrics, the table and the figures as files."""
        self._log(summary, 0)
        self._client.log_text(self._run_id, layers.to_csv(index=False), "layers.csv")
        for path in figures.values():
            self._client.log_artifact(self._run_id, str(path), "figures")

    def end(self, ok: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._run_id, "FINISHED" if ok else "FAILED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, plain_name(name), value, step=step)


@tracker("tensorboard")
class TensorBoard(Tracker):
    """TensorBoard: event files in the run's folder."""

    def __init__(self) -> None:
        need("tensorboard", "tensorboard", "tensorboard")
        self._module: Any = need("torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer: Any = None
        self._config = dict[str, Any]()

    def begin(self, name: str, config: Mapping[str, Any], folder: Path) -> str:
        """Open a new event file; TensorBoard shows all of a folder as one run."""
        self._writer = self._module.SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
        self.config(config)
        return f"look at it with `tensorboard --logdir {folder / 'tensorboard'}`"

    def config(self, values: Mapping[str, Any]) -> None:
        """Write the configuration as a text."""
        self._config |= values
        text = json.dumps(self._config, indent=2, ensure_ascii=False, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))  # Markdown: as it is

    def cell(self, row: Mapping[str, Any]) -> None:
        """Write a cell with its trial as step, in float32."""
        if row["status"] == _OK:
            self._writer.add_scalar(metric_of(row), row["cosine"], row["trial"])

    def progress(self, n_done: int, n_planned: int) -> None:
        """Write the progress, with the cells that are done as step."""
        for name, value in _progress(n_done, n_planned).items():
            self._writer.add_scalar(name, value, n_done)

    def result(self, summary: Mapping[str, float], layers: "pd.DataFrame", figures: Mapping[str, Path]) -> None:
        """Write the summary as scalars, the table as a text, and the figures."""
        import numpy as np
        from PIL import Image

        for name, value in summary.items():
            self._writer.add_scalar(name, value, 0)
        self._writer.add_text("layers", _markdown(layers))
        for name, path in figures.items():
            with Image.open(path) as image:
                self._writer.add_image(f"figures/{name}", np.asarray(image.convert("RGB")), dataformats="HWC")

    def end(self, ok: bool) -> None:
        """Close the event file."""
        self._writer.close()


@tracker("trackio")
class Trackio(Tracker):
    """Trackio: its database in the run's folder, or the place that TRACKIO_DIR or TRACKIO_SPACE_ID names."""

    def __init__(self) -> None:
        if find_spec("trackio") is None:
            need("trackio", "trackio", "trackio")
        version = metadata.version("trackio")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRACKIO:
            raise TrackingError(
                f"The tracker 'trackio' needs trackio {'.'.join(map(str, OLDEST_TRACKIO))} or newer, but {version} is "
                "installed. Run `pip install -U trackio`, or leave out --track trackio."
            )
        self._trackio: Any = None
        self._run: Any = None

    def begin(self, name: str, config: Mapping[str, Any], folder: Path) -> str:
        """Begin or resume the run of that name in the folder."""
        with _variable("TRACKIO_DIR", str(folder / "trackio")):  # which trackio reads when it is imported
            self._trackio = need("trackio", "trackio", "trackio")
        place = self._trackio.utils.TRACKIO_DIR
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be for JSON
            self._run = self._trackio.init(_PROJECT, name=name, config=dict(config), resume="allow", embed=False)
        return f"look at it with `TRACKIO_DIR={place} trackio show`"

    def config(self, values: Mapping[str, Any]) -> None:
        """Add to the run's config, which trackio sends with the next values."""
        self._run.config.update(values)

    def cell(self, row: Mapping[str, Any]) -> None:
        """Log a cell with its trial as step."""
        if row["status"] == _OK:
            self._run.log({metric_of(row): row["cosine"]}, step=row["trial"])

    def progress(self, n_done: int, n_planned: int) -> None:
        """Log the progress, with the cells that are done as step."""
        self._run.log(_progress(n_done, n_planned), step=n_done)

    def result(self, summary: Mapping[str, float], layers: "pd.DataFrame", figures: Mapping[str, Path]) -> None:
        """Log the summary, the table and the figures."""
        images = {f"figures/{name}": self._trackio.Image(path) for name, path in figures.items()}
        self._run.log({**summary, "layers": self._trackio.Table(dataframe=layers), **images}, step=0)

    def end(self, ok: bool) -> None:
        """Finish the run."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


def _progress(n_done: int, n_planned: int) -> dict[str, float]:
    return {"progress/n_done": n_done, "progress/n_planned": n_planned}


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a moment, unless the user has set it."""
    if os.environ.get(name):
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _kept(path: Path, make: Callable[[], str]) -> str:
    """Return the text of a file, made and kept where it is missing."""
    if not path.exists():
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _new_id() -> str:
    return secrets.token_hex(4)


def _answers(address: str) -> bool:
    """Return whether a server answers, whatever it says; through the user's proxy, if there is one."""
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS_TO_ANSWER):  # noqa: S310, the user's own setting
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested data with their paths, such as ``protocol.trials``."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found += _flat(value, f"{above}{name}.") if inner else [(f"{above}{name}", value)]
    return found


def _markdown(table: "pd.DataFrame") -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy(dtype=object).tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
