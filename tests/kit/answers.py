"""What a scripted S3 answers: good answers and errors by name, and pieces of odd ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ENOUGH = 256 << 20  # what has no end ends here, lest it takes the machine along
BLOCK = 1 << 16
HTML = b"<html><body>Please accept our terms of use.</body></html>"


@dataclass(frozen=True)
class Answer:
    """One answer: with a code, S3's error document; with a body, that body; else the empty answer
    to a good PUT.
    """

    status: int = 200
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    etag: bool = True
    drop: bool = False


STORED = Answer()
SLOW_DOWN = Answer(503, "SlowDown")
INTERNAL_ERROR = Answer(500, "InternalError")
ACCESS_DENIED = Answer(403, "AccessDenied")
EXPIRED_TOKEN = Answer(403, "ExpiredToken")
CLOCK_SKEW = Answer(403, "RequestTimeTooSkewed")
UNKNOWN_KEY = Answer(403, "InvalidAccessKeyId")
NO_SUCH_BUCKET = Answer(404, "NoSuchBucket")
WRONG_REGION = Answer(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-central-1"})
NO_ETAG = Answer(etag=False)
PORTAL = Answer(200, headers={"Content-Type": "text/html"}, body=HTML, etag=False)
PORTAL_WITH_ETAG = Answer(200, headers={"Content-Type": "text/html"}, body=HTML)
DROPPED = Answer(drop=True)


def head(status: str = "200 OK", headers: Mapping[str, str] | None = None) -> bytes:
    """Return a status line and the headers, with the blank line that ends them."""
    headers = {"Connection": "close"} | dict(headers or {})
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def framed(
    body: Iterable[bytes],
    how: str = "length",
    status: str = "200 OK",
    headers: Mapping[str, str] | None = None,
) -> Iterator[bytes]:
    """Return an answer whose body ends by its `length`, by the last of its chunks (`chunked`), or
    with the connection (`close`).
    """
    more = dict(headers or {})
    if how == "length":
        body = [b"".join(body)]
        more["Content-Length"] = str(len(body[0]))
    elif how == "chunked":
        more["Transfer-Encoding"] = "chunked"
    yield head(status, more)
    for part in body:
        yield b"%x\r\n%s\r\n" % (len(part), part) if how == "chunked" else part
    if how == "chunked":
        yield b"0\r\n\r\n"


def endless(begin: bytes = b"", more: bytes = b"x" * BLOCK) -> Iterator[bytes]:
    """Return a body that goes on for as long as somebody reads, and at most for 256 MiB."""
    yield begin
    for _ in range(ENOUGH // len(more)):
        yield more


def dripping(begin: bytes, every: float = 0.02) -> Iterator[bytes | float]:
    """Return an answer that begins like this, and goes on with a byte now and then, for ever."""
    yield begin
    while True:
        yield every
        yield b"x"


def continuing(every: float = 0.02) -> Iterator[bytes | float]:
    """Return an answer that for ever asks to go on."""
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n"
        yield every


def error(code: str, message: str = "scripted") -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def entry(
    key: str, size: object = 718, stored_at: str = "2026-03-01T12:00:00.000Z", missing: str = ""
) -> str:
    """Return one entry of a list, without the field that is missing."""
    fields = {"Key": key, "LastModified": stored_at, "ETag": '"x"', "Size": size}
    fields = {name: value for name, value in fields.items() if name != missing}
    inside = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return f"<Contents>{inside}</Contents>"


def listing(*entries: str, truncated: str = "false", token: str | None = None) -> bytes:
    """Return a page of a list; with a token, there are more."""
    following = "" if token is None else f"<NextContinuationToken>{token}</NextContinuationToken>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>some-bucket</Name>'
        f"<Prefix>alice/</Prefix><KeyCount>{len(entries)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>{truncated}</IsTruncated>{following}{''.join(entries)}</ListBucketResult>"
    ).encode()
