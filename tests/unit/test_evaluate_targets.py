"""stage=evaluate and stage=plan: a target is chosen, and each has a folder of its own."""

from __future__ import annotations

import pytest

from soratrain.compose import compose
from soratrain.errors import ConfigError
from soratrain.run import prepare


def test_target_chooses_what_is_evaluated_and_planned_each_in_a_folder_of_its_own():
    chain, vae = (prepare(["stage=evaluate", "machine=laptop", *more])[0] for more in ([], ["target=vae"]))
    assert chain["out"] == "outputs/default/evaluate/base" and vae["out"] == "outputs/default/evaluate/vae"
    assert chain["stage"]["job"]["_target_"].endswith("Evaluate") and vae["stage"]["needs"] == ["vae", "shards"]
    assert prepare(["stage=evaluate", "target=chain"])[0]["stage"] == chain["stage"]
    refined = compose(["stage=evaluate", "target=vae", "+experiment=native_res", "stage.job.clips=3"])[0]
    assert refined["out"] == "outputs/default/evaluate/vae-native_res" and refined["stage"]["job"]["clips"] == 3
    for words in (["target=vae"], ["stage.job.target=vae"]):
        assert prepare(["stage=plan", *words])[0]["stage"]["job"]["target"] == "vae"
    assert prepare(["stage=plan"])[0]["stage"]["job"]["target"] == "dit"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=evaluate", "target=vea"], "target=vea: stage=evaluate has no such target; did you mean 'vae'"),
        (["stage=dit", "target=vae"], "target=vae: only stage=evaluate and stage=plan have one"),
        (["stage=evaluate", "target=vae", "lpips.vg=a"], "lpips.vg: no such key; did you mean 'vgg'"),
        (["stage=evaluate", "target=vae", "stage.job.prompts=3"], "stage.job.prompts: no such key"),
    ],
)
def test_a_wrong_target_is_named_with_the_mend(words, said):
    with pytest.raises(ConfigError, match=said):
        prepare([*words, "machine=laptop"])
