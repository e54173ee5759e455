"""File systems in which ranges of remote files are read, each opened for one process, and what their errors mean."""

from __future__ import annotations

import re
from typing import Any

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.http import HTTPFileSystem

from soratrain.errors import StoreError

RETRIED = (408, 429)  # and all from 500
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/")


class ShortError(OSError):
    """Fewer bytes came than were asked for and could be there."""


class NoRangesError(Exception):
    """The server answers a range with the whole file."""


class RangeFileSystem(HTTPFileSystem):
    """fsspec's HTTP file system, whose range reads are checked to be what was asked for."""

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if start is None or end is None:
            return await super()._cat_file(url, start=start, end=end, **kwargs)
        headers = {**self.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        session = await self.set_session()
        async with session.get(self.encode_url(url), **{**self.kwargs, "headers": headers}) as answer:
            if answer.status == 416:
                return b""  # the file ends before
            self._raise_not_found_for_status(answer, url)
            if answer.status == 206:
                said = CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
                if said and int(said[1]) != start:
                    raise ShortError(f"asked for bytes from {start}, got those from {said[1]}")
                data = await answer.read()
                if said and len(data) != int(said[2]) + 1 - start:
                    raise ShortError(f"{len(data)} bytes came, {int(said[2]) + 1 - start} were announced")
                return data
            # the whole file is a right answer only where all of it was asked for
            if start == 0 and answer.content_length is not None and answer.content_length <= end:
                return await answer.read()
            answer.close()  # do not read on
            raise NoRangesError(f"the server answers a range with status {answer.status} and the whole file")


def open_filesystem(url: str, timeout: float) -> tuple[AsyncFileSystem | Any, str]:
    """Return a file system of this process's own, and the folder's path in it.

    Raises:
        StoreError: the protocol is unknown, or what reads it is not installed.
    """
    options: dict[str, Any] = {"skip_instance_cache": True}
    if url.startswith(("http://", "https://")):
        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        return RangeFileSystem(client_kwargs={"timeout": limits}, **options), url
    if url.startswith(("s3://", "s3a://")):
        config = {"connect_timeout": timeout, "read_timeout": timeout}
        # one layer tries again, and it is this file's
        options["config_kwargs"] = {**config, "retries": {"total_max_attempts": 1, "mode": "standard"}}
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url} cannot be read: {error} (s3:// needs `pip install soratrain[s3]`)") from error
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1
    return filesystem, root


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of aiohttp or botocore."""
    while error is not None:
        if isinstance(error, aiohttp.ClientResponseError):
            return error.status
        answer = getattr(error, "response", None)
        if isinstance(answer, dict) and "ResponseMetadata" in answer:
            return answer["ResponseMetadata"].get("HTTPStatusCode")
        error = error.__cause__
    return None


def may_pass(error: BaseException) -> bool:
    """Return whether the same read may well succeed later."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in RETRIED
    if isinstance(error, FileNotFoundError | PermissionError | NoRangesError):
        return False
    if isinstance(error, OSError | TimeoutError | aiohttp.ClientError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}  # botocore may not be installed
    return bool(names & {"HTTPClientError", "IncompleteReadError", "ResponseStreamingError"})
