"""From files to examples: read, encode, cut to length, hold some out; and say in sentences what was done to rows."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from lorasmith.config.data import DataConfig
from lorasmith.data.dataset import encoded
from lorasmith.data.dataset.fit import NAMED, REPORTED, Side, fit, in_rows, refuse
from lorasmith.data.dataset.mix import Mix, mixed, weighted
from lorasmith.data.read.files import Found, look, require_columns
from lorasmith.data.rows.conversation import Problems, Record, RowError, places
from lorasmith.data.template.encoding import Template
from lorasmith.errors import ConfigError, DataError
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example
from lorasmith.report import Report

USUAL_LENGTH = 1024  # tokens of one example where neither the user nor the model says less
MOST_ROWS = 1_000_000_000  # held out
LARGEST_PART = 200  # rows held out where a part is asked for: more costs time and tells little


@dataclass(frozen=True)
class Prepared:
    """What a training learns from, and what it is measured on. max_length in tokens; notes are what was said of it.

    The fingerprints (sha256 over ids, targets, weights) tell a resumed run whether these are still the same examples.
    """

    train: list[Example]
    held_out: list[Example]
    max_length: int
    notes: tuple[str, ...]
    train_sha256: str
    held_out_sha256: str


def read_files(cfg: DataConfig, report: Report) -> list[Found]:
    """All files of `cfg`, the held-out one last: needs no model, so it comes before one is loaded.

    Raises ConfigError for a setting that cannot be, DataError with every bad row.
    """
    share = _share(cfg)
    if not cfg.data:
        raise ConfigError(_("data.data: no training data is given. Give a JSON, JSONL, CSV or Parquet file."))
    sources = [(path, "data.data") for path, _weight in weighted(cfg.data)]
    sources += [(share, "data.held_out")] if isinstance(share, str) else []
    return _looked(sources, cfg, report)


def prepare(
    cfg: DataConfig,
    template: Template,
    limit: int | None,
    report: Report | None = None,
    seed: int = 0,
    files: Sequence[Found] | None = None,
) -> Prepared:
    """Make the examples of all files of `cfg`, read already as `files` or now; `limit`: the tokens that the model can
    hold, None for any.

    Raises ConfigError for a setting that cannot be, DataError with every bad row for rows that cannot.
    """
    report, share, weights = report or Report(), _share(cfg), weighted(cfg.data)
    _max_length(cfg, limit)
    files = read_files(cfg, report) if files is None else files
    for note in (note for found in files for note in found.notes):
        report.say(note)
    notes = [note for found in files for note in (*found.notes, *found.left_out)]
    learned = files[: len(weights)]
    held_out = files[-1].records if isinstance(share, str) else None
    mix = _mix(weights, learned)
    records = [record for found in learned for record in found.records]
    made = prepare_rows(records, held_out, cfg, template, limit, report, seed, mix)
    return replace(made, notes=(*notes, *made.notes))


def _looked(sources: Sequence[tuple[str, str]], cfg: DataConfig, report: Report) -> list[Found]:
    """Every file read; what is wrong with any of them is told together, and then of which rows nothing is learned."""
    files, problems = list[Found](), dict[str, None]()
    for name, option in sources:
        try:
            files.append(look(name, option, cfg.map, report))
        except (DataError, ConfigError) as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise DataError(*problems)
    for found in files:
        for text in found.left_out:
            report.warn(text)
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
    files = {"data.data": train} if held_out is None else {"data.data": train, "data.held_out": held_out}
    sides = _encode(files, template, cfg.learn, report)
    notes = _Notes(report)
    notes.say(_split(sides))
    notes.say(_clock(template))
    if cfg.learn != "all":  # of which stop tokens within a row are a part
        notes.warn(_stops_inside(sides, template))
    if cfg.too_long in ("error", "split"):
        refuse(sides, cfg, length)
    for side in sides:
        for text in fit(side, template, cfg, length, report):
            notes.warn(text)
    if not sides[0].rows:
        raise DataError(_("data.data: no rows are left to train on. Add more rows, or raise data.max_length."))
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
    number = cfg.held_out
    if isinstance(number, str):
        return number
    if not 0 <= number <= MOST_ROWS or (number > 1 and number != int(number)):  # not so of NaN either
        raise ConfigError(
            _(
                "data.held_out: invalid value {value}. Give a file, a whole number of rows, or a fraction from 0 to 1.",
                value=number,
            )
        )
    return number


def _max_length(cfg: DataConfig, limit: int | None) -> int:
    if cfg.max_length is None:
        return min(USUAL_LENGTH, limit or USUAL_LENGTH)
    if limit is not None and cfg.max_length > limit:
        raise ConfigError(
            _(
                "data.max_length: {length} is more than the model's context length of {limit} tokens.",
                length=cfg.max_length,
                limit=limit,
            )
        )
    return cfg.max_length


def _encode(files: dict[str, Sequence[Record]], template: Template, learn: str, report: Report) -> list[Side]:
    """The sides with their examples; every row that the template refuses is found before one is raised."""
    total, done, sides, texts, kept = sum(map(len, files.values())), 0, [], list[str](), set[Path]()
    for option, records in files.items():
        problems, side = Problems(option), Side(option, [], [])
        for record in records:
            try:
                side.conversations.append(template.conversation(record))
            except RowError as error:
                problems.add(error.source, error.text)
        place = encoded.place_of(side.conversations, template, learn)
        known = encoded.recall(place, side.conversations) if place else None
        for row in side.conversations if known is None else ():
            try:
                side.rows.append(template.encode_row(row, learn))
            except RowError as error:
                problems.add(error.source, error.text)
            done += 1
            if total > REPORTED and (done % REPORTED == 0 or done == total):
                report.progress(_("encoding"), done, total)
        if known is not None:
            side.rows, done = known, done + len(known)
        elif place and not problems.sources:
            encoded.remember(place, side.rows)
        kept |= {place.parent} if place and place.is_file() else set()
        sides.append(side)
        texts += problems.texts()
    if texts:
        raise DataError(*texts)
    if kept:
        report.say(
            _(
                "Encoded copies of these rows are kept in {folder} for the next run; only you can read them. "
                "To remove them, delete that folder.",
                folder=kept.pop(),
            )
        )
    return sides


def _drawn(side: Side, share: float | str, seed: int, notes: _Notes) -> Side:
    """Takes the held-out rows out of `side`, by a permutation of its rows that the seed decides."""
    assert isinstance(share, float)
    rows = side.rows
    count = int(share) if share >= 1 else min(LARGEST_PART, int(round(share * len(rows), 6)))
    if count >= len(rows):
        raise DataError(
            _(
                "data.held_out: holding out {count} of {rows} rows leaves none to train on. Hold out fewer.",
                count=f"{count:,}",
                rows=f"{len(rows):,}",
            )
        )
    if share and not count:
        notes.say(
            _(
                "No rows are held out: the fraction {share} of {rows} is less than one row.",
                share=share,
                rows=in_rows(len(rows)),
            )
        )
    order = list(range(len(rows)))
    random.Random(f"held-out-{seed}").shuffle(order)
    chosen = set(order[:count])
    held_out = Side("data.held_out", [side.conversations[i] for i in sorted(chosen)], [rows[i] for i in sorted(chosen)])
    side.conversations = [one for i, one in enumerate(side.conversations) if i not in chosen]
    side.rows = [row for i, row in enumerate(rows) if i not in chosen]
    return held_out


def _clock(template: Template) -> str:
    if not template.text or not template.jinja.has_clock:
        return ""
    return _(
        "The chat template inserts the current date, which is fixed to 26 July 2024 for training and for all "
        "replies afterwards."
    )


def _split(sides: list[Side]) -> str:
    several = [row for side in sides for row in side.rows if len(row) > 1]
    if not several:
        return ""
    return _(
        "The chat template rewrites earlier turns when later ones follow: {rows} became {examples} examples, "
        "so that the model trains on each answer with the same context as at inference.",
        rows=in_rows(len(several)),
        examples=f"{sum(map(len, several)):,}",
    )


def _stops_inside(sides: list[Side], template: Template) -> str:
    """An answer that holds a stop token before its end teaches to stop there, and then what no one will see."""
    stops = frozenset(template.stop_ids)
    inside = [row[0].source for side in sides for row in side.rows if any(_has_inner_stop(e, stops) for e in row)]
    if not inside:
        return ""
    return _(
        "In {rows}, an answer contains a stop token before its end; replies will stop there: {places}.",
        rows=in_rows(len(inside)),
        places=places(inside, NAMED),
    )


def _has_inner_stop(example: Example, stops: frozenset[int]) -> bool:
    pairs = zip(example.targets, [*example.targets[1:], IGNORED], strict=True)
    return any(target in stops and following != IGNORED for target, following in pairs)


def alike(learned: Sequence[Example], measured: Sequence[Example]) -> list[str]:
    """Where those of `measured` stand whose tokens are those of one of `learned`."""
    seen = {tuple(example.ids) for example in learned} if measured else set()
    return [example.source for example in measured if tuple(example.ids) in seen]


def _overlap(learned: Sequence[Example], measured: Sequence[Example]) -> str:
    both = alike(learned, measured)
    if not both:
        return ""
    return _(
        "The training data contains {rows} of the held-out data, so the held-out loss looks better than it is: "
        "{places}.",
        rows=in_rows(len(both)),
        places=places(both, NAMED),
    )


def _summary(sides: list[Side], learned: Sequence[Example]) -> str:
    tokens, targets = sum(e.useful_length for e in learned), sum(e.n_targets for e in learned)
    return _(
        "{rows} to train on, {held_out} held out; {tokens} tokens per epoch, {targets} of them trained on "
        "({part:.0%}).",
        rows=in_rows(len(sides[0].rows)),
        held_out=f"{len(sides[1].rows):,}",
        tokens=f"{tokens:,}",
        targets=f"{targets:,}",
        part=targets / tokens,
    )


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over ids, targets and weights that are not all 1, in order, as hexadecimal digits."""
    digest = sha256()
    for example in examples:
        digest.update(array("q", [len(example.ids), *example.ids, *example.targets]).tobytes())
        if set(example.weights) != {1.0}:
            digest.update(array("d", example.weights).tobytes())
    return digest.hexdigest()
