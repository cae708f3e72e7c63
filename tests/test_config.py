"""The config: what it takes, and what it says to mistakes."""

from pathlib import Path

import pytest
import yaml

from longspan.errors import ConfigError
from longspan.train.config import Config, load_config, save_config, settled_differences
from longspan.train.optimize import lr_at

MINIMAL = {"data": {"path": "docs"}, "model": {"type": "llama"}, "train": {"steps": 5}}


def write(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_config_comes_back(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "a.yaml", MINIMAL))
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert config.run == Path("runs/run")


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", MINIMAL)
    config = load_config(path, ("train.steps=7", "model.config.hidden_size=64", "parallel.sp=2"))
    assert config.train.steps == 7 and config.parallel.sp == 2
    assert config.model.config == {"hidden_size": 64}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stepps: 3}", "unknown setting train.stepps: did you mean steps?"),
        ("dta: {}", "unknown setting dta: did you mean data?"),
        ("train: {zzz: 3}", "unknown setting train.zzz: known are steps, accumulate"),
        ("train: {steps: 0}", "train.steps is 0: Input should be greater"),
        ("train: {steps: many}", "train.steps is 'many'"),
        ("name: ../up", "name is '../up'"),
        ("parallel: {order: spiral}", "parallel.order is 'spiral'"),
        ("model: null", "model is None"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    values = yaml.safe_load(text)
    mixed = MINIMAL | {
        key: (MINIMAL.get(key, {}) | value if isinstance(value, dict) else value)  # type: ignore[operator]
        for key, value in values.items()
    }
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "a.yaml", mixed))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config at"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: }", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad.yaml is not YAML") as caught:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="must hold settings"):
        load_config(write(tmp_path / "list.yaml", [1, 2]))
    with pytest.raises(ConfigError, match=r"data.path is missing|data is missing"):
        load_config(write(tmp_path / "a.yaml", {"model": {}, "train": {"steps": 1}}))
    path = write(tmp_path / "a.yaml", MINIMAL)
    with pytest.raises(ConfigError, match="write it as section"):
        load_config(path, ("train.steps",))
    with pytest.raises(ConfigError, match="is a value, not a section"):
        load_config(path, ("train.steps.more=1",))


def test_what_makes_another_run() -> None:
    config = Config.model_validate(MINIMAL)
    longer = Config.model_validate(MINIMAL | {"train": {"steps": 9}, "checkpoint": {"every": 3}})
    assert settled_differences(config, longer) == []
    other = Config.model_validate(MINIMAL | {"optimizer": {"lr": 0.5}})
    assert settled_differences(config, other) == ["optimizer.lr: 0.0003 -> 0.5"]


def test_learning_rate() -> None:
    optimizer = Config.model_validate(
        MINIMAL | {"optimizer": {"lr": 1.0, "warmup_steps": 4, "final_lr_share": 0.1}}
    ).optimizer
    rates = [lr_at(step, 20, optimizer) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[20] == pytest.approx(0.1) and rates[12] == pytest.approx(0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    joined = [lr_at(6 + own, 20, optimizer, own) for own in range(5)]
    assert joined == [0.25, 0.5, 0.75, *rates[9:11]]
    assert [lr_at(step, 20, optimizer, step) for step in range(21)] == rates
