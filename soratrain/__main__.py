"""The entry point: quote, compose, validate, run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from soratrain import again
from soratrain.errors import UserError
from soratrain.slurm import StoppedJobError, listen

LINGER = 3.0  # seconds for the first rank to say what all have found, before a launcher hears that one has ended
USAGE = """\
python -m soratrain stage=STAGE [+experiment=NAME] [GROUP=OPTION …] [KEY=VALUE …]   one stage
python -m soratrain -m stage=STAGE KEY=A,B …                                        a sweep (Hydra multirun)
python -m soratrain --cfg stage=STAGE …                                             print the resolved config
"""


def show_help() -> None:
    """Print the usage, the stages and every group's options."""
    from soratrain.schema import groups, launchers

    sys.stdout.write(USAGE + "\n")
    for group, options in groups().items():
        sys.stdout.write(f"  {group:<14}{' '.join(options)}{' auto' if group == 'machine' else ''}\n")
    sys.stdout.write(f"  {'hydra/launcher':<14}{' '.join(launchers())} (with -m)\n")


def dispatch(argv: Sequence[str]) -> int:
    """Run what `argv` asks for and return the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        show_help()
        return 0
    from soratrain.compose import LIST_KEYS, TEXT_KEYS
    from soratrain.quoting import quote

    flags = [word for word in argv if word.startswith("-")]
    unknown = set(flags) - {"-m", "--multirun", "--cfg"}
    if unknown:
        raise UserError(f"{sorted(unknown)[0]}: no such flag; see python -m soratrain --help")
    overrides = quote([word for word in argv if not word.startswith("-")], TEXT_KEYS, LIST_KEYS)
    if {"-m", "--multirun"} & set(flags):
        from soratrain.sweep import sweep

        return sweep(overrides)
    if any(item.startswith("hydra/launcher=") for item in overrides):
        raise UserError("hydra/launcher: starts the jobs of a sweep, of one job too; put -m before the words")
    from soratrain.run import prepare, run

    config, overrides = prepare(overrides)
    if "--cfg" in flags:
        import yaml

        sys.stdout.write(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120))
        return 0
    sys.argv[1:] = overrides  # processes of a distributed run are started with these same words
    run(config, overrides)
    return 0


def ending(work: Callable[[], int]) -> int:
    """Return the exit code: what `work` returns, 2 for what the user can mend, 1 for all else, 130 after Ctrl-C.

    slurm.py says what a job's is that stops.
    """
    try:
        return work()
    except UserError as error:
        if error.alike and other_rank():
            if halt := sys.modules.get("soratrain.distributed.halt"):
                halt.cease()
            time.sleep(LINGER)
        else:
            sys.stderr.write(f"error: {again.told(str(error))}\n")
        return 2
    except StoppedJobError as stopped:
        return stopped.code
    except Exception as error:
        if not getattr(error, "shown", False):  # where other ranks had to hear of it, its traceback has been shown
            raise
        return 1
    except KeyboardInterrupt as stopped:
        if not other_rank():
            said = str(stopped) or "interrupted: the same command goes on from here"
            sys.stderr.write(f"{again.told(said)}\n")
        return 130


def other_rank() -> bool:
    """Return whether this is a rank of a run, and not the first."""
    from soratrain.run import global_rank

    return global_rank() > 0


def main() -> int:
    """Do what the command line says; return the exit code."""

    def work() -> int:
        listen()
        return dispatch(sys.argv[1:])

    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
