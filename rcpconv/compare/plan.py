"""What is compared: variants, budgets, the grid of learning rates, and the trainings that follow. Knows no torch."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rcpconv.config import (
    DEFAULT_CORPUS,
    DEFAULT_RECIPE,
    DEFAULTS,
    DEMO,
    OPTIONS,
    SELF,
    QuantizeConfig,
    beating,
    normalise_keys,
    read_recipe,
    trains,
    without_text,
)
from rcpconv.errors import BadOption

SWEEP, FINAL, ORIGINAL = "sweep", "final", "original"
"""Kinds of cells: a training for the choice of rates, one for the table, and the unquantized model's measurement."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_ELSEWHERE = {
    "model": "MODEL",
    "revision": "--revision",
    "data": "--data",
    "eval_data": "--text",
    "max_eval_tokens": "--max-eval-tokens",
    "tokens": "--tokens and --sweep-tokens",
    "lr": "--lr-grid",
    "seed": "--seeds",
    "eval_every": "--curve-points",
    "checkpoint_every": "--checkpoint-every",
}
"""Settings that are not a variant's to choose -> the option that decides them for all."""
_ONLY_COMMON = ("self_tokens", "self_epochs")
_ONLY_OF_A_VARIANT = ("quantizer_lr", "clip_lr")
_FORM = ("group_size", "group_size_of", "a_bits", "kv_bits", "head_bits", "embed_bits", "tables")
"""Settings that make a model larger, or easier to quantize: not a method's merit."""
_FAMILIES = {"ldp-udq": "ldp", "lc": "ldp"}
"""Methods that are ablations of another one."""
_VALIDATION_TOKENS, _OF_THE_DEMO = 60_000, 20_000
"""Kept back from training texts, and from the demo's, which is small."""
_HASHED_BYTES = 1 << 20
_MAY_CHANGE = ("variants", "seeds", "best", "grid")
"""Fields that may differ when a folder is continued: they say which cells there are, not what is in one."""
_RATES_OF = "rates_of"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """A point of the grid; None = --quantizer-factor or --clip-factor times lr, as quantize has it."""

    lr: float
    quantizer_lr: float | None = None
    clip_lr: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rates:
        """ "4.5e-4", "4.5e-4:4.5e-3" or "4.5e-4:4.5e-3:4.5e-4". Raises BadOption."""
        names, parts = ("lr", "quantizer_lr", "clip_lr"), text.split(":")
        try:
            values = [float(part) for part in parts]
        except ValueError:
            values = []
        if not 1 <= len(values) <= len(names):
            raise BadOption(f"lr-grid: expected rates such as 4.5e-4, or weights:quantizers:clips; found {text!r}")
        return cls(**{name: OPTIONS[name].check(name, value) for name, value in zip(names, values, strict=False)})

    @property
    def settings(self) -> dict[str, float]:
        """Those that are given, by their names in QuantizeConfig."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def label(self) -> str:
        """As `parse` takes it; the same for the same rates."""
        return ":".join(f"{value:g}".replace("e-0", "e-") for value in self.settings.values())


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row: a name, and the settings of quantize that make it what it is."""

    name: str
    settings: dict[str, Any]
    rates_of: str = ""
    """The variant whose rates this one takes without a sweep of its own, as an ablation of it may."""

    @property
    def trained(self) -> bool:
        """Whether there is anything to train."""
        return trains(self.settings)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return _plain(self.settings) | ({_RATES_OF: self.rates_of} if self.rates_of else {})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its measurements, or the measurements of the original model."""

    kind: str
    variant: str = ""
    rates: Rates | None = None
    """None for what is not trained."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its files."""
        if self.kind == ORIGINAL:
            return ORIGINAL
        rates = "" if self.rates is None else f".lr{self.rates.label.replace(':', '_')}"
        return f"{self.variant}.{self.kind}{rates}.seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that decides the figures, but for the machine. Cannot be built wrong: raises BadOption."""

    model: str
    revision: str | None = None
    data: tuple[str, ...] = ()
    text: str = ""
    """Held-out: a file, demo or default. Empty = what suits the model."""
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of all variants; where they say nothing, quantize's defaults hold."""
    variants: tuple[Variant, ...]
    grid: tuple[Rates, ...]
    tokens: int
    sweep_tokens: int
    seeds: int
    best: int
    """How many methods are trained with all seeds, each in its best variant."""
    validation_tokens: int = 0
    """Kept back from the training text. 0 = what suits it."""
    curve_points: int
    window: int
    max_eval_tokens: int | None = None
    generations: int = 0
    generation_tokens: int

    def __post_init__(self) -> None:
        suiting, standard = read_recipe(DEFAULT_RECIPE), DEFAULT_CORPUS
        if self.model == DEMO:
            suiting, standard = beating(suiting, read_recipe(DEMO)), DEMO
        data = self.data or tuple(suiting.get("data", (standard,)))
        elsewhere = (*_ELSEWHERE, *_ONLY_OF_A_VARIANT, "steps")
        suiting = {name: value for name, value in suiting.items() if name not in elsewhere}
        little = DEMO in data and set(data) <= {DEMO, SELF}
        for name, value in (
            ("common", suiting | self.common),
            ("data", tuple(map(_located, data))),
            ("validation_tokens", self.validation_tokens or (_OF_THE_DEMO if little else _VALIDATION_TOKENS)),
            ("text", _located(self.text or standard)),
            ("model", _located(self.model)),
        ):
            object.__setattr__(self, name, value)
        if not self.variants:
            raise BadOption("variants: expected at least one, found none")
        labels = [rates.label for rates in self.grid]
        if not labels or len(set(labels)) != len(labels):
            raise BadOption(f"lr-grid: expected different rates, found {', '.join(labels) or 'none'}")
        if len({len(rates.settings) for rates in self.grid}) > 1:
            raise BadOption(f"lr-grid: expected points of one form, found {', '.join(labels)}; write all of them out")
        if self.text not in (DEMO, DEFAULT_CORPUS):
            if self.text in self.data:
                raise BadOption(f"text: {self.text} is trained on; give another text that is held out")
            if not Path(self.text).is_file():
                raise BadOption(f"text: {self.text}: expected a text file, {DEMO} or {DEFAULT_CORPUS}; found none")
        known = {variant.name: variant for variant in self.variants}
        for variant in self.variants:
            self.config(Cell(kind=FINAL, variant=variant.name, rates=self.grid[0]))
            source = variant.rates_of if len(self.grid) > 1 else ""
            if source and not (source in known and self.swept(source)):
                raise BadOption(
                    f"variants.{variant.name}: takes the rates of {source}, which is not compared or has none of its "
                    f"own; name both, such as --only {source},{variant.name}"
                )

    def variant(self, name: str) -> Variant:
        """The variant of this name."""
        return next(variant for variant in self.variants if variant.name == name)

    def config(self, cell: Cell) -> QuantizeConfig:
        """What `rcpconv quantize` would train for this cell. Raises BadOption naming the variant."""
        variant = self.variant(cell.variant)
        rates = cell.rates.settings if cell.rates is not None and variant.trained else {}
        budget = self.sweep_tokens if cell.kind == SWEEP else self.tokens
        common = self.common if variant.trained else without_text(self.common)
        settings = common | rates | variant.settings
        fixed: dict[str, Any] = {"model": self.model, "revision": self.revision, "data": self.data, "seed": cell.seed}
        try:
            return QuantizeConfig(**fixed, **settings | ({"tokens": budget} if variant.trained else {}))
        except BadOption as error:
            raise BadOption(f"variants.{variant.name}: {error}") from None

    def sweeps(self) -> list[Cell]:
        """The trainings that choose rates: the same grid for every variant that is trained, one seed."""
        if len(self.grid) == 1:
            return []
        return [
            Cell(kind=SWEEP, variant=variant.name, rates=rates)
            for variant in self.variants
            if self.swept(variant.name)
            for rates in self.grid
        ]

    def swept(self, name: str) -> bool:
        """Whether a variant has rates of its own, found on the grid."""
        return self.variant(name).trained and not self.variant(name).rates_of

    def method(self, name: str) -> str:
        """A variant's method; that of which it is an ablation, where it is one."""
        method = str((self.common | self.variant(name).settings).get("method", DEFAULTS["method"]))
        return _FAMILIES.get(method, method)

    def may_be_best(self, name: str) -> bool:
        """Whether a variant may be its method's best: trained, of the common form, and not at rates found for another.

        The common form is the group size, bit widths and tables of all. With a grid of one rate, none are found.
        """
        variant = self.variant(name)
        equal_rates = not variant.rates_of or len(self.grid) == 1
        common = (variant.settings.get(key) in (None, self.common.get(key, DEFAULTS[key])) for key in _FORM)
        return variant.trained and equal_rates and all(common)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; equal for equal comparisons, wherever their files are."""
        values = dataclasses.asdict(self)
        variants = {variant.name: variant.to_json() for variant in self.variants}
        return values | {
            "model": _content(self.model),
            "data": list(map(_content, self.data)),
            "text": _content(self.text),
            "common": _plain(self.common),
            "variants": variants,
            "grid": [rates.label for rates in self.grid],
        }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why a folder of one comparison cannot be continued as another, both as `to_json` gives them; empty = it can."""
    found = [
        f"{name.replace('_', '-')} was {before.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in _MAY_CHANGE and before.get(name) != value
    ]
    if lost := [rates for rates in before["grid"] if rates not in now["grid"]]:
        found.append(f"grid was {before['grid']}, is without {', '.join(lost)}; more rates may come to it")
    for name, variant in now["variants"].items():
        earlier, settings = ({**each, _RATES_OF: None} for each in (before["variants"].get(name, variant), variant))
        if earlier != settings:
            found.append(f"variant {name} was {before['variants'][name]!r}, is {variant!r}")
    return found


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _located(name: str) -> str:
    """A file or folder by its absolute path, so that a comparison can be continued from anywhere; other names stay."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in (DEMO, DEFAULT_CORPUS, SELF) and path.exists() else name


def _content(name: str) -> str:
    """A local file or folder by what is in it: its name, bytes, and a hash of the beginning of each file."""
    path = Path(name)
    if not path.is_absolute() or not path.exists():
        return name
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    digest, total = hashlib.sha256(), 0
    for each in files:
        nbytes = each.stat().st_size
        digest.update(f"{each.relative_to(path)} {nbytes}\n".encode())
        with each.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
        total += nbytes
    return f"{path.name}, {total:,} bytes, {digest.hexdigest()[:16]}"


def read_variants(path: Path | None) -> tuple[dict[str, Any], tuple[Variant, ...]]:
    """Settings of all rows, and the rows, from a TOML file; None = the bundled one. Raises BadOption."""
    where = "recipes/compare.toml" if path is None else str(path)
    try:
        source = resources.files("rcpconv") / "recipes" / "compare.toml" if path is None else path
        content = tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadOption(f"{where}: expected a TOML file of variants ({error})") from error
    unknown = sorted(content.keys() - {"common", "variants"})
    if unknown:
        raise BadOption(f"{where}: unknown key {unknown[0]!r}; expected [common] and [variants.NAME] tables")
    common, variants = content.get("common", {}), content.get("variants", {})
    for name, table in (("common", common), ("variants", variants)):
        if not isinstance(table, dict):
            raise BadOption(f"{where}: {name}: expected a table, found {table!r}")
    rows = []
    for name, settings in variants.items():
        if not _NAME.fullmatch(name):
            raise BadOption(f"{where}: {name!r}: expected a name of letters, digits, - and _ (40 at most)")
        if not isinstance(settings, dict):
            raise BadOption(f"{where}: variants.{name}: expected a table of settings, found {settings!r}")
        given = [key for key in settings if key.replace("-", "_") == _RATES_OF]
        if len(given) > 1:
            raise BadOption(f"{where}: variants.{name}: {given[1]!r} is given twice")
        rates_of = settings[given[0]] if given else ""
        checked = _checked({k: v for k, v in settings.items() if k not in given}, f"{where}: variants.{name}")
        for key in _ONLY_COMMON:
            if key in checked:
                raise BadOption(f"{where}: variants.{name}: {key} is the same for all rows; give it in [common]")
        if not isinstance(rates_of, str) or (rates_of and rates_of not in variants):
            near = _nearest(str(rates_of), variants)
            raise BadOption(f"{where}: variants.{name}: rates-of: no variant {rates_of!r}{near}")
        rows.append(Variant(name=name, settings=checked, rates_of=rates_of))
    return common_settings(common, f"{where}: common"), tuple(rows)


def common_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of all rows, checked. Raises BadOption."""
    checked = _checked(settings, where)
    for name in ("steps", *_ONLY_OF_A_VARIANT):
        if name in checked:
            remedy = "give --tokens" if name == "steps" else "write lr:quantizers:clips in --lr-grid"
            raise BadOption(f"{where}: {name} is not for all rows at once; {remedy}, or give it to one variant")
    return checked


def _checked(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = normalise_keys(settings, where)
    for name, value in known.items():
        if name in _ELSEWHERE:
            raise BadOption(f"{where}: {name} is the same for all rows; give it as {_ELSEWHERE[name]}")
        try:
            known[name] = OPTIONS[name].check(name, value)
        except BadOption as error:
            raise BadOption(f"{where}: {error}") from None
    if known.get("steps"):
        raise BadOption(f"{where}: steps: all rows train equally long (--tokens); expected 0, for no training")
    return known


def parse_setting(text: str) -> tuple[str, Any]:
    """ "seq-len=1024" -> ("seq_len", 1024). Raises BadOption."""
    key, equals, value = text.partition("=")
    if not equals:
        raise BadOption(f"set: expected NAME=VALUE such as seq-len=1024, found {text!r}")
    (name,) = normalise_keys({key.strip(): None}, "set")
    option = OPTIONS[name]

    def typed(part: str) -> Any:
        if option.type is bool:
            return {"true": True, "false": False}.get(part, part)
        try:
            return part if option.count else option.type(part)
        except ValueError:
            return part  # the check says what is wrong with it

    parts = [typed(part.strip()) for part in value.split(",")]
    return name, option.check(name, parts if option.many != 1 else typed(value.strip()))


def choose(variants: Sequence[Variant], only: Iterable[str]) -> tuple[Variant, ...]:
    """The variants of these names, in this order; all where none is named. Raises BadOption."""
    known = {variant.name: variant for variant in variants}
    names = list(dict.fromkeys(only)) or list(known)
    for name in names:
        if name not in known:
            raise BadOption(f"only: no variant {name!r}{_nearest(name, known)}; there are {', '.join(known)}")
    return tuple(known[name] for name in names)


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
