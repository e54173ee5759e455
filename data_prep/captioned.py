"""Sources with the captions that a table gives them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from data_prep.captions import Captions
from data_prep.matched import Matched
from data_prep.matching import match
from data_prep.records import FROM_NAME, Caption, Source
from data_prep.tables import wrong


def captioned(sources: Sequence[Source], table: Captions, where: str) -> tuple[list[Source], Matched]:
    """Return the sources with their captions from a table, where it has any, and what matched.

    Of several columns that may name the file the one that names most is taken.

    Raises:
        DataError: no row names a file of the input.
    """
    columns = range(len(table.columns))
    tried = [match((row.names[column] for row in table.rows), sources, table.path.parent) for column in columns]
    best = max(columns, key=lambda column: len(tried[column]))  # the first of those that name as many
    found = tried[best]
    if not found:
        names = next((row.names[best] for row in table.rows if row.names[best]), "nothing")
        what = f"none of its {len(table.rows)} rows names a file of input={where}: column {table.columns[best]}"
        raise wrong(table.path, f"{what} has {names!r}, and the input {sources[0].uri!r}")
    given: dict[int, list[Caption]] = defaultdict(list)
    how: Counter[str] = Counter()
    empty, no_file = 0, []
    for row in table.rows:
        name = row.names[best]
        if name not in found:
            no_file.append(name or "(no name)")
            continue
        number, way = found[name]
        how[way] += 1
        empty += not row.captions
        given[number] += row.captions
    result = [
        replace(source, captions=tuple(dict.fromkeys(given[number]))) if given.get(number) else source
        for number, source in enumerate(sources)
    ]
    written = [any(caption.model != FROM_NAME for caption in source.captions) for source in sources]
    matched = Matched(
        table=str(table.path),
        column=table.columns[best],
        rows=len(table.rows),
        empty=empty,
        files=sum(map(bool, given.values())),
        beside=sum(written[number] for number, captions in given.items() if captions),
        by=dict(how.most_common()),
        no_file=tuple(no_file),
        no_row=tuple(source.uri for number, source in enumerate(sources) if not given.get(number)),
    )
    return result, matched
