"""Known differences between the names in published weight files and those of today's architectures: a table, no code.

For another one, add a line. `layercrit.models.fitting` tries the entries of `RENAMES` from the top where the names of a
file do not fit as they are, and takes the first whose names do. Prefixes need no entry: whatever stands before all
names of a network is found.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["BESIDE", "RENAMES", "Renames"]

BESIDE = frozenset({"n_averaged"})
"""What wrappers leave among the names of the network when their prefix is cut off: averages count their steps."""


@dataclass(frozen=True)
class Renames:
    """How the names of one format become those of the architectures.

    Attributes:
        of: the format, in words.
        rename: pairs of regular expression and replacement, applied in this order wherever they match.
        drop: a regular expression of whole names of values that the architecture computes itself; empty: none.
    """

    of: str
    rename: tuple[tuple[str, str], ...] = ()
    drop: str = ""

    def applies_to(self, names: str) -> bool:
        """Whether a name would change or be dropped; the names are given as lines, which is quick to search."""
        patterns = [pattern for pattern, _ in self.rename] + [f"^(?:{self.drop})$"] * bool(self.drop)
        return any(re.search(pattern, names, re.MULTILINE) for pattern in patterns)

    def new_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return new name -> name in the file, without those that are dropped; empty if two would be the same."""
        result: dict[str, str] = {}
        for name in names:
            if self.drop and re.fullmatch(self.drop, name):
                continue
            new = name
            for pattern, replacement in self.rename:
                new = re.sub(pattern, replacement, new)
            if new in result:
                return {}
            result[new] = name
        return result


RENAMES = (
    # torchvision before 0.3; a module's name cannot contain a dot any more.
    Renames("an old DenseNet", ((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),)),
    # microsoft/Swin-Transformer: timm moves patch merging to the beginning of the next stage, and computes the masks.
    Renames(
        "the official Swin Transformer",
        (
            (r"(^|\.)layers\.2\.downsample\.", r"\1layers.3.downsample."),
            (r"(^|\.)layers\.1\.downsample\.", r"\1layers.2.downsample."),
            (r"(^|\.)layers\.0\.downsample\.", r"\1layers.1.downsample."),
            (r"(^|\.)head\.(weight|bias)$", r"\1head.fc.\2"),
        ),
        r"(.*\.)?(attn_mask|relative_position_index|relative_coords_table)",
    ),
    # facebookresearch/ConvNeXt
    Renames(
        "the official ConvNeXt",
        (
            (r"(^|\.)stages\.(\d+)\.(\d+)\.", r"\1stages.\2.blocks.\3."),
            (r"(^|\.)downsample_layers\.0\.", r"\1stem."),
            (r"(^|\.)downsample_layers\.(\d+)\.", r"\1stages.\2.downsample."),
            (r"\.dwconv\.", r".conv_dw."),
            (r"\.pwconv([12])\.", r".mlp.fc\1."),
            (r"(^|\.)head\.(weight|bias)$", r"\1head.fc.\2"),
            (r"^(?!.*stages\.)(.*\.)?norm\.(weight|bias)$", r"\1head.norm.\2"),
        ),
    ),
    # Wrappers around parts of a network, whose names stand in between: torch.compile, FSDP, activation checkpointing.
    Renames(
        "a network with wrapped parts",
        ((r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+", r"\1"),),
    ),
    # torch.nn.utils.weight_norm in front of torch.nn.utils.parametrizations.weight_norm
    Renames(
        "the old weight normalisation",
        (
            (r"(^|\.)weight_g$", r"\1parametrizations.weight.original0"),
            (r"(^|\.)weight_v$", r"\1parametrizations.weight.original1"),
        ),
    ),
)
"""The formats, in the order in which they are tried."""
