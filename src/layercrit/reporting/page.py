"""One self-contained HTML page of a study: figures to explore, tables, and how it was measured."""

import base64
import contextlib
import gzip
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from layercrit.comparison import Comparison
from layercrit.conditions import STATISTICS_IN_WORDS, Condition
from layercrit.counts import counted, counted_range
from layercrit.differences import compared_differences
from layercrit.epoch_map import EpochMap
from layercrit.errors import StudyError
from layercrit.foreign_text import without_folders
from layercrit.pitfalls import PITFALLS, pitfalls_of_comparison
from layercrit.proxies.of_study import StudyProxies
from layercrit.reporting.advised import advice_data
from layercrit.reporting.epochs import epochs_data
from layercrit.reporting.page_data import page_data
from layercrit.reporting.proxied import proxies_data, read_proxies
from layercrit.reporting.whom import whom_data
from layercrit.study.tables import Study

__all__ = ["write_page"]

_SCRIPTS = (
    "data",
    "texts",
    "plots",
    "heatmap",
    "differences",
    "whom",
    "epochs",
    "proxies",
    "page",
)  # each imports from those before it
_NAMED = 3  # of the most critical, and of the least
_NO_MATCHED = (
    "This study has no temperature-matched values and no chance level: its results were published as means over "
    "images, so it cannot be checked here how far confidence and chance level matter."
)
_DEFINITION = (
    "Each layer's parameters were replaced by fresh draws from the architecture's own initialiser, or by what the "
    "reset says, one layer (or group or set of layers) at a time; everything else stayed as trained. {statistics} "
    "The criticality of a layer is 1 minus the mean over trials and images of the cosine between the softmax outputs "
    "before and after the reset, in [0, 1]; that of a model is the mean over its layers. The cosine is that of softmax "
    "outputs, not of hidden states, and the new values are a fresh draw, not the layer's own values before training. "
    "The method is that of Gavrikov et al. 2024 (arXiv 2410.14470)."
)


def write_page(
    study: Study,
    comparison: Comparison,
    path: str | Path,
    models: Sequence[str] = (),
    thumbnails: bool = False,
    others: Sequence[Comparison] = (),
    epoch_maps: Sequence[EpochMap] = (),
    proxies: StudyProxies | str | Path | None = None,
    pictures: Sequence[tuple[str, Sequence[bytes]]] = (),
) -> Path:
    """Write the page of a study: one self-contained HTML file that works offline.

    Plotly is embedded, compressed. All texts from outside are escaped, and the page's content security policy lets no
    script run but its own.

    Args:
        study: finished or not.
        comparison: of its models, under one reset.
        path: of the file; its folder is created if missing.
        models: those of which it shows criticality by class, where that is known, and advice, under the first
            condition.
        thumbnails: whether it shows, of these models, the images that each layer's reset moves most and least.
        others: of the same study under other conditions, to which readers can switch.
        epoch_maps: of training runs; those of the study's own epochs are shown without being given.
        proxies: of the study's models, or the folder that they were saved in; None: the page has no such section.
        pictures: of each further figure, what it shows in words, and its pictures as SVG.

    Raises:
        StudyError: the file cannot be written, or there are no proxies in the folder, or those of something else.
    """
    path = Path(path).expanduser()
    told = read_proxies(proxies) if isinstance(proxies, str | Path) else proxies
    text = _filled(study, [comparison, *others], models, thumbnails, epoch_maps, told, pictures)
    beside = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # what is no character, as in a file name that is no UTF-8, is shown as Python and JSON write it
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)  # a partial file fills the disk
        raise StudyError(f"{path} cannot be written ({error.strerror}). Name another folder with --out.") from error
    return path


def _filled(
    study: Study,
    comparisons: Sequence[Comparison],
    models: Sequence[str],
    thumbnails: bool,
    epoch_maps: Sequence[EpochMap],
    proxies: StudyProxies | Mapping[str, Any] | None,
    pictures: Sequence[tuple[str, Sequence[bytes]]],
) -> str:
    """Return the page's text."""
    elements = []
    for number, comparison in enumerate(comparisons):
        data, packed = page_data(study, comparison)
        shown = [model["name"] for model in data["models"]]
        data["whom"] = whom_data(study, comparison, [] if number else models, shown, thumbnails)
        data["advice"] = advice_data(study, comparison, [] if number else models, shown)
        data["epochs"] = epochs_data(study, comparison, epoch_maps)
        data["proxies"] = None if number else proxies_data(study, comparison, proxies, shown)
        elements.append(_data(number, data, packed))
    web = resources.files(__package__) / "web"
    script, (hash_of_plotly, plotly) = _script(), _plotly()
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {_hash_of(script)} {hash_of_plotly}; base-uri 'none'; form-action 'none'"
    )
    return Template((web / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(str(study.record.get("name", study.folder.name))),
        version=metadata.version("layercrit"),
        policy=html.escape(policy, quote=True).replace("&#x27;", "'"),
        style=(web / "page.css").read_text(encoding="utf-8"),
        conditions=_choice(comparisons),
        facts=_of_each([html.escape(_facts(study, one)) for one in comparisons], "span"),
        answer=_of_each([_answer(one) for one in comparisons], "div"),
        cautions=_of_each([_cautions(study, one) for one in comparisons], "div"),
        about_differences=_of_each([html.escape(_about_differences(study, one)) for one in comparisons], "span"),
        correlations=_of_each([_correlations(one) for one in comparisons], "div"),
        pitfalls=_pitfalls(),
        further_link='<a href="#further">Further figures</a>\n' if pictures else "",
        further=_further(pictures),
        methods=_of_each([_methods(study, one) for one in comparisons], "div"),
        data="\n".join(elements),
        plotly=plotly,
        script=script,
    )


def _further(pictures: Sequence[tuple[str, Sequence[bytes]]]) -> str:
    """Return the section of further figures; as pictures, no script in one is run."""
    if not pictures:
        return ""
    parts = []
    for summary, files in pictures:
        about = html.escape(summary)
        parts.append(f"<h3>{about}</h3>")
        for svg in files:
            data = base64.b64encode(svg).decode()
            parts.append(f'<img class="further" alt="{about}" src="data:image/svg+xml;base64,{data}">')
    inside = "\n".join(parts)
    return (
        '<section id="further" aria-labelledby="further-title">\n<h2 id="further-title">Further figures</h2>\n'
        f"{inside}\n</section>"
    )


def _choice(comparisons: Sequence[Comparison]) -> str:
    """Return the control to switch between conditions; nothing where there is only one."""
    conditions = [one.condition for one in comparisons if one.condition is not None]
    if len(conditions) < 2:
        return ""
    options = "".join(f"<option>{html.escape(one.label(conditions))}</option>" for one in conditions)
    return f'<label>Condition <select id="condition">{options}</select></label>'


def _of_each(texts: Sequence[str], tag: str) -> str:
    """Return what each condition says in one place; the script shows that of the chosen one."""
    if len(set(texts)) == 1:
        return texts[0]
    return "".join(
        f'<{tag} data-condition="{number}"{" hidden" if number else ""}>{text}</{tag}>'
        for number, text in enumerate(texts)
    )


def _data(number: int, data: Mapping[str, Any], packed: bytes) -> str:
    """Return the elements that hold the data of one condition, by its number."""
    # in a script element only "<" could end it
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    suffix = f"-{number}" if number else ""
    return (
        f'<script type="application/json" id="data{suffix}">{text}</script>\n'
        f'<script type="text/plain" id="differences{suffix}">{_zipped(packed)}</script>'
    )


def _script() -> str:
    """Return the page's modules as one script, which needs no imports and exports."""
    web = resources.files(__package__) / "web"
    modules = "\n".join((web / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    return '"use strict";\n' + re.sub(r"^import [^;]+;\n|^export ", "", modules, flags=re.MULTILINE)


@cache
def _plotly() -> tuple[str, str]:
    """Return the hash of Plotly's script, and the script compressed."""
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs()
    return _hash_of(script), _zipped(script.encode())


def _hash_of(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _zipped(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, compresslevel=9, mtime=0)).decode()


# --- texts ------------------------------------------------------------------------------------------------------------


def _facts(study: Study, comparison: Comparison) -> str:
    n_images = study.of_reset(comparison.reset)["n_images"].dropna()
    images = f" on {counted_range(int(n_images.min()), int(n_images.max()), 'image')}" if len(n_images) else ""
    against = f"; differences are relative to {comparison.baseline}" if comparison.baseline else ""
    origin, common = comparison.origin, " in common" if len(comparison.models) > 1 else ""
    trials = counted_range(origin["fewest_trials"], origin["trials"], "trial")
    return (
        f"{counted(len(comparison.models), 'model')}, {counted(len(comparison.layers), 'layer')}{common}, "
        f"{trials} of the reset {comparison.reset}{images}{against}"
    )


def _answer(comparison: Comparison) -> str:
    """Say which layers, and which models, are most critical and which least, as measured."""
    over = ", mean over the models" if len(comparison.models) > 1 else ""
    listed = {
        f"Most critical layers{over}": comparison.layers["criticality"],
        "Most critical models, mean over layers": comparison.models.set_index("label")["criticality"],
    }
    found = {name: _ends(values) for name, values in listed.items()}
    return "".join(f"<p>{html.escape(f'{name}: {ends}.')}</p>" for name, ends in found.items() if ends)


def _ends(values: pd.Series) -> str:
    """Return the largest values with their names, and the smallest ones."""
    ranked = [f"{name} ({value:.2f})" for name, value in values.dropna().sort_values(ascending=False).items()]
    n = min(_NAMED, len(ranked) // 2)
    return f"{', '.join(ranked[:n])}; least critical: {', '.join(reversed(ranked[-n:]))}" if n else ""


def _cautions(study: Study, comparison: Comparison) -> str:
    parts = [f"<p><strong>Warning:</strong> {html.escape(text)}.</p>" for text in study.warnings]
    applying = pitfalls_of_comparison(study, comparison)
    parts += [
        f"<details><summary>{html.escape(one.title)}</summary>{html.escape(one.text)}</details>" for one in applying
    ]
    if comparison.models["criticality_matched"].isna().all():
        parts.append(f"<p>{html.escape(_NO_MATCHED)}</p>")
    return f'<aside aria-label="Cautions">{"".join(parts)}</aside>' if parts else ""


def _pitfalls() -> str:
    """Return all pitfalls, to which the page's sections link."""
    return "".join(
        f'<h3 id="pitfall-{one.name}">{html.escape(one.title)}</h3><p>{html.escape(one.text)}</p>'
        for one in PITFALLS.values()
    )


def _about_differences(study: Study, comparison: Comparison) -> str:
    """Say how many differences to the baseline are significant, among all of the study."""
    if comparison.baseline is None or len(comparison.models) < 2:
        return "Choose two models or two categories."
    return compared_differences(study, comparison).sentence()


def _correlations(comparison: Comparison) -> str:
    """Return the rank correlations in words, those without one category folded away."""
    lines = []
    rows = comparison.correlations.to_dict("records")
    for spearman, kendall in zip(rows[::2], rows[1::2], strict=True):
        if math.isnan(spearman["statistic"]):
            continue
        without = spearman["without"]
        which = "All models" if without is None else f"Without {str(without).replace('_', ' ')}"
        lines.append(
            f"{which} ({spearman['n']}): Spearman's rho {spearman['statistic']:.2f} (p = {spearman['pvalue']:.2g}), "
            f"Kendall's tau {kendall['statistic']:.2f} (p = {kendall['pvalue']:.2g})."
        )
    if not lines:
        return "<p>There are too few models with a known accuracy for a rank correlation.</p>"
    first, *others = (html.escape(line.replace(" -", " \N{MINUS SIGN}")) for line in lines)
    listed = "".join(f"<li>{line}</li>" for line in others)
    folded = f"<details><summary>Leaving out one category</summary><ul>{listed}</ul></details>" if others else ""
    return f"<p>{first}</p>{folded}"


def _methods(study: Study, comparison: Comparison) -> str:
    """Return how the study was measured: the resolved protocol, notes, versions, and hashes."""
    record, condition = study.record, comparison.condition or Condition()
    protocol = {**record.get("protocol", {}), "resets": comparison.reset}
    several = record.get("probe_sets")
    images = several.get(condition.probe_set, {}) if several else record.get("probe_set", {})
    runs = {json.dumps(run.get("versions", {}), sort_keys=True): run for run in study.runs}
    level = f"{100 * study.level:g}%"
    coverage = (
        ", ".join(sorted(set(study.to_pandas()["covers"]) - {"nothing"})) or "nothing, since there is only one trial"
    )
    about = [
        (
            "intervals",
            f"{level}, for new {coverage}; Student's t, of crossed random effects where per-image values are kept",
        ),
        *([("condition", condition.in_words())] if condition.in_words() else []),
        *((str(name).replace("_", " "), _plain(value)) for name, value in protocol.items() if value is not None),
        *((f"images: {name}", _plain(value)) for name, value in images.items()),
        *((f"versions, run {run['run']}", _plain(run.get("versions", {}))) for run in runs.values()),
        *((f"results: {name}", _plain(value)) for name, value in record.get("origin", {}).items()),
        ("left out", ", ".join(comparison.left_out) or "nothing"),
        ("layercrit", metadata.version("layercrit")),
    ]
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in about)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(_notes(study, comparison)))
    return (
        f"<p>{html.escape(_DEFINITION.format(statistics=STATISTICS_IN_WORDS[condition.norm_statistics].sentence))}</p>"
        + (f"<ul>{notes}</ul>" if notes else "")
        + f"<dl>{listed}</dl>"
        + _hashes(study, comparison)
    )


def _notes(study: Study, comparison: Comparison) -> Iterable[str]:
    of_models = [f"{', '.join(models)}: {text}" for text, models in study.notes_of_models.items()]
    return map(_plain, [*comparison.notes, *([comparison.caution] if comparison.caution else []), *of_models])


def _hashes(study: Study, comparison: Comparison) -> str:
    models = study.models[study.models["model"].isin(comparison.models.index)]
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="left">{html.escape(_plain(text))}</td>'
            for text in (row["model"], row["reference"], row["dtype"] or "-", (row["sha256"] or "-")[:16])
        )
        + "</tr>"
        for row in models.to_dict("records")
    )
    head = "".join(f'<th scope="col" class="left">{name}</th>' for name in ("model", "reference", "dtype", "SHA-256"))
    return (
        '<details><summary>Models, dtypes and hashes of weights</summary><div class="scroll tall" tabindex="0" '
        f'role="region" aria-label="Models and hashes"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div></details>"
    )


def _plain(value: Any) -> str:
    """Return plain data as text for readers."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return without_folders(value)
