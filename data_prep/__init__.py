"""From raw video files, images or the embedded world to WebDataset shards with an index.

    python -m data_prep input=world                        the embedded world, to data/world
    python -m data_prep input=FOLDER output=data/NAME      also a glob, a list (.txt, one path a line), or one file
    python -m data_prep task=index input=FOLDER            a manifest for WebDataset tars that are there already

Steps, each a module with one function from typed record to typed record: ingest → probe → shots → transcode → pack.
Everything is done in units of work whose results do not depend on who does them: the same command after an
interruption continues, and any number of processes gives the same bytes. What is not used has a reason in
`failures.jsonl` and a count in `stats.json`.

A damaged file is used as far as it can be decoded without an error, if that is at least `shots.min_seconds`; its
reason is recorded in either case.
"""
