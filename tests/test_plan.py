"""Plans are written and read as JSON."""

from pathlib import Path

import pytest

from longspan.errors import ConfigError
from longspan.plan import BatchPlan, Group, MicroBatch, read_plan, write_plan

GROUP = Group((0, 1), (2, 0), "ring", 0.5, 10, 20)
PLAN = BatchPlan((5, 7, 9), (MicroBatch((GROUP,), 0.5),), "world", 0.5, 0.4)


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    write_plan(PLAN, tmp_path / "deep" / "plan.json")
    assert read_plan(BatchPlan, tmp_path / "deep" / "plan.json") == PLAN


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[]", "holds no BatchPlan"),
        ('{"plan": "SitePlan"}', "holds no BatchPlan"),
        ('{"plan": "BatchPlan", "lengths": ["x"]}', "lengths.0"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_plan(BatchPlan, path)


def test_no_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no plan at"):
        read_plan(BatchPlan, tmp_path / "none.json")
