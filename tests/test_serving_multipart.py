"""The form's parser: the same result however the body is cut, and bounds on all but the file."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import multipart
from serving.multipart import Field, FileStart, Form
from serving.problems import ApiError

BOUNDARY = "a1-b2_c3"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def field(name: str, value: bytes) -> bytes:
    return f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value


def file(data: bytes, *, name: str = "file", filename: str = "a.jsonl", more: str = "") -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n{more}\r\n'
    return head.encode() + data


def form(*parts: bytes, end: bytes = b"--\r\n") -> bytes:
    mark = f"--{BOUNDARY}".encode()
    return b"".join(mark + b"\r\n" + part + b"\r\n" for part in parts) + mark + end


def read(
    body: bytes, cuts: Sequence[int] = (), *, kind: str = TYPE
) -> tuple[list[Field | FileStart], bytes]:
    """What is in a body that is cut at some places: fields and names in order, and the file."""
    reader = Form(kind)
    heard: list[Field | FileStart] = []
    data = b""
    places = [0, *sorted(cuts), len(body)]
    for start, end in pairwise(places):
        for event in reader.feed(body[start:end]):
            if isinstance(event, bytes):
                assert event
                data += event
            else:
                heard.append(event)
    reader.finish()
    return heard, data


def outcome(body: bytes, cuts: Sequence[int] = ()) -> object:
    """The same, with what is refused as its message."""
    try:
        return read(body, cuts)
    except ApiError as error:
        return str(error)


def cuts_of(body: bytes) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(body)), max_size=12)


def test_fields_and_file_come_in_the_order_of_the_form() -> None:
    body = form(field("purpose", b"fine-tune"), file(b"one\r\ntwo\n"), field("x", "ü".encode()))
    heard, data = read(body)
    assert heard == [
        Field(name="purpose", value="fine-tune"),
        FileStart(filename="a.jsonl"),
        Field(name="x", value="ü"),
    ]
    assert data == b"one\r\ntwo\n"


NASTY = st.lists(
    st.sampled_from(
        [b"\r", b"\n", b"-", b"--", b"\r\n--", BOUNDARY.encode()[:4], b"\r\n--a1-b2_c", b"x", b"\0"]
    ),
    max_size=30,
).map(b"".join)


@given(data=st.binary(max_size=300) | NASTY, more=st.data())
def test_any_cut_of_a_body_gives_the_same_file(data: bytes, more: st.DataObject) -> None:
    body = form(field("purpose", b"batch"), file(data), field("y", b"1"))
    cuts = more.draw(cuts_of(body))
    if f"--{BOUNDARY}".encode() not in data:
        assert read(body, cuts)[1] == data
    assert outcome(body, cuts) == outcome(body)


@given(more=st.data())
def test_any_cut_of_a_broken_body_is_answered_alike(more: st.DataObject) -> None:
    body = bytearray(form(field("purpose", b"batch"), file(b"one\r\n\r\ntwo"), field("y", b"1")))
    for _ in range(more.draw(st.integers(1, 3))):
        place = more.draw(st.integers(0, len(body) - 1))
        body[place : place + more.draw(st.integers(0, 4))] = more.draw(st.binary(max_size=4))
    given_body = bytes(body)
    whole = outcome(given_body)
    in_pieces = outcome(given_body, more.draw(cuts_of(given_body)))
    byte_by_byte = outcome(given_body, range(len(given_body)))
    assert isinstance(whole, str) == isinstance(in_pieces, str) == isinstance(byte_by_byte, str)
    if not isinstance(whole, str):
        assert whole == in_pieces == byte_by_byte


def test_every_truncation_is_refused() -> None:
    body = form(field("purpose", b"batch"), file(b"data"))
    for length in range(len(body) - len("--\r\n") + 2):
        with pytest.raises(ApiError) as caught:
            read(body[:length])
        assert caught.value.status == 400


@pytest.mark.parametrize(
    ("given_name", "filename"),
    [
        ("ü 文.jsonl", "ü 文.jsonl"),
        ("../../etc/passwd", "../../etc/passwd"),
        ("a\\\\b", "a\\b"),
        ("", ""),
        ("a;b=c.jsonl", "a;b=c.jsonl"),
    ],
)
def test_a_filename_is_what_the_client_says(given_name: str, filename: str) -> None:
    assert read(form(file(b"x", filename=given_name)))[0] == [FileStart(filename=filename)]


def test_a_filename_that_is_no_text_is_replaced_where_it_is_none() -> None:
    body = form(file(b"x").replace(b"a.jsonl", b"\xff.jsonl"))
    assert read(body)[0] == [FileStart(filename="\ufffd.jsonl")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "ends before its last boundary"),
        (b"{}", "does not begin with the boundary"),
        (b"\r\n" + form(file(b"x")), "does not begin with the boundary"),
        (form(), "ends before"),
        (form(b"X: y\r\n\r\nz"), "which field it is"),
        (form(b'Content-Disposition: attachment; name="file"\r\n\r\nz'), "which field it is"),
        (form(field("n" * 300, b"1")), "which field it is"),
        (form(b"no header\r\n\r\nz"), "MultipartParseError in its parts"),
        (form(file(b"x", more="X: " + "y" * 5000 + "\r\n")), "in its parts"),
        (form(file(b"x", more="".join(f"X{n}: y\r\n" for n in range(9)))), "in its parts"),
        (form(file(b"x", more="Content-Disposition: form-data\r\n")), "two headers"),
        (form(file(b"x", more="Content-Transfer-Encoding: base64\r\n")), "not binary"),
        (form(file(b"x"), file(b"y")), "file: there are several"),
        (form(file(b"x", name="other")), "other: it is a file"),
        (form(field("file", b"text")), "file: expected a file"),
        (form(field("purpose", b"1"), field("purpose", b"1")), "purpose: the field stands twice"),
        (form(*(field(f"f{n}", b"1") for n in range(17))), "more than 16 fields"),
        (form(field("purpose", b"x" * 1025)), "purpose: longer than 1024 bytes"),
        (form(field("purpose", b"\xff")), "purpose: not UTF-8"),
        (form(field("\n" * 3, b"\xff")), "a field: not UTF-8"),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_its_reason(body: bytes, message: str) -> None:
    if body == form():
        body = form(end=b"\r\n")
    with pytest.raises(ApiError) as caught:
        read(body)
    assert message in str(caught.value)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("", "not multipart/form-data"),
        ("application/json", "not multipart/form-data"),
        ("multipart/mixed; boundary=x", "not multipart/form-data"),
        ("multipart/form-data", "no boundary"),
        ("multipart/form-data; boundary=", "no boundary"),
        (f"multipart/form-data; boundary={'x' * 71}", "no boundary"),
    ],
)
def test_a_body_that_is_no_form_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        Form(kind)
    assert caught.value.status == 400


def test_a_quoted_boundary_is_understood() -> None:
    kind = f'Multipart/Form-Data; charset=utf-8; boundary="{BOUNDARY}"'
    assert read(form(file(b"x")), kind=kind)[1] == b"x"


def test_a_large_file_passes_and_is_not_held() -> None:
    reader = Form(TYPE)
    reader.feed(form(file(b"x"))[: -len(f"\r\n--{BOUNDARY}--\r\n")])
    for _ in range(100):
        passed = sum(len(event) for event in reader.feed(bytes(1 << 16)) if type(event) is bytes)
        assert passed == 1 << 16


def test_the_bounds_of_a_form_leave_room_for_its_fields() -> None:
    assert multipart.MAX_FIELDS * multipart.MAX_FIELD_BYTES * 2 < multipart.OVERHEAD_BYTES
