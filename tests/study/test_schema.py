"""The JSON Schema of study files: what it refuses, reading refuses; what reading accepts, it accepts."""

import copy
from importlib import resources

import jsonschema
import pytest

from layercrit.declarations import read_table
from layercrit.demo import example_study
from layercrit.layers import GROUPS
from layercrit.study.file import read_study_file
from layercrit.study.schema import TABLES, study_schema
from layercrit.toml import tomllib
from small_studies import write_study

SCHEMA = study_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
GOOD = {
    "study": {"name": "n", "baseline": "a", "leave_out": ["b"], "imports": ["json"]},
    "images": {"source": "x.npz", "n_images": 5, "labels": False, "input_size": [1, 28, 28], "resize": [9, 9]},
    "protocol": {"trials": 2, "level": 0.9, "batch_size": 4, "dtype": "float32", "group": "block", "resets": ["zero"]},
    "module_criticality": {
        "excess": 0.1,
        "models": ["a"],
        "s_range": [0.1, 1],
        "batch_size": "auto",
        "dtype": "reference",
    },
    "training": {"arch": "timm:resnet18", "data": "x", "seed": 2**64 - 1, "precision": "bf16", "settings": {"lr": 1}},
    "models": [
        {"reference": "zoo:*", "category": "c"},
        {"list": "models.csv"},
        {"method": "baseline", "name": "a", "accuracy": 1, "epochs": 3, "settings": {"lr": 0.1}},
    ],
}


def test_study_schema__is_one():
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    VALIDATOR.check_schema(SCHEMA)


def test_study_schema__each_key_is_explained_and_has_a_type():
    assert SCHEMA["$defs"].keys() == {table.__name__ for table in TABLES.values()}
    assert SCHEMA["properties"].keys() == TABLES.keys()
    for table in SCHEMA["$defs"].values():
        assert table["description"]
        for key, declared in table["properties"].items():
            assert declared["description"], key
            assert {"type", "anyOf"} & declared.keys(), key
            assert "null" not in str(declared), "TOML has no null"


def test_study_schema__choices_are_those_of_the_library():
    assert tuple(SCHEMA["$defs"]["ProtocolTable"]["properties"]["group"]["enum"]) == GROUPS


@pytest.mark.parametrize("name", ["paper", "fashion"])
def test_study_schema__accepts_the_examples(name):
    VALIDATOR.validate(tomllib.loads(example_study(name)))


def test_study_schema__knows_every_example():
    folder = resources.files("layercrit.study") / "examples"
    assert {file.name for file in folder.iterdir() if file.name.endswith(".toml")} == {"paper.toml", "fashion.toml"}


def test_study_schema__accepts_all_keys_and_resolved_files(tmp_path):
    VALIDATOR.validate(GOOD)
    VALIDATOR.validate(tomllib.loads(read_study_file(write_study(tmp_path)).to_toml()))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["studdy"], {}),
        (["study", "nme"], "x"),
        (["study", "leave_out"], ["x", 3]),
        (["images", "source"], None),
        (["images", "input_size"], [3, 8]),
        (["images", "input_size"], [2, 8, 8]),
        (["images", "input_size"], [3, 0, 8]),
        (["images", "resize"], -1),
        (["images", "resize"], [8]),
        (["images", "interpolation"], "bilinar"),
        (["images", "n_images"], 0),
        (["images", "labels"], 3),
        (["protocol", "trials"], 0),
        (["protocol", "seed"], True),
        (["protocol", "level"], 95),
        (["protocol", "dtype"], "float23"),
        (["protocol", "group"], "blok"),
        (["protocol", "batch_size"], "16"),
        (["protocol", "n_images"], 100),
        (["module_criticality", "models"], []),
        (["module_criticality", "tolerance"], 1),
        (["module_criticality", "s_range"], [0, 1]),
        (["module_criticality", "s_range"], [0.1]),
        (["module_criticality", "dtype"], "bfloat16"),
        (["module_criticality", "layers"], "fc"),
        (["training"], None),
        (["training", "arch"], None),
        (["training", "data"], None),
        (["training", "precision"], "fp61"),
        (["training", "seed"], 2**64),
        (["training", "settings"], {"epochs": 3}),
        (["models"], []),
        (["models"], None),
        (["models"], {"reference": "zoo:*"}),
        (["models", 0, "reference"], None),
        (["models", 0, "list"], "models.csv"),
        (["models", 0, "epochs"], 3),
        (["models", 0, "settings"], {}),
        (["models", 0, "accuracy"], 76.15),
        (["models", 0, "eps"], -1),
        (["models", 2, "name"], None),
        (["models", 2, "epochs"], 0),
        (["models", 2, "settings"], {"epochs": 3}),
    ],
    ids=str,
)
def test_study_schema__refuses(place, value):
    """None: without the key."""
    study = copy.deepcopy(GOOD)
    *way, key = place
    table = study
    for step in way:
        table = table[step]
    if value is None:
        del table[key]
    else:
        table[key] = value
    assert not VALIDATOR.is_valid(study)


VALUES = [3, 0, -1, 0.5, 76, True, "text", "auto", "", [], [1], [3, 8, 8], ["x"], {"x": 1}, float("nan")]
ONLY_READING_KNOWS = {"types"}  # a list in one text, of names that may be combined


@pytest.mark.parametrize("section", TABLES)
def test_study_schema__refuses_what_reading_refuses(section):
    """Value by value of each key: the two are written by one declaration."""
    schema = {**SCHEMA["$defs"][TABLES[section].__name__], "required": []}
    for rule in ("oneOf", "dependentRequired"):
        schema.pop(rule, None)
    validator = jsonschema.Draft202012Validator(schema)
    for key in TABLES[section].model_fields:
        for value in VALUES:
            mistakes = []
            read_table(TABLES[section], {key: value}, "", mistakes)
            refused = any("is missing" not in mistake for mistake in mistakes)
            if value != value:
                assert refused, f"{key} = nan, of which JSON Schema cannot speak"
            elif key not in ONLY_READING_KNOWS:
                assert validator.is_valid({key: value}) is not refused, f"{key} = {value!r}: {mistakes}"
