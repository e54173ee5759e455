"""`make bench`: every benchmark beside what it is compared with, as tables here and in RESULTS.md.

A benchmark is a module `bench_NAME.py` with `TITLE` and `measure()`, which returns the rows of a table. What is
compared alternates within one run; figures are the median (least to most). One that needs what this machine does not
have says so in a line, which is an error where it was asked for by name, and leaves its table as it is.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"


def machine() -> str:
    """Return one line that says where and with what the figures were measured."""
    import av
    import torch

    cpu = platform.processor() or "CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, PyAV {av.__version__}"
    return f"{len(os.sched_getaffinity(0))} cores ({cpu}), {memory:.0f} GiB{gpu}; {versions}"


def markdown(rows: list[dict[str, str]]) -> str:
    """Return rows as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sections(text: str) -> dict[str, str]:
    """Return what RESULTS.md holds, by benchmark."""
    parts = text.split("\n## ")[1:]
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


def main(names: list[str]) -> int:
    """Run the benchmarks called `names`, or all, and write their tables; the others' stay as they are."""
    sys.path.insert(0, str(HERE))
    sys.path.insert(0, str(HERE.parent / "unit"))
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    if unknown := sorted(set(names) - set(known)):
        sys.stderr.write(f"error: {unknown[0]}: no such benchmark; use {', '.join(known)}\n")
        return 2
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    code = 0
    for name in names or known:
        module = importlib.import_module(f"bench_{name}")
        began = time.monotonic()
        try:
            rows = module.measure()
        except importlib.import_module("needs").MissingError as error:
            sys.stderr.write(f"bench {name}: not measured: {error}\n")
            code = 1 if name in names else code
            continue
        table = Table(*rows[0], title=module.TITLE, title_justify="left")
        for row in rows:
            table.add_row(*(row.get(column, "") for column in rows[0]))
        console.print(table)
        took = f"*{time.strftime('%Y-%m-%d')}, {time.monotonic() - began:.0f} s; {machine()}*"
        found = sections(RESULTS.read_text()) if RESULTS.is_file() else {}
        found[name] = f"{module.TITLE}\n\n{markdown(rows)}\n\n{took}"
        text = "# Results of `make bench`\n" + "".join(f"\n## {key}\n\n{found[key]}\n" for key in sorted(found))
        RESULTS.write_text(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
