"""How stage=plan shows what it found, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from soratrain.amounts import counted, duration, short, size
from soratrain.data.fitting import GRID, TIME
from soratrain.data.summary import remarks
from soratrain.distributed.memory import GIB
from soratrain.stages.plan_cost import BALANCED_OVER
from soratrain.stages.plan_ranks import KEYS

STRONGER = {  # strategies under which a rank holds less
    "single": "strategy=zero3",
    "ddp": "strategy=zero3",
    "zero1": "strategy=zero3",
    "zero2": "strategy=zero3",
    "zero3": "strategy=zero3_offload",
    "zero2_offload": "strategy=zero3_offload",
}
SLOWER = "; published runs took 1.1 to 1.7 times what is foretold of them"  # tests/bench/RESULTS.md, predict
SAID = {"vae": "VAE", "captioner": "captioner"}
OFTEN = 20  # epochs of one data set in a mix beyond which a small one is rather learnt by heart


def show(console: Console, document: Mapping[str, Any]) -> None:
    """Print the plan."""
    data, run, memory = document["data"], document["run"], document["memory"]
    ranks, sequence = document["ranks"], document["sequence"]
    split = f" ({ranks // sequence} x {sequence} that share their tokens)" if sequence > 1 else ""
    table = Table(title=f"plan of stage={document['target']} on {counted(ranks, 'ranks')}{split}", title_justify="left")
    shared = "of tokens" if data["batching"] == "pack" else "of blocks"
    sets = data["sets"]
    if sets:
        table.add_column("data set", overflow="fold")
    for name in ("bucket", "samples", "a micro-batch", "tokens", shared, "of samples"):
        table.add_column(name, justify="left" if name == "bucket" else "right")
    for item in sorted(data["buckets"], key=lambda item: -item["tokens"]):
        counts = f"{item['samples']:,}", f"{item['batch_size']:.4g}", f"{item['tokens']:,.0f}"
        named = [item["data"]] if sets else []
        table.add_row(*named, item["bucket"], *counts, f"{item['blocks']:.1%}", f"{item['shown']:.1%}")
    console.print(table)
    for line in remarks(data):
        console.print(line)
    for item in sets:
        often = (
            f"; more than {OFTEN} times: take less of it in data.mix, or fewer steps" if item["epochs"] > OFTEN else ""
        )
        console.print(
            f"  {item['data']}: {item['shown']:.1%} of the samples shown, {item['epochs']:.3g} epochs of its"
            f" {item['samples']:,} samples{often}"
        )
    console.print(
        f"{run['steps']:,} steps of {run['samples_per_step']:.4g} samples and {run['tokens_per_step']:,.0f} tokens:"
        f" {run['epochs']:.3g} epochs, {run['tokens']:.3g} tokens",
    )
    if document["note"]:
        console.print(document["note"])
    if ranks > sequence:
        console.print(
            f"the mean rank's work by the largest's (1: none waits for another): {document['balance']['mean']:.3f} over"
            f" {BALANCED_OVER} steps, {document['balance']['least']:.3f} at the least"
        )
    console.print(f"{memory['said']}; largest micro-batch {memory['largest']}")
    room = memory["device_gib"]
    if room and memory["total_gib"] > room:
        console.print(f"  that is more than the {room:.4g} GiB of a device: {mends(memory)}")
    if document["time"]:
        console.print(told(document["time"], document["ranks"]))
        console.print(rests_on(document["time"]))
    else:
        console.print(f"the time of a step is foretold for stage=dit alone, not for a {SAID[document['target']]}")
    if cache := document["cache"]:
        console.print(f"cached latents of {cache['clips']:,} clips: {size(cache['latents_gib'] * GIB)}")
    if document["clip"]:
        clip = document["clip"]
        flops = ""
        if "forward_tflop" in clip:
            flops = f", {clip['forward_tflop']:.4g} TFLOP forward ({clip['attention']:.0%} of it attention)"
        latents = f"{size(clip['latent_mib'] * 2**20)} of latents"
        cut = f" (of {clip['asked']}: sides in multiples of {GRID}, 1 + {TIME}k frames)"
        where = f"{clip['bucket']}{cut if clip['asked'] != clip['bucket'] else ''}"
        console.print(f"a clip of {where}: {clip['tokens']:,} tokens, {latents}{flops}")


def mends(memory: Mapping[str, Any]) -> str:
    """Return what makes a rank hold less, in the words of a command."""
    strategy, recompute = memory["strategy"], memory["recompute"]
    stronger = [STRONGER[strategy]] if strategy in STRONGER else []
    ranks = f"more ranks ({KEYS})"  # which shard nothing under single and ddp
    first = [f"{stronger[0]} on {ranks}"] if strategy in ("single", "ddp") else [ranks, *stronger]
    full = ["dit.recompute=full"] if recompute not in (None, "full") else []
    return f"use {', '.join([*first, *full])}, or fewer tokens (data.tokens_per_batch)"


def rests_on(time: Mapping[str, Any]) -> Table:
    """Return what the time of a step rests on, as a table: figures, and where they are from."""
    table = Table(title="what that rests on (stage.devices sets the figures)", title_justify="left")
    for name in ("figure", "value", "from"):
        table.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
    for row in time["rests_on"]:
        table.add_row(row["figure"], row["value"], row["from"])
    return table


def told(time: Mapping[str, Any], ranks: int) -> str:
    """Return the time of a step in words."""
    total = time["step_seconds"]
    listed = ", ".join(f"{name} {value / total:.0%}" for name, value in time["seconds"].items())
    place = f"{ranks} {time['device']}" + (f" on {time['nodes']} nodes" if time["nodes"] > 1 else "")
    return (
        f"a step on {place}, an estimate from below: {total:.3g} s ({listed}), {short(time['tokens_per_s'])} tokens/s,"
        f" {time['utilisation']:.0%} of the peak; the run {duration(3600 * time['hours'])}{SLOWER * time['on_gpu']}"
    )
