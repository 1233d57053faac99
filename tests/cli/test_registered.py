"""What commands say of plug-ins that are missing."""

import pytest

from layercrit.cli.printing import visible_lines
from layercrit.cli.registered import missing_plug_ins_named
from layercrit.errors import StudyError


def test_missing_plug_ins_named__on_a_line_of_their_own():
    with pytest.raises(StudyError) as refused, missing_plug_ins_named(lambda: {"layercrit-gone": "1.2"}):
        raise StudyError("There is no reset 'dropout'.")
    first, second = visible_lines(str(refused.value)).splitlines()
    assert first == "There is no reset 'dropout'."
    assert second.startswith("  What is there was made with plug-ins that are not installed here: layercrit-gone 1.2.")
