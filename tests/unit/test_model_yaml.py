"""YAML specs say what people mean by them."""

from __future__ import annotations

import pytest

from posada.errors import SpecError
from posada.model.machine import spec_from_yaml, spec_to_yaml
from posada.model.yaml import decode


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("22:22", "22:22"),
        ("1:2.5", "1:2.5"),
        ("8080:80", "8080:80"),
        ("10", 10),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("1.5", 1.5),
        ("true", True),
        ("null", None),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_values(text: str, value: object) -> None:
    assert decode(f"a: {text}") == {"a": value}


@pytest.mark.parametrize("text", ["a: [", "a: *x", "\x01", b"\xff\xfe\xff", "a: !!python/object:os.system x", "[" * 100_000])
def test_what_is_no_yaml(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(text)
    with pytest.raises(SpecError):
        spec_from_yaml(text)


def test_a_spec_comes_back_as_it_went() -> None:
    spec = spec_from_yaml("image: a:1\nports: [22:22, 80]\nlabels: {since: 2026-01-01}\nmemory: 1GiB")
    assert [(port.host, port.guest) for port in spec.ports] == [(22, 22), (None, 80)]
    assert spec_from_yaml(spec_to_yaml(spec)) == spec
