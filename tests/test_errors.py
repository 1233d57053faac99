import pytest

from layercrit.errors import near

DISTANCES = ["cosine", "l1", "l2", "js", "top1"]
LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "fc"]


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("cosin", DISTANCES, "Did you mean 'cosine'?"),
        ("Cosine", DISTANCES, "Did you mean 'cosine'?"),
        ("layer1.0.conv9", LAYERS, "Did you mean 'layer1.0.conv2' or 'layer1.0.conv1'?"),
        ("acc", ["accuracy", "depth"], "Did you mean 'accuracy'?"),  # how it begins
        ("convolution", ["conv", "linear"], "Did you mean 'conv'?"),
        ("frozen", ["freezing", "contrastive"], "Did you mean 'freezing'?"),
        ("fd", LAYERS, "Did you mean 'fc'?"),
        ("euclidean", DISTANCES, "Known: 'cosine', 'l1', 'l2', 'js', 'top1'."),
        ("kl", DISTANCES, "Known: 'cosine', 'l1', 'l2', 'js', 'top1'."),
        ("encoder", ["criticality", "difference", "depth", "ranking"], "Known: 'criticality', 'difference', 'depth', "
         "'ranking'."),
        ("x", [f"m{i}" for i in range(12)], "Known: 'm0', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8', 'm9' and 2 "
         "more."),
        ("x", [], "None is known."),
    ],
)  # fmt: skip
def test_near(name, known, said):
    assert near(name, known) == said
