"""The table ``[module_criticality]`` of a study file."""

from inspect import signature

import pytest
from click import Context
from safetensors.torch import save_file

from layercrit.cli.module_criticality import module_criticality_command
from layercrit.errors import StudyError
from layercrit.module_criticality import measure_module_criticality
from layercrit.study.file import read_study_file
from layercrit.study.module_criticality import _N_IMAGES, measure_study_module_criticality
from layercrit.study.schema import ModuleCriticalityTable
from running_jobs import ARCHITECTURE, small_network
from small_studies import write_study
from training_runs import write_run


@pytest.fixture
def write(tmp_path):
    """Writes a study of a training run, a, and of a weight file, b, that asks for module criticality."""
    weights = small_network().state_dict()
    write_run(tmp_path / "run", {0: weights}, final=weights)
    save_file(weights, tmp_path / "b.safetensors")
    models = [{"name": "a", "reference": f"file:run?{ARCHITECTURE}"},
              {"name": "b", "reference": f"file:b.safetensors?{ARCHITECTURE}"}]  # fmt: skip

    def written(section, **others):
        return write_study(tmp_path, 0, models=models, study={"baseline": "a"}, module_criticality=section, **others)

    return written


def test_module_criticality_table__keys_and_defaults_are_those_of_the_command_and_of_python():
    """Layers, types, group, seed and labels are the study's own."""
    declared = {name: one.default for name, one in ModuleCriticalityTable.model_fields.items()}
    command = module_criticality_command.to_info_dict(Context(module_criticality_command))
    options = {one["name"]: one["default"] for one in command["params"] if "default" in one}
    of_study = signature(measure_study_module_criticality).parameters
    of_model = {name: one.default for name, one in signature(measure_module_criticality).parameters.items()}
    for name, default in declared.items():
        default = tuple(default) if isinstance(default, list) else default
        assert options[name] in (default, None), name
        if name not in of_study:
            assert of_model[name] == default, name
    assert declared["n_images"] == _N_IMAGES
    shared = {"help", "out", "overwrite", "as_json", "quiet", "verbose", "traceback", "_click_default_help"}
    others = {"labels", "classes", "layers", "types", "group", "seed", "surface", "images"}
    assert options.keys() - declared.keys() - others - shared <= {"model"}
    assert of_study.keys() - declared.keys() == {"study", "folder", "overwrite", "progress", "settings"}


def test_read_study_file__module_criticality_resolved(write, tmp_path):
    read = read_study_file(write({"excess": 0.1, "draws": 3, "initial": "run@epoch=0"}))
    assert read.module_criticality["draws"] == 3
    assert read.module_criticality["n_s"] == 21
    assert read.module_criticality["initial"] == f"{tmp_path}/run@epoch=0"
    assert "tolerance" not in read.module_criticality
    (tmp_path / "resolved.toml").write_text(read.to_toml())
    assert read_study_file(tmp_path / "resolved.toml").module_criticality == read.module_criticality
    assert read_study_file(write({})).module_criticality["tolerance"] == 1.01
    path = write({})
    path.write_text(path.read_text().replace("[module_criticality]", ""))
    assert read_study_file(path).module_criticality is None


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"drws": 3}, "[module_criticality] unknown key 'drws'. Did you mean 'draws'?"),
        ({"layers": "fc"}, "[module_criticality] unknown key 'layers'"),
        ({"tolerance": 0.5}, "[module_criticality] tolerance must be more than 1; got 0.5"),
        ({"s_range": [2.0, 1.0]}, "[module_criticality] s_range must be two positive numbers, the smaller one first"),
        ({"s_range": [2.0]}, "[module_criticality] s_range must be two positive numbers, the smaller one first"),
        ({"tolerance": 1.1, "excess": 0.1}, "excess takes the place of tolerance: leave one of them out"),
        ({"models": []}, "[module_criticality] models must be a list of names of models; got []"),
        ({"models": ["aa"]}, "[module_criticality] models: there is no model 'aa'. Did you mean 'a'?"),
        ({"models": ["a", "b"]}, "no epoch 0 was kept of 'b'. Name a training run as the model"),
        ({"probe_set": "fog"}, "there is no probe set 'fog'. There is only one, without a name: leave the key out"),
        ({"initial": "none.pth"}, "[module_criticality] initial is not a file"),
        ({"initial": "run@epoch=3"}, "[module_criticality] initial: "),
    ],
)  # fmt: skip
def test_read_study_file__mistakes_of_module_criticality(write, section, text):
    with pytest.raises(StudyError) as caught:
        read_study_file(write(section))
    assert text in str(caught.value)
    assert "has 1 mistake:" in str(caught.value)


def test_read_study_file__mistakes_of_module_criticality_are_named_with_others(write):
    path = write({"draws": 0}, images={"labels": False}, protocol={"trials": 0})
    with pytest.raises(StudyError, match="has 3 mistakes") as caught:
        read_study_file(path)
    assert "which needs labels, and the images" in str(caught.value)
    images = [{"name": name, "source": "images.npz", "input_size": [1, 8, 8]} for name in ("clean", "noisy")]
    with pytest.raises(StudyError, match=r"no probe set 'nosy'. Did you mean 'noisy'\?"):
        read_study_file(write({"probe_set": "nosy"}, images=images))


def test_read_study_file__module_criticality_needs_one_model_with_initial_weights(write, tmp_path):
    read_study_file(write({}))  # b is left out
    (tmp_path / "run" / "epochs" / "epoch-0000.safetensors").unlink()
    with pytest.raises(StudyError, match="no epoch 0 was kept of 'a', 'b'"):
        read_study_file(write({}))
    with pytest.raises(StudyError, match="no epoch 0 was kept of 'a'"):
        read_study_file(write({"models": ["a"]}))


def test_read_study_file__module_criticality_of_models_that_are_not_trained_yet(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text("""
        [images]
        source = "x.npz"
        [training]
        arch = "timm:resnet18"
        data = "x"
        [module_criticality]
        models = ["plain"]
        [[models]]
        method = "baseline"
        name = "plain"
    """)
    assert read_study_file(path).module_criticality["models"] == ["plain"]
