"""`python -m data_prep input=… output=…`: compose, check, run; a mistake is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake the user can mend, 130 when interrupted."""
    from rich.console import Console

    from soratrain.errors import UserError

    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        errors.print(f"error: {error}")
        return 2
    except OSError as error:  # a full disk, a folder that may not be read: the message names it
        errors.print(f"error: {error}; the same command continues when that is mended")
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted: the same command continues")
        return 130


def run(argv: list[str]) -> int:
    """Compose the settings from `argv`, run the task and print its summary."""
    from rich.console import Console

    from data_prep.compose import compose
    from data_prep.schema import CONF, PATHS
    from soratrain.quoting import quote

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if any(word in ("-h", "--help") for word in argv):
        console.print((CONF / "data_prep.yaml").read_text(encoding="utf-8"))
        return 0
    config = compose(quote(argv, PATHS))
    if config.task == "index":
        from data_prep.index import index

        index(config, console)
    elif config.task == "score":
        from data_prep.rated import score

        score(config, console)
    elif config.task == "select":
        from data_prep.select import select

        select(config, console)
    elif config.task == "repack":
        from data_prep.repack import repack

        repack(config, console)
    elif config.task == "validate":
        from data_prep.validate import validate

        validate(config, console)
    elif config.task == "report":
        from data_prep.report import write

        console.print(str(write(Path(config.input))))
    else:
        from data_prep.build import build

        build(config, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
