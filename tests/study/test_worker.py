import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import layercrit.study.worker as worker_module
from layercrit.engine.holder import ReplayHolder
from layercrit.engine.opening import open_replay
from layercrit.engine.session import Session
from layercrit.errors import CheckpointError, ModelError
from layercrit.layers import find_layers, select_layers
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.probes.probe_set import ProbeSet
from layercrit.study.executors import Task
from layercrit.study.file import read_study_file
from layercrit.study.store import Store
from layercrit.study.worker import (
    Job,
    Left,
    Measured,
    Opening,
    Planned,
    Progressed,
    name_of_parts,
    start_worker,
)
from running_jobs import (
    ARCHITECTURE,
    LAYERS,
    PLACE,
    Inline,
    Killed,
    conversation,
    forgotten,
    run,
    small_network,
    tables,
    write_model,
    write_small,
)


@pytest.fixture
def each_batch_a_part(monkeypatch):
    monkeypatch.setattr(worker_module, "_SECONDS_BETWEEN_PARTS", 0.0)


@pytest.fixture
def prepare(tmp_path):
    """Write a study, and a store that knows of nothing but the images and the models; return a worker."""

    def prepared(says_input_size=True, **settings):
        path = write_small(tmp_path / "study", **settings)
        with pytest.raises(Killed):
            run(path, tmp_path / "out", Inline(stop_after=0))
        study = replace(read_study_file(path), says_input_size=says_input_size)
        return study, Worker(study, tmp_path / "out")

    return prepared


class Worker:
    """A worker, whose questions are answered from a store; ``n_known`` cells of its last task were there already."""

    def __init__(self, study, folder):
        self._work = start_worker(study, {None: ProbeSet.load(folder / "probe_set")}, folder, PLACE)
        self._folder = folder

    def __call__(self, task):
        return conversation(self._work(task), self._answer)

    def _answer(self, asked):
        with Store(self._folder) as store:
            if isinstance(asked, Opening):
                return next(row.record for row in store.models() if row.model == asked.model) or {}
            cells = {row.key for row in asked.plan}
            known = store.known(cells)
            self.n_known = len(known)
            parts = name_of_parts(cells - known)
            return Left(known, parts, store.parts(parts))


def ask(work, study, model=0, reset="rerandomize", trial=0):
    """What a worker says to a task."""
    job = Job(study.models[model], reset, {trial: None})
    return list(work(Task(f"{job}", "", job)))


def keep(folder, *messages):
    with Store(folder) as store, store.transaction():
        for message in messages:
            if isinstance(message, Measured):
                store.put_cells(message.cells)
            elif isinstance(message, Progressed):
                store.put_part(message.task, message.part)


def keys(messages):
    return [row.key for row in messages[0].plan]


# what it says


def test_worker__plans_and_measures_a_trial(prepare):
    study, work = prepare(trials=3)

    planned, measured = ask(work, study, trial=2)

    assert isinstance(planned, Planned)
    assert work.n_known == 0
    network = small_network()
    layers = select_layers(find_layers(network, torch.zeros(1, 3, 2, 2)))
    for row, layer, cell in zip(planned.plan, layers, measured.cells, strict=True):
        assert (row.model, row.reset, row.trial) == ("m0", "rerandomize", 2)
        assert (row.layer, row.type, row.depth, row.n_parameters) == (
            layer.name, layer.type, layer.depth, layer.n_parameters)  # fmt: skip
        assert (cell.key, cell.status, cell.n_images) == (row.key, "ok", 24)
        assert {len(values) for values in cell.per_image.values()} == {24}
        assert cell.seconds > 0
    # of 12 x 8 + 8 x 8 + 8 x 3 products
    assert [row.flops_after for row in planned.plan] == pytest.approx([1, 88 / 184, 24 / 184])
    assert planned.record["flops_per_image"] == 2 * 184
    assert planned.record["n_parameters"] == 12 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3


def test_worker__is_not_disturbed_by_settings_of_its_process(prepare):
    """As a module that the study imports may leave them."""
    study, work = prepare()
    expected = ask(work, study)[-1].cells
    study, work = prepare()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        found = ask(work, study)[-1].cells
    assert [cell.key for cell in found] == [cell.key for cell in expected]
    assert [cell.means for cell in found] == [cell.means for cell in expected]
    assert all(cell.means["cosine"] > 0 for cell in found)


def test_worker__what_is_known_is_planned_only(prepare, tmp_path):
    study, work = prepare()
    first = ask(work, study)
    keep(tmp_path / "out", first[-1])

    second = ask(work, study)

    assert [type(message) for message in second] == [Planned]
    assert work.n_known == len(LAYERS)
    assert keys(second) == keys(first)


def test_worker__measures_the_layers_that_are_missing(prepare, tmp_path):
    study, work = prepare()
    whole = ask(work, study)[-1]
    keep(tmp_path / "out", replace(whole, cells=[whole.cells[0], whole.cells[2]]))

    _, measured = ask(work, study)

    assert work.n_known == 2
    assert [cell.key for cell in measured.cells] == [whole.cells[1].key]
    assert measured.cells[0].means == whole.cells[1].means
    for name, values in whole.cells[1].per_image.items():
        np.testing.assert_array_equal(measured.cells[0].per_image[name], values)


def test_worker__says_parts_that_add_up(prepare, tmp_path, each_batch_a_part):
    study, work = prepare(protocol={"batch_size": 10})

    _, first, second, measured = ask(work, study)

    assert [(p.part.start, p.part.stop) for p in (first, second)] == [(0, 10), (10, 20)]
    assert first.task == second.task == measured.task
    assert first.n_cells == len(LAYERS)
    for name, values in measured.cells[1].per_image.items():
        np.testing.assert_array_equal(values[:10], first.part.values[name][1])
        np.testing.assert_array_equal(values[10:20], second.part.values[name][1])
    assert measured.cells[0].seconds * 3 > first.part.seconds + second.part.seconds


def test_worker__gathers_batches_of_less_than_a_second(prepare):
    study, work = prepare(protocol={"batch_size": 1})

    assert [type(message) for message in ask(work, study)] == [Planned, Measured]


def test_worker__goes_on_after_the_parts_that_are_kept(prepare, tmp_path, each_batch_a_part, monkeypatch):
    study, work = prepare(protocol={"batch_size": 10})
    whole = ask(work, study)
    keep(tmp_path / "out", whole[1], whole[2])
    starts = []
    run_batch = Session.run_batch
    monkeypatch.setattr(Session, "run_batch", lambda s, t, start: starts.append(start) or run_batch(s, t, start))

    again = ask(work, study)

    assert [type(message) for message in again] == [Planned, Measured]
    assert starts == [20]
    for one, other in zip(again[-1].cells, whole[-1].cells, strict=True):
        assert one.means == other.means
        assert replace(one, seconds=0, finished="", per_image=None) == replace(
            other, seconds=0, finished="", per_image=None)  # fmt: skip
        for name, values in other.per_image.items():
            np.testing.assert_array_equal(one.per_image[name], values)
    assert again[-1].cells[0].seconds > (whole[1].part.seconds + whole[2].part.seconds) / 3


def test_worker__parts_of_other_content_are_not_used(prepare, tmp_path, each_batch_a_part):
    study, work = prepare(protocol={"batch_size": 10})
    first = ask(work, study)
    keep(tmp_path / "out", first[1])
    write_model(tmp_path / "study" / "m0.safetensors", 9)

    other = ask(Worker(study, tmp_path / "out"), study)

    assert other[1].part.start == 0
    assert other[1].task != first[1].task


# keys


def test_worker__every_cell_has_a_key_of_its_own(prepare):
    study, work = prepare(trials=3, protocol={"resets": ["rerandomize", "permute", "zero"]})

    found = [
        key
        for model in (0, 1)
        for reset, trials in (("rerandomize", 3), ("permute", 3), ("zero", 1))
        for trial in range(trials)
        for key in keys(ask(work, study, model, reset, trial))
    ]

    assert len(set(found)) == len(found) == 2 * 7 * 3


def test_worker__keys_are_of_the_content_and_not_of_the_place(tmp_path):
    for name in ("here", "there"):
        run(write_small(tmp_path / name), tmp_path / name / "out")

    here, there = (tables(tmp_path / name / "out")[0] for name in ("here", "there"))
    assert list(here["key"]) == list(there["key"])


# what is opened


def test_worker__opens_a_model_once_for_all_its_trials(prepare, monkeypatch):
    study, work = prepare(trials=4)
    opened = []
    monkeypatch.setattr(worker_module, "open_model", lambda *a, **k: opened.append(a[0]) or open_model(*a, **k))

    for model in (0, 0, 0, 1, 1):
        ask(work, study, model=model)

    assert [name for name in opened if isinstance(name, str)] == [entry.reference for entry in study.models]


def test_worker__what_cannot_be_opened_fails_again_without_another_try(prepare, tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    study, work = prepare(trials=3)
    (tmp_path / "study" / "m0.safetensors").write_bytes(b"")
    opened = []
    monkeypatch.setattr(worker_module, "open_model", lambda *a, **k: opened.append(a[0]) or open_model(*a, **k))

    for trial in range(3):
        with pytest.raises(CheckpointError, match="m0"):
            ask(work, study, trial=trial)

    assert len(opened) == 1
    assert len(ask(work, study, model=1)) == 2, "the next model works"


def test_worker__lets_go_of_a_model_before_it_opens_the_next(prepare, monkeypatch):
    study, work = prepare()
    networks, alive = [], []

    def noted(*arguments, **settings):
        gc.collect()
        alive.append(sum(network() is not None for network in networks))
        model = open_model(*arguments, **settings)
        networks.append(weakref.ref(model.network))
        return model

    monkeypatch.setattr(worker_module, "open_model", noted)
    for model in (0, 1, 0):
        ask(work, study, model=model)

    # each model is opened by its reference, then asked about the study's pixels
    assert alive[::2] == [0, 0, 0]


def test_worker__says_where_a_model_differs_from_the_study(prepare):
    study, work = prepare(models=[{"reference": f"file:m0.safetensors?{ARCHITECTURE}&input_size=(3,4,4)"}])

    record = ask(work, study)[0].record

    assert [note for note in record["notes"] if "its own evaluation differs" in note] == [
        "its own evaluation differs from the study's pixels: 3 x 4 x 4, resize 4, bilinear"
    ]


def test_worker__says_where_only_the_first_pixel_of_the_crop_differs(prepare, monkeypatch):
    study, work = prepare()
    own = replace(study.preprocessing, resize=2, crop_offset="rounded down")
    monkeypatch.setattr(
        worker_module,
        "open_model",
        lambda *arguments, **settings: replace(open_model(*arguments, **settings), preprocessing=own, undeclared=()),
    )

    notes = ask(work, study)[0].record["notes"]

    assert any(note.endswith("bilinear, first pixel of the crop rounded down") for note in notes)


def test_worker__images_of_the_size_that_a_model_takes_need_no_note(prepare):
    size = "&mean=(0,0,0)&std=(1,1,1)&input_size=(3,2,2)"
    study, work = prepare(models=[{"reference": f"file:m0.safetensors?{ARCHITECTURE}{size}"}])
    assert study.preprocessing.resize is None
    assert not any("does not say" in note or "differs" in note for note in ask(work, study)[0].record["notes"])


def test_worker__says_what_a_model_does_not_declare(prepare):
    study, work = prepare()

    record = ask(work, study)[0].record

    (note,) = (note for note in record["notes"] if "does not say" in note)
    assert note.startswith("the model does not say all of its input; defaults: mean 0, ")  # the study says the size
    assert not any("its own evaluation differs" in note for note in record["notes"])


def test_worker__says_that_the_size_is_a_default_where_the_study_does_not_give_it(prepare):
    study, work = prepare(says_input_size=False)
    (note,) = (note for note in ask(work, study)[0].record["notes"] if "does not say" in note)
    assert "2 x 2 pixels (the default of study files, [images] input_size)" in note


def test_worker__a_model_that_predicts_nan_says_so_for_each_trial(prepare, tmp_path):
    study, work = prepare()
    path = tmp_path / "study" / "m0.safetensors"
    state = load_file(path)
    state["5.bias"][0] = float("inf")
    save_file(state, path)

    for trial in (0, 1):
        with pytest.raises(ModelError, match="itself predicts NaN or infinity for 24 of 24"):
            ask(work, study, trial=trial)


# the number format, the same for all resets of a model


@pytest.fixture
def unsteady_format(monkeypatch):
    """`auto` takes bfloat16 where it is asked about the reset zero, else float32."""
    asked = []

    def fastest(self, images):
        asked.append(self._subject._reset.name)
        mode = "bfloat16" if asked[-1] == "zero" else "float32"
        return open_replay(self._subject.network, self._subject.layers, images, mode)

    monkeypatch.setattr(ReplayHolder, "_fastest", fastest)
    return asked


@pytest.mark.parametrize("resets", [["zero", "rerandomize"], ["rerandomize", "zero"]])
@pytest.mark.parametrize("first", [0, 1])
def test_worker__the_first_reset_chooses_the_format(prepare, tmp_path, unsteady_format, resets, first):
    """Two workers may open one model under two resets at the same time; both must choose alike."""
    study, work = prepare(protocol={"resets": resets, "dtype": "auto"})

    one = ask(work, study, reset=resets[first])
    other = ask(Worker(study, tmp_path / "out"), study, reset=resets[1 - first])

    assert unsteady_format == [resets[0]] * 2
    assert one[0].record["dtype"] == other[0].record["dtype"] == {"zero": "bfloat16"}.get(resets[0], "float32")


def test_worker__a_reset_that_cannot_be_done_leaves_the_choice_to_the_next(prepare, tmp_path, unsteady_format):
    models = [{"reference": f"file:m0.safetensors?{ARCHITECTURE}", "donor": "d.safetensors"}]
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "d.safetensors").write_bytes(b"no weights")
    study, work = prepare(models=models, protocol={"resets": ["rewind", "zero"], "dtype": "auto"})

    assert ask(work, study, reset="zero")[0].record["dtype"] == "bfloat16"
    with pytest.raises(CheckpointError):
        ask(work, study, reset="rewind")


def test_worker__keeps_the_format_and_predictions_of_an_earlier_run(prepare, tmp_path, unsteady_format, monkeypatch):
    study, work = prepare(trials=2, protocol={"dtype": "auto"})
    first = ask(work, study)
    with Store(tmp_path / "out") as store, store.transaction():
        store.put_record("m0", first[0].record)
    unsteady_format.clear()
    monkeypatch.setattr("layercrit.engine.session.predict", lambda *a, **k: pytest.fail("it was asked already"))

    second = ask(Worker(study, tmp_path / "out"), study, trial=1)

    assert unsteady_format == []
    assert second[0].record["predictions"] == first[0].record["predictions"]
    assert second[-1].cells[0].means["cosine_matched"] > 0


def test_worker__the_record_is_the_models_own(prepare, tmp_path):
    study, work = prepare(trials=2)

    record = ask(work, study)[0].record

    expected = measure(
        f"{study.models[0].reference}&input_size=(3,2,2)", tmp_path / "study" / "images.npz", trials=1, progress=False
    ).record
    numbers = {name: value for name, value in record["predictions"].items() if name != "classes"}
    assert {**expected["predictions"], "n_classes": 3} == pytest.approx(numbers, rel=1e-5)
    for name in ("sha256", "mean", "std", "n_parameters"):
        assert record[name] == expected["model"][name]
    assert record["donor"] == {"rerandomize": expected["model"]["donor"]}


def test_worker__resets_of_the_users_are_known(prepare):
    with forgotten("own_resets"):
        study, work = prepare(study={"imports": ["own_resets"]}, protocol={"resets": ["break"]})

        statuses = [cell.status for cell in ask(work, study, reset="break")[-1].cells]

    assert statuses == ["ok", "not_finite", "unchanged"]


def test_small_network__is_not_chance(tmp_path):
    """The networks of these tests react to resets: distances near 0 would prove little."""
    run(write_small(tmp_path), tmp_path / "out")

    cells = tables(tmp_path / "out")[0]
    assert cells.groupby("layer")["cosine"].mean().min() > 0.05
