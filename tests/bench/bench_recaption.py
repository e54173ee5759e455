"""What the captioner is for: a DiT trained on our captions of clips that came without any, beside one on the true ones.

The captioner learns from one world's clips and captions (`+experiment=captioner_long`) and describes the clips of
another seed, whose captions have been taken out of the shards. Two DiTs see the same latents in the same order with the
same noise; one reads our captions, the other the true ones. The oracle then reads what they draw for the same prompts,
half of combinations never seen in training. All is done by the commands that anyone would type, in
`outputs/bench_recaption`, two trainings at a time on a core each, for an hour and a half; the same command goes on
where it was ended.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

from data_prep.world.captions import describe
from data_prep.world.judging import judge
from data_prep.world.world import World
from soratrain.data.caption_table import open_captions
from soratrain.data.manifest import write_captions

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "outputs" / "bench_recaption"
TAUGHT, CLIPS = 9600, 2400  # clips that the captioner learns from, and that it describes
SEEDS, PROMPTS = (0, 1), 256
NET = ("dit=nano", "trainer.max_steps=2700")
STYLES = ("short", "long")  # that a DiT is shown by default
NAMES = ("color", "shape", "motion", "background", "number")
TITLE = (
    f"Oracle accuracy in percent of DiTs ({' '.join(NET)}) on captions of {CLIPS} clips whose own were withheld:"
    f" {PROMPTS} prompts of seen and {PROMPTS} of held-out combinations each, the same for all"
)
Words = Sequence[str]


def together(*commands: Words) -> None:
    """Run commands at once, a core each; their output goes to log files.

    Raises:
        RuntimeError: one has failed; names its log.
    """
    (PLACE / "logs").mkdir(parents=True, exist_ok=True)
    running = []
    for words in commands:
        log = PLACE / "logs" / ("-".join(word.rpartition("/")[2] for word in words)[:120] + ".log")
        with log.open("w") as out:
            full = [sys.executable, "-m", *words]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            running.append((log, subprocess.Popen(full, stdout=out, stderr=out, env=env, cwd=PLACE)))
    failed = [str(log) for log, process in running if process.wait()]
    if failed:
        raise RuntimeError(f"failed, see {', '.join(failed)}")


def stage(name: str, *more: str) -> Words:
    """Return the words of a stage on the clips without captions; every net but the DiT is the one that is made here."""
    return ("soratrain", f"stage={name}", "machine=laptop", "run=main", "upstream=fail", *more)


def scenes() -> dict[str, Any]:
    """Return the scene of every clip of the second world, by its key."""
    world, found = World(seed=1), {}
    for name, data in members(PLACE / "captioned"):
        if name.endswith(".json"):
            source = json.loads(data)["source"]["uri"]  # world:demo/SEED/INDEX
            found[name.removesuffix(".json")] = world.scene(int(source.rpartition("/")[2]))
    return found


def members(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every member of a folder's shards."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def withhold() -> None:
    """Write the second world's clips without captions to `bare`, and these to `true`, as stage=recaption would."""
    bare, true = PLACE / "bare", PLACE / "true"
    if (bare / "dataset.json").is_file():
        return
    shutil.rmtree(bare, ignore_errors=True)
    bare.mkdir()
    with tarfile.open(bare / "shard-000000.tar", "w") as tar:
        for name, data in members(PLACE / "captioned"):
            if name.endswith(".json"):
                data = json.dumps({**json.loads(data), "captions": []}).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    common = {"model": "world", "rev": "true", "lang": "en"}
    rows = [
        {"key": key, "type": style, "text": describe(scene, style), **common}
        for key, scene in scenes().items()
        for style in STYLES
    ]
    write_captions(true / "captions" / "true" / "part-00000.parquet", rows)
    together(("data_prep", "task=index", f"input={bare}"))


def prepare() -> None:
    """Make what both DiTs share: clips, captioner, captions, VAE, latents."""
    together(
        ("data_prep", "input=world", "output=taught", f"world.clips={TAUGHT}"),
        ("data_prep", "input=world", "output=captioned", f"world.clips={CLIPS}", "world.seed=1"),
    )
    withhold()
    chain = ("soratrain", "stage=captioner", "+experiment=captioner_long", "machine=laptop", "run=main")
    together((*chain, "inputs.shards=taught"), stage("vae", "inputs.shards=bare"))
    captioner = "inputs.captioner=outputs/main/captioner/captioner_long"
    together(stage("recaption", "inputs.shards=bare", captioner), stage("encode", "inputs.shards=bare"))


def named() -> dict[str, float]:
    """Return what our captions of the withheld clips name rightly, mean over clips and styles that the DiT reads."""
    ours, judged = open_captions(PLACE / "outputs/main/recaption/base"), []
    for key, scene in scenes().items():
        said = {row["type"]: row["text"] for row in ours.get(key)}
        judged += [judge(said[style], scene.truth).scores for style in STYLES]
    return {name: mean(scores[name] for scores in judged if name in scores) for name in NAMES}


def dits() -> dict[str, list[dict[str, float]]]:
    """Return the accuracies of each DiT, a mapping a seed, by the captions that it was trained on."""
    captions = {"ours": "outputs/main/recaption/base", "true": "true"}
    wanted = [(name, seed) for seed in SEEDS for name in captions]
    trained = {pair: f"outputs/main/dit/{pair[0]}-{pair[1]}" for pair in wanted}
    pairwise = [wanted[start : start + 2] for start in range(0, len(wanted), 2)]
    for pairs in pairwise:
        together(
            *(
                stage("dit", *NET, f"inputs.captions={captions[name]}", f"seed={seed}", f"out={trained[name, seed]}")
                for name, seed in pairs
            )
        )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in captions}
    for pairs in pairwise:
        places = {pair: f"outputs/main/evaluate/{pair[0]}-{pair[1]}" for pair in pairs}
        captioner = "inputs.captioner=outputs/main/captioner/captioner_long"
        sizes = (f"stage.job.prompts={PROMPTS}", "stage.job.clips=8")
        together(*(stage("evaluate", captioner, f"inputs.dit={trained[p]}", f"out={places[p]}", *sizes) for p in pairs))
        for name, seed in pairs:
            samples = json.loads((PLACE / places[name, seed] / "report.json").read_text())["samples"]
            found[name].append({key: mean(split[key] for split in samples.values()) for key in NAMES})
    return found


def measure() -> list[dict[str, str]]:
    """Return the table."""
    prepare()
    found, said = dits(), named()
    rows = [{"trained on": "(our captions themselves, of the withheld clips)", **shares(said)}]
    for seed, (ours, true) in enumerate(zip(found["ours"], found["true"], strict=True)):
        rows.append({"trained on": f"our captions, seed {SEEDS[seed]}", **shares(ours)})
        rows.append({"trained on": f"true captions, seed {SEEDS[seed]}", **shares(true)})
    total = {
        name: mean(one[name] for one in found["ours"]) - mean(one[name] for one in found["true"]) for name in NAMES
    }
    rows.append({"trained on": "ours minus true, points", **shares(total, "+.1f")})
    return rows


def shares(values: dict[str, float], form: str = ".1f") -> dict[str, str]:
    """Return figures in percent, and their mean."""
    cells = {name: f"{100 * values[name]:{form}}" for name in NAMES}
    return {**cells, "mean": f"{100 * mean(values[name] for name in NAMES):{form}}"}
