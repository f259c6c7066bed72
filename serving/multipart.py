"""A form with a file in it (RFC 7578), as it comes in: fields are collected, the file passes.

What is covered: any cut of the body into chunks, one file, fields in any order, and bounds on
everything but the file itself, whose bytes are handed on at once.
What is not covered: several files, nested forms, transfer encodings within a part, and text before
the first part, which browsers and clients never send.
"""

import logging
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving import problems
from serving.problems import ApiError

FILE_FIELD = "file"
OVERHEAD_BYTES = 64 << 10
"""What a form may have beside its file: fields, names, boundaries."""
MAX_FIELD_BYTES = 1024
MAX_FIELDS = 16
_MAX_NAME_BYTES = 256
_MAX_HEADERS = 8
_MAX_HEADER_BYTES = 4096
_QUIET = logging.Logger("serving.multipart", logging.CRITICAL)
"""What a client does wrong is told to him and not to the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A field that is whole."""

    name: str
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStart:
    """The file begins; its data follows."""

    filename: str
    """As the client gave it: anything may be in it."""


Event = Field | FileStart | bytes
"""bytes: a piece of the file, never empty."""


class Form:
    """A form that is being read."""

    def __init__(self, content_type: str) -> None:
        """content_type: of the request. Raises ApiError (400) where it is no form's."""
        self._events: list[Event] = []
        self._headers: dict[str, bytes] = {}
        self._header = b""
        self._header_value = b""
        self._name: str | None = None
        """Of the part that is being read."""
        self._value: bytearray | None = None
        """Of the field that is being read; None: it is the file."""
        self._names: set[str] = set()
        self._is_complete = False
        boundary = _boundary(content_type)
        self._opening = b"--" + boundary
        self._held = b""
        """The beginning of the body, until it is known to be a boundary."""
        self._is_open = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part,
                "on_header_field": self._on_header_name,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
            max_header_count=_MAX_HEADERS,
            max_header_size=_MAX_HEADER_BYTES,
        )
        self._parser.logger = _QUIET

    def feed(self, data: bytes) -> list[Event]:
        """What the next bytes of the body bring. Raises ApiError (400) for a broken form."""
        if not self._is_open:
            self._held += data
            if not self._held.startswith(self._opening[: len(self._held)]):
                raise _broken("it does not begin with the boundary that the Content-Type names")
            if len(self._held) < len(self._opening):
                return []
            data, self._held, self._is_open = self._held, b"", True
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _broken(f"{type(error).__name__} in its parts") from None
        events, self._events = self._events, []
        return events

    def finish(self) -> None:
        """The body is at its end. Raises ApiError (400) where the form is not."""
        if not self._is_complete:
            raise _broken("it ends before its last boundary; nothing was kept, send it again")

    def _on_part(self) -> None:
        self._headers = {}
        self._name = self._value = None

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header(self) -> None:
        name = self._header.decode("ascii").lower()
        if name in self._headers:
            raise _broken(f"a part has two headers {name!r}")
        self._headers[name] = self._header_value
        self._header = self._header_value = b""

    def _on_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get("content-disposition", b""))
        given = options.get(b"name")
        if kind != b"form-data" or given is None or len(given) > _MAX_NAME_BYTES:
            raise _broken("a part does not say which field it is: Content-Disposition: form-data")
        self._name = name = given.decode(errors="replace")
        if name in self._names:
            if name == FILE_FIELD:
                raise problems.invalid(FILE_FIELD, "there are several; send one request for each")
            raise problems.invalid(_shown(name), "the field stands twice; send it once")
        if len(self._names) >= MAX_FIELDS:
            raise _broken(f"it has more than {MAX_FIELDS} fields")
        self._names.add(name)
        filename = options.get(b"filename")
        if name != FILE_FIELD:
            if filename is not None:
                raise problems.invalid(
                    _shown(name), f"it is a file; the file comes in {FILE_FIELD}, and only there"
                )
            self._value = bytearray()
            return
        encoding = self._headers.get("content-transfer-encoding", b"binary").lower()
        if encoding not in (b"binary", b"8bit", b"7bit"):
            raise _broken("Content-Transfer-Encoding is not binary; send the file as it is")
        if filename is None:
            raise problems.invalid(FILE_FIELD, "expected a file, with a filename; got a text")
        self._events.append(FileStart(filename=filename.decode(errors="replace")))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self._events.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise problems.invalid(
                _shown(self._name or ""), f"longer than {MAX_FIELD_BYTES} bytes, the longest field"
            )

    def _on_part_end(self) -> None:
        if self._value is None:
            return
        assert self._name is not None
        try:
            value = self._value.decode()
        except UnicodeDecodeError:
            raise problems.invalid(_shown(self._name), "not UTF-8 text") from None
        self._events.append(Field(name=self._name, value=value))

    def _on_end(self) -> None:
        self._is_complete = True


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type.encode("latin-1", errors="replace"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data":
        raise ApiError(
            "Content-Type is not multipart/form-data; send the file as a form, with the fields "
            "purpose and file",
            status=400,
        )
    if not 1 <= len(boundary) <= 70:
        raise _broken("its Content-Type has no boundary of 1 to 70 characters")
    return boundary


def _broken(why: str) -> ApiError:
    return ApiError(f"The request's body is not a form that can be read: {why}.", status=400)


def _shown(name: str) -> str:
    """A field's name, which may be anything, where it can be shown; else its kind."""
    return name if name.isascii() and name.isprintable() and len(name) <= 40 else "a field"
