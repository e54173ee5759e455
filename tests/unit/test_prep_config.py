"""Promises about settings: a mistake is one line with its mend and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.compose import compose, keys_of
from data_prep.schema import PATHS, PrepConfig
from soratrain.errors import ConfigError
from soratrain.quoting import quote


def composed(*argv: str) -> PrepConfig:
    return compose(quote(argv, PATHS))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("wrld.clips=3", "did you mean world.clips?"),
        ("inptu=a", "did you mean input?"),
        ("world.cilps=3", "did you mean world.clips?"),
        ("+extra=1", "unknown key '+extra'"),
        ("zzz=1", "known keys"),
        ("world=demo", "world.preset"),
        ("folder", "not key=value"),
        ("world.clips=many", "world.clips"),
        ("world.clips=0", "between 1"),
        ("task=choose", "build, index"),
        ("workers=none", "auto or a number"),
        ("shots.stride=3", "shots.stride=3.0 must lie between 20"),
        ("engine=cloud", "local, slurm"),
        ("select.duplicates=some", "drop or keep"),
        ("score.batch=0", "score.batch=0 must lie between 1"),
        ("limits.seconds=0", "limits.seconds=0.0 must lie between 1"),
        ("slurm.jobs=0", "slurm.jobs=0 must lie between 1"),
        ("validate.decode=few", "all, sample or none"),
        ("video.preset=fastest", "veryfast"),
        ("video.crf=99", "between 0 and 51"),
        ("shots.min_seconds=30", "between 0 and 20"),
        ("world.clips=[1", "world.clips"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys: pytest.CaptureFixture[str], argument: str, said: str) -> None:
    assert main(["input=a", "output=b", argument]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert said in printed.err


def test_input_and_output_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "input is missing" in capsys.readouterr().err
    assert main(["input=a"]) == 2 and "output is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["a,b", "it's", 'a "b"', "(c)", "{1..2}", "三只猫 café", "a=b", "*.mp4", "[ab]*", "${x}", "$a\\"]
)
def test_any_path_can_be_input_and_output(path: str) -> None:
    config = composed(f"input={path}", f"output={path}")
    assert config.input == path and config.output == path


def test_the_world_has_an_output_of_its_own() -> None:
    assert composed("input=world").folder == Path("data/world")


def test_the_hash_depends_on_what_decides_the_shards_and_on_nothing_else() -> None:
    base = composed("input=world").hash()
    for same in ("output=x", "workers=3", "fresh=true", "shots.threshold=5"):
        assert composed("input=world", same).hash() == base
    for other in ("world.seed=1", "world.clips=5", "video.crf=20", "shards.mb=5"):
        assert composed("input=world", other).hash() != base
    assert composed("input=a", "output=b").hash() != composed("input=a", "output=b", "shots.threshold=5").hash()


def test_the_yaml_and_the_schema_have_the_same_keys_and_defaults() -> None:
    import yaml

    from data_prep.schema import CONF

    written = yaml.safe_load((CONF / "data_prep.yaml").read_text(encoding="utf-8"))
    del written["defaults"]
    flat = {}
    for key, value in written.items():
        flat |= (
            {key: None} | {f"{key}.{name}": item for name, item in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    assert set(flat) == set(keys_of(PrepConfig))
    default = PrepConfig()
    for key, value in flat.items():
        if "." in key:
            group, name = key.split(".")
            assert getattr(getattr(default, group), name) == value, key


def test_composing_wrongly_raises_an_error_for_people() -> None:
    with pytest.raises(ConfigError):
        composed("input=a", "output=b", "nonsense=1")
