"""Imports of layercrit go one way, and what could be imported from it before can be imported still."""

import subprocess
import sys
from importlib import import_module

import pytest

from architecture import PICTURE, circles, floors, graph, modules, picture, room_of

# Module -> the names that could be imported from it when all modules lay side by side, but for one: in place of
# `hubs.is_cached` there is `models.references.is_here`, which takes a whole reference.
OLD_IMPORTS = {
    "layercrit": (
        "LayercritError Measurement Model ProbeSet Study compare distance load_study measure open_model report reset"
    ),
    "layercrit.archives": "HuggingFaceSource ParquetSource TarSource TorchvisionSource open_source",
    "layercrit.checkpoints": "Checkpoint fit_to foreign_globals hash_tensors read_checkpoint record_file weight_file",
    "layercrit.cli": "main",
    "layercrit.comparison": "Comparison about_models accuracy_of cells_of compare estimates_of",
    "layercrit.contrasts": "Contrasts benjamini_hochberg contrasts_of_samples crossed_contrasts holm",
    "layercrit.demo": "DemoResult copy_family example_study run_demo small_resnet",
    "layercrit.differences": "Differences differences",
    "layercrit.distances": "DISTANCES Distance distance get_distance label_scores measure_distances",
    "layercrit.downloads": "DRIVE Fetched address_of cache_folder check_file digest_of fetch",
    "layercrit.errors": (
        "CheckpointError LayerError LayercritError ModelError ProbeError ProtocolError StudyError "
        "TrainingError ZooError near"
    ),
    "layercrit.executors": "Event Executor Failed Finished LocalProcesses Message Place Start Task Work local_places",
    "layercrit.exports": "FORMATS Format cells_table export export_format",
    "layercrit.families": "FamilyReport train_family",
    "layercrit.figures": "check_formats criticality_bars figure_style printable save_figure text_width",
    "layercrit.findings": "Trend describe_family trends_of",
    "layercrit.flops": "count_flops",
    "layercrit.graph": "WeightGraph export_graph speed_up",
    "layercrit.hubs": "ImageInput timm_input torchvision_input",
    "layercrit.idx": "IdxSource",
    "layercrit.images": "FORMATS STANDARD SUFFIXES Interpolation Pixels Preprocessing open_image",
    "layercrit.layers": "GROUPS LAYER_TYPES Group Layer find_layers layer_labels select_layers stages_of wrapper_of",
    "layercrit.locks": "hold holder",
    "layercrit.measurement": "CELL_COLUMNS MATCHED PER_IMAGE Measurement",
    "layercrit.measuring": "Measurement measure",
    "layercrit.merging": "merge_studies",
    "layercrit.models": "MODEL_SOURCES Classifier Model ModelSource logits_of model_source open_model without_weights",
    "layercrit.networks": (
        "MODEL_SOURCES Classifier Model ModelSource drawing explained first_line logits_of model_source "
        "seed_generators structure written"
    ),
    "layercrit.page": "write_page",
    "layercrit.planning": "StudyPlan plan_study",
    "layercrit.probes": "MEMORY_LIMIT Preprocessing ProbeOptions ProbeSet Progress",
    "layercrit.protocol": "DEFAULTS DTYPES Protocol",
    "layercrit.published": "COLUMNS MODEL_COLUMNS import_published write_models write_published",
    "layercrit.replay": "MODES GraphReplay Mode PlainReplay RecordedReplay Replay open_replay reopen",
    "layercrit.reporting": "FIGURES Report report",
    "layercrit.resets": "RESETS Donor Draw Reset donor_values draw_values get_reset given_donor reset seed_of",
    "layercrit.running": "RunReport run_study",
    "layercrit.session": "MATCHED_ENTROPY Batch Predictions Session",
    "layercrit.sources": "ACCEPTED ArraySource FolderSource ImageSource Item check_exists find_names integer_label",
    "layercrit.statistics": "ChanceLevel Estimate estimate estimate_mean_over_layers fit_temperature",
    "layercrit.store": "FILE CellRow FailureRow ModelRow PartRow PlanRow Store pack unpack",
    "layercrit.study": "Study load_study",
    "layercrit.study_figures": (
        "CATEGORY_COLORS CATEGORY_MARKERS criticality_against_accuracy criticality_against_budget "
        "criticality_over_depth difference_map heat_map ranking spread_map"
    ),
    "layercrit.studyfile": "ModelEntry StudyFile Training TrainingRun read_study_file",
    "layercrit.training": (
        "METHODS Method Options TrainedModel TrainingData adversarial augmentation baseline contrastive "
        "freezing get_method method open_training_data recipes setting train"
    ),
    "layercrit.training.adversarial": "Adversarial AttackedLearner RobustL2 RobustLinf attack",
    "layercrit.training.architecture": "fitted_architecture initial_network",
    "layercrit.training.augmentation": (
        "AugMix AutoAugment Consistent DiffusionNoise Noisy PixMix RandAugment TrivialAugment consistency mix_images"
    ),
    "layercrit.training.baseline": "Baseline",
    "layercrit.training.batches": "Batch Batches held_out_batches to_device",
    "layercrit.training.contrastive": "BarlowTwins Dino MocoV3 SimClr Swav VicReg",
    "layercrit.training.data": "Split TrainingData open_training_data",
    "layercrit.training.freezing": "FrozenRandom",
    "layercrit.training.loop": "PRECISIONS TRACKERS WEIGHTS_DTYPES Options TrainedModel train",
    "layercrit.training.methods": (
        "CATEGORIES METHODS Inputs Learner Method Optimisation Phase Supervised Views get_method method setting"
    ),
    "layercrit.training.optimisation": "make_accelerator make_optimizer make_schedule moving_average",
    "layercrit.training.phases": "PhaseOfRun TrainingProgress",
    "layercrit.training.pictures": "draw_pictures",
    "layercrit.training.recipes": "A1 A2 A3 C1 B1k D Mixing Recipe TorchVision2 binary_cross_entropy",
    "layercrit.training.runs": "RunFolder",
    "layercrit.training.self_supervised": (
        "LinearHead MultiCrop Pretraining SelfSupervised features_of find_classifier full_precision "
        "gathering local_size need_lightly"
    ),
    "layercrit.wrappers": "WRAPPER_PREFIXES wrapper_of",
    "layercrit.zoo": (
        "CATEGORIES ZOO AccuracyCheck Citation ZooEntry ZooFile check_accuracy fetch_entry find_entries "
        "is_fetched open_zoo_file read_zoo"
    ),
}

FLOORS = floors()
FLOOR = {room: number for number, row in enumerate(FLOORS) for room in row}


def test_floors__have_every_room_once():
    rooms = [room for row in FLOORS for room in row]
    assert sorted(rooms) == sorted({room_of(name) for name in modules()} - {"", "__main__"})


def test_imports__go_downwards_wherever_they_stand():
    wrong = []
    for module, targets in graph().items():
        for target, line in targets.items():
            here, there = room_of(module), room_of(target)
            if module in ("layercrit", "layercrit.__main__") or here == there:
                continue
            if there == "" or FLOOR[there] <= FLOOR[here]:
                wrong.append(f"{module}, line {line}: imports {target}")
    assert not wrong, "\n".join(wrong)


def test_imports__form_no_circle():
    edges = graph()
    del edges["layercrit"]  # the front door, through which nothing inside goes
    assert (
        circles({module: {t: n for t, n in targets.items() if t in edges} for module, targets in edges.items()}) == []
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("import layercrit.b\n", "layercrit.b"),
        ("from layercrit import b\n", "layercrit.b"),
        ("from layercrit.b import name\n", "layercrit.b"),
        ("def f():\n    from layercrit.b import name\n", "layercrit.b"),
        ("if TYPE_CHECKING:\n    from layercrit.b import name\n", "layercrit.b"),
        ("importlib.import_module('layercrit.b')\n", "layercrit.b"),
    ],
    ids=["import", "from the package", "name", "within a function", "for types", "by name"],
)
def test_imports__are_seen_wherever_they_stand(tmp_path, source, target):
    from architecture import imports

    path = tmp_path / "a.py"
    path.write_text(source)
    assert [found for found, _ in imports("layercrit.a", path, {"layercrit", "layercrit.a", "layercrit.b"})] == [target]


def test_circles__are_found():
    chain = {"a": {"b": 1}, "b": {"c": 1}, "c": {}}
    assert circles(chain) == []
    assert circles({**chain, "c": {"a": 1}}) == [["a", "b", "c"]]
    assert circles({**chain, "b": {"b": 1, "c": 1}}) == [["b"]]


def test_engine__knows_nothing_of_where_models_and_images_come_from():
    allowed = {"layercrit.models.model", "layercrit.models.outputs", "layercrit.probes.probe_set"}
    for module, targets in graph().items():
        if room_of(module) == "engine":
            ends = {target for target in targets if room_of(target) in ("models", "probes")}
            assert ends <= allowed, f"{module} imports {sorted(ends - allowed)}"


def test_picture__is_that_of_the_code():
    assert PICTURE.read_text(encoding="utf-8") == picture(), "out of date: run `python tests/architecture.py`"


@pytest.mark.parametrize("module", OLD_IMPORTS)
def test_old_imports__work(module):
    found = import_module(module)
    missing = [name for name in OLD_IMPORTS[module].split() if not hasattr(found, name)]
    assert not missing, f"{module} no longer has {missing}"


def test_old_imports__cost_nothing_until_used():
    code = "import sys, layercrit; print(sorted({'torch', 'numpy', 'layercrit.models'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_old_imports__an_unknown_module_is_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"layercrit\.nothing"):
        import_module("layercrit.nothing")
    with pytest.raises(ImportError, match="nothing"):
        exec("from layercrit.zoo import nothing")
