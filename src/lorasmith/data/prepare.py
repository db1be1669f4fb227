"""From files to examples: read, encode, cut to length, hold some out; and say in sentences what was done to rows."""

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from lorasmith.data import encoded
from lorasmith.data.config import DataConfig
from lorasmith.data.conversation import Problems, Record, RowError, places
from lorasmith.data.mix import Mix, mixed, weighted
from lorasmith.data.read import Found, look, require_columns
from lorasmith.data.template import Template, cut
from lorasmith.errors import ConfigError, DataError
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example
from lorasmith.report import Report

USUAL_LENGTH = 1024  # tokens of one example where neither the user nor the model says less
LARGEST_PART = 200  # rows held out where a part is asked for: more costs time and tells little
NAMED = 5  # rows that a summary names before it only counts
REPORTED = 200  # rows between two lines of progress


@dataclass(frozen=True)
class Prepared:
    """What a training learns from, and what it is measured on. max_length in tokens; notes are what was said of it.

    The fingerprints (sha256 over ids and targets) tell a resumed run whether these are still the same examples.
    """

    train: list[Example]
    held_out: list[Example]
    max_length: int
    notes: tuple[str, ...]
    train_sha256: str
    held_out_sha256: str


@dataclass
class _Side:
    """The examples of one side, row by row; a row is several where its template rewrites earlier turns."""

    option: str
    rows: list[list[Example]]


def prepare(
    cfg: DataConfig, template: Template, limit: int | None, report: Report | None = None, seed: int = 0
) -> Prepared:
    """Read all files of `cfg` and make their examples; `limit`: the tokens that the model can hold, None for any.

    Raises ConfigError for a setting that cannot be, DataError with every bad row for rows that cannot.
    """
    report, share = report or Report(), _share(cfg)
    _max_length(cfg, limit)
    if not cfg.data:
        raise ConfigError(_("data.data: no file of examples is named. Name a JSON, JSONL, CSV or Parquet file."))
    weights = weighted(cfg.data)
    sources = [(path, "data.data") for path, _weight in weights]
    sources += [(share, "data.held_out")] if isinstance(share, str) else []
    files = _looked(sources, cfg, report)
    notes = [note for found in files for note in found.notes]
    for note in notes:
        report.say(note)
    learned = files[: len(weights)]
    held_out = files[-1].records if isinstance(share, str) else None
    mix = _mix(weights, learned)
    records = [record for found in learned for record in found.records]
    made = prepare_rows(records, held_out, cfg, template, limit, report, seed, mix)
    return replace(made, notes=(*notes, *made.notes))


def _looked(sources: Sequence[tuple[str, str]], cfg: DataConfig, report: Report) -> list[Found]:
    """Every file read; what is wrong with any of them is told together."""
    files, problems = list[Found](), dict[str, None]()
    for name, option in sources:
        try:
            files.append(look(name, option, cfg.map, report))
        except (DataError, ConfigError) as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise DataError(*problems)
    columns = dict.fromkeys(column for found in files for column in found.columns)
    require_columns(cfg.map, columns, ", ".join(found.name for found in files))
    return files


def _mix(weights: Sequence[tuple[str, float | None]], files: Sequence[Found]) -> Mix | None:
    """None where the files have no weights: then each row stands once."""
    known = {name: weight for name, weight in weights if weight is not None}
    if not known:
        return None
    return Mix(known, {record.source: found.name for found in files for record in found.records})


def prepare_rows(
    train: Sequence[Record],
    held_out: Sequence[Record] | None,
    cfg: DataConfig,
    template: Template,
    limit: int | None,
    report: Report | None = None,
    seed: int = 0,
    mix: Mix | None = None,
) -> Prepared:
    """The same for rows that are read already; `held_out` None: drawn from `train` as `cfg.held_out` says.

    With a `mix`, what is left to learn from is repeated or drawn by its weights: never what is held out.
    """
    report, length = report or Report(), _max_length(cfg, limit)
    sides = [_Side("data.data", [])] + ([_Side("data.held_out", [])] if held_out is not None else [])
    notes = _Notes(report)
    _encode(sides, [train, held_out or []], template, report)
    notes.say(_split(sides))
    notes.warn(_stops_inside(sides, template))
    if cfg.too_long == "error":
        _refuse_too_long(sides, length)
    for side in sides:
        side.rows = _fitted(side, cfg.too_long, length, notes)
    if not sides[0].rows:
        raise DataError(_("data.data: no row is left to learn from. Give more rows, or raise data.max_length."))
    if held_out is None:
        sides.append(_drawn(sides[0], _share(cfg), seed, notes))
    if mix is not None:
        sides[0].rows, said = mixed(sides[0].rows, lambda row: row[0].source, mix, seed)
        for text in said:
            notes.say(text)
    learned, measured = ([example for row in side.rows for example in row] for side in sides)
    notes.warn(_overlap(learned, measured))
    notes.say(_summary(sides, learned))
    return Prepared(learned, measured, length, tuple(notes.texts), fingerprint(learned), fingerprint(measured))


class _Notes:
    def __init__(self, report: Report) -> None:
        self.report, self.texts = report, list[str]()

    def say(self, text: str) -> None:
        if text:
            self.texts.append(text)
            self.report.say(text)

    def warn(self, text: str) -> None:
        if text:
            self.texts.append(text)
            self.report.warn(text)


def _share(cfg: DataConfig) -> float | str:
    """How many rows (1 and more), what part of them (below 1), or the file. Raises ConfigError."""
    value = cfg.held_out
    try:
        number = float(value)
    except ValueError:
        return str(value)
    if not math.isfinite(number) or number < 0 or (number > 1 and number != int(number)):
        raise ConfigError(
            _("data.held_out: {value}; give a file, a whole number of rows, or a part from 0 to 1.", value=value)
        )
    return number


def _max_length(cfg: DataConfig, limit: int | None) -> int:
    if cfg.max_length is None:
        return min(USUAL_LENGTH, limit or USUAL_LENGTH)
    if limit is not None and cfg.max_length > limit:
        raise ConfigError(
            _(
                "data.max_length: {length} is more than the {limit} tokens that this model can hold.",
                length=cfg.max_length,
                limit=limit,
            )
        )
    return cfg.max_length


def _encode(sides: list[_Side], rows: list[Sequence[Record]], template: Template, report: Report) -> None:
    """Fill the sides with examples; every row that the template refuses is found before one is raised."""
    problems = [Problems(side.option) for side in sides]
    total, done = sum(map(len, rows)), 0
    for side, records, bad in zip(sides, rows, problems, strict=False):
        place = encoded.place_of(records, template)
        known = encoded.recall(place, records) if place else None
        if known is not None:
            side.rows, done = known, done + len(known)
            continue
        for record in records:
            try:
                side.rows.append(template.encode_all(template.conversation(record).messages, record.source))
            except RowError as error:
                bad.add(error.source, error.text)
            done += 1
            if total > REPORTED and (done % REPORTED == 0 or done == total):
                report.progress(_("encoding"), done, total)
        if place and not bad.texts():
            encoded.remember(place, side.rows)
    texts = [text for bad in problems for text in bad.texts()]
    if texts:
        raise DataError(*texts)


def _refuse_too_long(sides: list[_Side], length: int) -> None:
    texts = []
    for side in sides:
        lost = [(row, n) for row in side.rows if (n := _lost(row, length))]
        if not lost:
            continue
        texts.append(
            _(
                "{option}: longer than {length} tokens: {rows} of {all}, the longest {longest}; {tokens} of their "
                "answer tokens would be lost ({places}). Raise data.max_length, or set data.too_long to 'truncate' "
                "to cut their ends or to 'drop' to leave them out.",
                option=side.option,
                rows=_rows(len(lost)),
                all=f"{len(side.rows):,}",
                length=f"{length:,}",
                longest=f"{max(_longest(row) for row, _n in lost):,}",
                tokens=f"{sum(n for _row, n in lost):,}",
                places=places([row[0].source for row, _n in lost], NAMED),
            )
        )
    if texts:
        raise DataError(*texts)


def _fitted(side: _Side, too_long: str, length: int, notes: _Notes) -> list[list[Example]]:
    """Rows of at most `length` tokens; says what was cut, what was left out, and how much of the answers went."""
    kept, shortened, emptied, tokens = list[list[Example]](), 0, list[str](), 0
    for row in side.rows:
        lost = _lost(row, length)
        tokens += lost
        short = [] if lost and too_long == "drop" else [e for e in (cut(e, length) for e in row) if e.n_targets]
        if not short:
            emptied.append(row[0].source)
            continue
        shortened += lost > 0
        kept.append(short)
    numbers = {"option": side.option, "length": f"{length:,}", "tokens": f"{tokens:,}", "cut": _rows(shortened)}
    left_out = _rows(len(emptied))
    if shortened:
        notes.warn(_("{option}: {cut} cut at {length} tokens; answer tokens lost in all: {tokens}.", **numbers))
    if emptied:
        where = places(emptied, NAMED)
        text = (
            _(
                "{option}: {rows} left out as longer than {length} tokens: {places}.",
                **numbers,
                rows=left_out,
                places=where,
            )
            if too_long == "drop"
            else _(
                "{option}: {rows} left out, no answer begins within {length} tokens: {places}.",
                **numbers,
                rows=left_out,
                places=where,
            )
        )
        notes.warn(text)
    return kept


def _lost(row: Sequence[Example], length: int) -> int:
    """Learned tokens that do not fit: the target of position i is token i + 1."""
    return sum(target != IGNORED for example in row for target in example.targets[length - 1 :])


def _longest(row: Sequence[Example]) -> int:
    """Tokens up to the last learned one, itself counted."""
    return max(example.useful_length for example in row) + 1


def _drawn(side: _Side, share: float | str, seed: int, notes: _Notes) -> _Side:
    """Takes the held-out rows out of `side`, by a permutation of its rows that the seed decides."""
    assert isinstance(share, float)
    rows = side.rows
    count = int(share) if share >= 1 else min(LARGEST_PART, int(round(share * len(rows), 6)))
    if count >= len(rows):
        raise DataError(
            _(
                "data.held_out: {count} rows held out leave none of {rows} to learn from. Hold out fewer.",
                count=f"{count:,}",
                rows=f"{len(rows):,}",
            )
        )
    if share and not count:
        notes.say(
            _(
                "No row is held out: a part of {share} of {rows} is less than one.",
                share=share,
                rows=_rows(len(rows)),
            )
        )
    order = list(range(len(rows)))
    random.Random(f"held-out-{seed}").shuffle(order)
    chosen = set(order[:count])
    side.rows = [row for i, row in enumerate(rows) if i not in chosen]
    return _Side("data.held_out", [rows[i] for i in sorted(chosen)])


def _split(sides: list[_Side]) -> str:
    several = [row for side in sides for row in side.rows if len(row) > 1]
    if not several:
        return ""
    return _(
        "The template rewrites earlier turns once a later one follows: {rows} became {examples} examples, so that "
        "each answer is learned after what inference shows before it.",
        rows=_rows(len(several)),
        examples=f"{sum(map(len, several)):,}",
    )


def _stops_inside(sides: list[_Side], template: Template) -> str:
    """An answer that holds a stop token before its end teaches to stop there, and then what no one will see."""
    stops = frozenset(template.stop_ids)
    inside = [row[0].source for side in sides for row in side.rows if any(_has_inner_stop(e, stops) for e in row)]
    if not inside:
        return ""
    return _(
        "A stop token stands within an answer of {rows}; a reply will end there: {places}.",
        rows=_rows(len(inside)),
        places=places(inside, NAMED),
    )


def _has_inner_stop(example: Example, stops: frozenset[int]) -> bool:
    pairs = zip(example.targets, [*example.targets[1:], IGNORED], strict=True)
    return any(target in stops and following != IGNORED for target, following in pairs)


def _overlap(learned: Sequence[Example], measured: Sequence[Example]) -> str:
    seen = {tuple(example.ids) for example in learned} if measured else set()
    both = [example.source for example in measured if tuple(example.ids) in seen]
    if not both:
        return ""
    return _(
        "{rows} of those held out also among those to learn from, so the held-out loss looks better than it is: "
        "{places}.",
        rows=_rows(len(both)),
        places=places(both, NAMED),
    )


def _summary(sides: list[_Side], learned: Sequence[Example]) -> str:
    tokens, targets = sum(e.useful_length for e in learned), sum(e.n_targets for e in learned)
    return _(
        "{rows} to learn from, {held_out} held out; {tokens} tokens a pass, {targets} of them learned ({part:.0%}).",
        rows=_rows(len(sides[0].rows)),
        held_out=f"{len(sides[1].rows):,}",
        tokens=f"{tokens:,}",
        targets=f"{targets:,}",
        part=targets / tokens,
    )


def _rows(count: int) -> str:
    return _("1 row") if count == 1 else _("{count} rows", count=f"{count:,}")


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over ids and targets, in order, as hexadecimal digits."""
    digest = sha256()
    for example in examples:
        digest.update(array("q", [len(example.ids), *example.ids, *example.targets]).tobytes())
    return digest.hexdigest()
