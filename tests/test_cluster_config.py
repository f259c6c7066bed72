"""The strict loader: what it accepts, what it refuses and how it says so."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import config
from cluster.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A section."""

    power: float = 1.5
    """Horse powers."""
    cylinders: int = 4
    """How many."""
    fuel: Literal["on", "off", "auto"] = "auto"
    """Looks like a boolean
    to YAML 1.1."""
    size: int | Literal["auto"] = "auto"
    """A number or a word."""
    seal: float | None = None
    """Nothing, or a number."""

    def __post_init__(self) -> None:
        if self.cylinders < 1:
            raise ConfigError(f"engine.cylinders is {self.cylinders}; allowed: 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Car:
    """A config of two floors."""

    name: str
    """What it is called."""
    engine: Engine = field(default_factory=Engine)
    is_red: bool = False
    """Its colour."""
    seats: tuple[Literal["front", "back"], ...] = ("front",)
    """Where one sits."""
    tags: str | tuple[str, ...] = "none"
    """One or several."""


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "car.yaml"
    path.write_text(text)
    return path


def test_yaml_and_json_build_the_same(tmp_path: Path) -> None:
    yaml = _file(tmp_path, "name: a\nengine: {power: 2, fuel: on}\nseats: [front, back]\n")
    tree = {"name": "a", "engine": {"power": 2, "fuel": "on"}, "seats": ["front", "back"]}
    json_path = tmp_path / "car.json"
    json_path.write_text(json.dumps(tree))
    car = config.load(Car, yaml)
    assert car == config.load(Car, json_path)
    assert car == Car(name="a", engine=Engine(power=2.0, fuel="on"), seats=("front", "back"))
    assert type(car.engine.power) is float


def test_missing_sections_and_fields_take_their_defaults(tmp_path: Path) -> None:
    assert config.load(Car, _file(tmp_path, "name: a\nengine:\n")) == Car(name="a")


def test_a_section_that_may_be_null_is_null_unless_it_is_written(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Garage:
        """Perhaps with a car."""

        spare: Engine | None = None

    assert config.build(Garage, {}, where="test") == Garage()
    assert config.build(Garage, {"spare": None}, where="test") == Garage()
    assert config.build(Garage, {"spare": {}}, where="test").spare == Engine()
    loaded = config.load(Garage, _file(tmp_path, "{}"), ["spare.power=3"])
    assert loaded.spare == Engine(power=3)
    assert config.build(Garage, config.plain(loaded), where="test") == loaded
    with pytest.raises(ConfigError, match=r"test: spare: unknown key 'powr'.*'power'"):
        config.build(Garage, {"spare": {"powr": 1}}, where="test")
    kinds = config.schema(Garage)["properties"]["spare"]["anyOf"]
    assert [kind["type"] for kind in kinds] == ["object", "null"]


def test_plain_is_the_inverse_of_build() -> None:
    car = Car(name="a", engine=Engine(size=3, seal=0.5), seats=("back",), tags=("x", "y"))
    assert config.build(Car, config.plain(car), where="test") == car


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nengin: {}\n", ["unknown key 'engin'", "Did you mean 'engine'?", "is_red"]),
        ("name: a\nengine: {powr: 1}\n", ["engine", "'powr'", "'power'", "cylinders"]),
        ("engine: {}\n", ["name is missing", "no default"]),
        ("name: a\nengine: 3\n", ["engine", "expected a mapping"]),
        ("name: 3\n", ["name is 3", "allowed: text"]),
        ("name: a\nengine: {cylinders: 2.5}\n", ["engine.cylinders is 2.5", "a whole number"]),
        ("name: a\nengine: {cylinders: true}\n", ["engine.cylinders is True", "a whole number"]),
        ("name: a\nengine: {cylinders: 0}\n", ["engine.cylinders is 0", "1 or more"]),
        ("name: a\nengine: {power: fast}\n", ["engine.power is 'fast'", "a number"]),
        ("name: a\nengine: {power: .nan}\n", ["engine.power is nan", "finite"]),
        ("name: a\nengine: {power: .inf}\n", ["engine.power is inf", "finite"]),
        ("name: a\nengine: {power: 1e999}\n", ["engine.power is inf", "finite"]),
        ("name: a\nengine: {seal: no}\n", ["engine.seal is False", "a number | null"]),
        ("name: a\nengine: {fuel: 98}\n", ["engine.fuel is 98", "on | off | auto"]),
        ("name: a\nengine: {size: small}\n", ["'small'", "a whole number | auto"]),
        ("name: a\nis_red: 1\n", ["is_red is 1", "true or false"]),
        ("name: a\nseats: [roof]\n", ["seats is ['roof']", "a list of front | back"]),
        ("name: a\nseats: front\n", ["seats is 'front'", "a list of"]),
        ("name: a\nname: b\n", ["'name' stands twice", "line 2"]),
        ("- name\n", ["expected a mapping of sections", "list"]),
        ("", ["expected a mapping of sections", "nothing"]),
        ("name: [\n", ["not valid YAML"]),
        ("name: " + "[" * 5000, ["nested too deeply"]),
        ("name: a\n[1, 2]: b\n", ["a key is list", "line 2"]),
        ("name: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
    ],
)
def test_bad_file_is_refused_with_where_what_and_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(Car, path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for word in words:
        assert word in message


def test_missing_file_and_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        config.load(Car, tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        config.load(Car, tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(Car, tmp_path)


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E5", 1e5), ("'2.5'", 2.5)])
def test_numbers_that_yaml_reads_as_text_are_numbers(
    tmp_path: Path, text: str, value: float
) -> None:
    car = config.load(Car, _file(tmp_path, f"name: a\nengine: {{power: {text}}}\n"))
    assert car.engine.power == value


@pytest.mark.parametrize(("word", "value"), [("on", "on"), ("off", "off"), ("'on'", "on")])
def test_bare_on_and_off_are_words_where_words_are_asked(
    tmp_path: Path, word: str, value: str
) -> None:
    car = config.load(Car, _file(tmp_path, f"name: a\nengine: {{fuel: {word}}}\n"))
    assert car.engine.fuel == value


def test_overrides_win_in_order_and_create_sections(tmp_path: Path) -> None:
    path = _file(tmp_path, "name: a\n")
    overrides = ["engine.cylinders=6", "engine.cylinders=8", "seats=[back]", "name=x=y"]
    car = config.load(Car, path, [*overrides, "engine.seal=null", "engine.power=1e-3"])
    assert car == Car(name="x=y", engine=Engine(cylinders=8, power=1e-3), seats=("back",))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.cylinder=6", ["unknown field 'cylinder'", "Did you mean 'cylinders'?"]),
        ("motor.power=6", ["unknown section 'motor'", "Valid: name, engine"]),
        ("name.first=x", ["'name' is a field, not a section"]),
        ("name", ["expected section.field=value"]),
        ("=x", ["expected section.field=value"]),
        ("name=[", ["not valid YAML"]),
        ("engine.cylinders=-1", ["engine.cylinders is -1", "1 or more"]),
    ],
)
def test_bad_override_is_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Car, _file(tmp_path, "name: a\n"), [override])
    for word in words:
        assert word in str(caught.value)


def test_difference_lists_every_changed_leaf() -> None:
    old = config.plain(Car(name="a"))
    new = config.plain(Car(name="b", engine=Engine(power=2.0), seats=("back",)))
    assert config.difference(old, new) == [
        "engine.power: 1.5 -> 2.0",
        'name: "a" -> "b"',
        'seats: ["front"] -> ["back"]',
    ]
    assert config.difference(old, old) == []


def test_schema_describes_every_field() -> None:
    schema = config.schema(Car)
    engine = schema["properties"]["engine"]
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["required"] == ["name"]
    assert schema["additionalProperties"] is False
    assert engine["properties"]["power"] == {
        "type": "number",
        "default": 1.5,
        "description": "Horse powers.",
    }
    assert engine["properties"]["fuel"]["enum"] == ["on", "off", "auto"]
    assert engine["properties"]["fuel"]["description"] == "Looks like a boolean to YAML 1.1."
    assert engine["properties"]["size"]["anyOf"] == [{"type": "integer"}, {"enum": ["auto"]}]
    assert schema["properties"]["seats"]["items"] == {"enum": ["front", "back"]}


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "engine", "power", "seats", "x"]), inner)
    ),
    max_leaves=8,
)


@given(tree=TREES)
def test_any_tree_is_a_car_or_a_config_error(tree: object) -> None:
    try:
        car = config.build(Car, tree, where="test")  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        assert str(error).startswith("test: ")  # noqa: PT017
    else:
        assert config.build(Car, config.plain(car), where="test") == car
