"""From data files to examples: read, encode, fit to the maximum length, hold some out, and report what was done."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from lorasmith.config.data import DataConfig
from lorasmith.config.preference import METHODS
from lorasmith.data.dataset.encode import Notes, encode_rows
from lorasmith.data.dataset.fit import DataSplit, fit, refuse_too_long, rows_text
from lorasmith.data.dataset.mix import Mix, mix_rows
from lorasmith.data.dataset.sources import DataSource, parse_held_out, parse_sources, sample
from lorasmith.data.dataset.split import hold_out, keep_some
from lorasmith.data.read.files import DataFile, read_file, require_used
from lorasmith.data.rows.conversation import MAX_PLACES, Record, places
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.findings import notes_of_losses, template_notes
from lorasmith.errors import ConfigError, DataError
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example
from lorasmith.report import Report

DEFAULT_MAX_LENGTH = 1024  # tokens; less if the model's context is shorter, more if the rows are longer
LONGEST_DEFAULT = 32_768  # tokens; who wants more says so
ROUND = 64  # a length that follows the rows is rounded up to a multiple of it, for rows that are added later
MAX_ROWS = 1_000_000_000  # held out


@dataclass(frozen=True)
class Prepared:
    """The examples to train on and to evaluate on.

    max_length: in tokens; notes: the messages that were reported. By the fingerprints (sha256 of ids, targets and
    weights) a resumed run or a later evaluation tells whether the data is still the same.
    """

    train: list[Example]
    held_out: list[Example]
    max_length: int
    notes: tuple[str, ...]
    train_sha256: str
    held_out_sha256: str


def read_files(cfg: DataConfig, report: Report, method: str = "lora") -> list[DataFile]:
    """Read all files of `cfg`, the held-out file last, with as many rows of each as it asks for.

    method: `training.method`, which needs preference rows or examples. Needs no model, so bad rows are found before one
    is loaded.

    Raises ConfigError for an invalid setting, DataError with every bad row.
    """
    share = _held_out_share(cfg)
    if not cfg.data:
        raise ConfigError(_("data.data: no training data is given. Give a JSON, JSONL, CSV or Parquet file."))
    sources = [(source, "data.data") for source in parse_sources(cfg.data)]
    sources += [(parse_held_out(share), "data.held_out")] if isinstance(share, str) else []
    return _read_all(sources, cfg, report, method)


def prepare(
    cfg: DataConfig,
    template: Template,
    limit: int | None,
    report: Report | None = None,
    seed: int = 0,
    files: Sequence[DataFile] | None = None,
    affordable: int | None = None,
    method: str = "lora",
) -> Prepared:
    """The examples of all files of `cfg`.

    limit: context length of the model in tokens, None if it has none; files: what `read_files` returned, if the files
    were read already; affordable: the tokens of an example for which there is memory, None if that is not known.
    method: `training.method`. If it trains on preferences, a row is one example per answer, a pair's chosen one first.

    Raises ConfigError for an invalid setting, DataError with every bad row.
    """
    report, share, sources = report or Report(), _held_out_share(cfg), parse_sources(cfg.data)
    _max_length(cfg, limit)
    files = read_files(cfg, report, method) if files is None else files
    for note in (note for found in files for note in found.notes):
        report.say(note)
    notes = [note for found in files for note in (*found.notes, *found.warnings)]
    train = files[: len(sources)]
    held_out = files[-1].records if isinstance(share, str) else None
    mix = _mix(sources, train)
    records = [record for found in train for record in found.records]
    made = prepare_rows(records, held_out, cfg, template, limit, report, seed, mix, affordable, method)
    return replace(made, notes=(*notes, *made.notes))


def _read_all(
    sources: Sequence[tuple[DataSource, str]], cfg: DataConfig, report: Report, method: str
) -> list[DataFile]:
    """Read every file, and warn of rows that are left out. Raises DataError with the problems of all files."""
    files, problems = list[DataFile](), dict[str, None]()
    for source, option in sources:
        try:
            columns = cfg.map_of(source.name)
            found = read_file(source.name, option, columns, report, cfg.fill, cfg.skip_bad_rows, cfg.roles, method)
            files.append(sample(found, source, cfg.max_samples, option))
        except (DataError, ConfigError) as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise DataError(*problems)
    for found in files:
        for text in found.warnings:
            report.warn(text)
    require_used(cfg, files)
    return files


def _mix(sources: Sequence[DataSource], files: Sequence[DataFile]) -> Mix | None:
    """How to mix the files; None if they have no weights, and every row is used once."""
    known = {source.name: source.weight for source in sources if source.weight is not None}
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
    affordable: int | None = None,
    method: str = "lora",
) -> Prepared:
    """As `prepare`, for rows that were read already. held_out: None to sample from `train` as `cfg.held_out` says.

    With a `mix`, the rows that remain for training are repeated or sampled by its weights; held-out rows never are.
    """
    report, length = report or Report(), _max_length(cfg, limit)
    files = {"data.data": train} if held_out is None else {"data.data": train, "data.held_out": held_out}
    notes = Notes(report)
    splits = encode_rows(files, template, cfg, notes, method in METHODS)
    notes.say(_rewriting_note(splits))
    notes.say(_date_note(template))
    for text in template_notes(template):
        notes.say(text)
    lost = ((row.source, kinds) for split in splits for row, kinds in zip(split.conversations, split.lost, strict=True))
    for text in notes_of_losses(lost):
        notes.warn(text)
    if cfg.learn != "all":  # else the stop tokens between the turns are trained on as well
        notes.warn(_inner_stop_warning(splits, template))
    if cfg.max_length is None and cfg.too_long == "error":
        length, text = _follow_rows(splits, length, limit, affordable)
        notes.say(text)
    if cfg.too_long in ("error", "split"):
        refuse_too_long(splits, cfg, length)
    for split in splits:
        for text in fit(split, template, cfg, length, report):
            notes.warn(text)
    if not splits[0].rows:
        raise DataError(_("data.data: no rows are left to train on. Add more rows, or raise data.max_length."))
    if held_out is None:
        own = seed if cfg.held_out_seed is None else cfg.held_out_seed
        splits.append(hold_out(splits[0], _held_out_share(cfg), own, notes.say))
    keep_some(splits[0], cfg.train_rows, seed, notes.say)
    if mix is not None:
        splits[0].rows, texts = mix_rows(splits[0].rows, lambda row: row[0].source, mix, seed)
        for text in texts:
            notes.say(text)
    training, evaluation = ([example for row in split.rows for example in row] for split in splits)
    notes.warn(_leakage_warning(training, evaluation))
    notes.say(_summary(splits, training))
    return Prepared(training, evaluation, length, tuple(notes.texts), fingerprint(training), fingerprint(evaluation))


def _held_out_share(cfg: DataConfig) -> float | str:
    """`data.held_out` as a number of rows (1 or more), a fraction of them (below 1), or a file. Raises ConfigError."""
    number = cfg.held_out
    if isinstance(number, str):
        return number
    if not 0 <= number <= MAX_ROWS or (number > 1 and number != int(number)):  # NaN is refused as well
        raise ConfigError(
            _(
                "data.held_out: invalid value {value}. Give a file, a whole number of rows, or a fraction from 0 to 1.",
                value=number,
            )
        )
    return number


def _max_length(cfg: DataConfig, limit: int | None) -> int:
    if cfg.max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and cfg.max_length > limit:
        raise ConfigError(
            _(
                "data.max_length: {length} is more than the model's context length of {limit} tokens.",
                length=cfg.max_length,
                limit=limit,
            )
        )
    return cfg.max_length


def _follow_rows(
    splits: Sequence[DataSplit], length: int, limit: int | None, affordable: int | None
) -> tuple[int, str]:
    """The maximum length that the longest row needs, if the model and the memory allow it, and a note about it."""
    longest = max((example.useful_length + 1 for split in splits for row in split.rows for example in row), default=0)
    allowed = min(most for most in (limit, affordable, LONGEST_DEFAULT) if most is not None)
    if longest <= length or longest > allowed:
        return length, ""
    chosen = min(-(-longest // ROUND) * ROUND, allowed)
    return chosen, _(
        "The maximum length of an example is {length} tokens, because the longest row has {longest}. To change it, set "
        "data.max_length.",
        length=f"{chosen:,}",
        longest=f"{longest:,}",
    )


def _date_note(template: Template) -> str:
    if not template.text or not template.jinja.has_clock:
        return ""
    return _(
        "The chat template inserts the current date, which is fixed to 26 July 2024 for training and for all "
        "replies afterwards."
    )


def _rewriting_note(splits: list[DataSplit]) -> str:
    several = [row for split in splits for row in split.rows if len(row) > 1 and row[0].desirable is None]
    if not several:
        return ""
    return _(
        "The chat template rewrites earlier turns when later ones follow: {rows} became {examples} examples, "
        "so that the model trains on each answer with the same context as at inference.",
        rows=rows_text(len(several)),
        examples=f"{sum(map(len, several)):,}",
    )


def _inner_stop_warning(splits: list[DataSplit], template: Template) -> str:
    """A warning if an answer contains a stop token before its end, since generation will stop there."""
    stops = frozenset(template.stop_ids)
    inside = [row[0].source for split in splits for row in split.rows if any(_has_inner_stop(e, stops) for e in row)]
    if not inside:
        return ""
    return _(
        "In {rows}, an answer contains a stop token before its end; replies will stop there: {places}.",
        rows=rows_text(len(inside)),
        places=places(inside, MAX_PLACES),
    )


def _has_inner_stop(example: Example, stops: frozenset[int]) -> bool:
    pairs = zip(example.targets, [*example.targets[1:], IGNORED], strict=True)
    return any(target in stops and following != IGNORED for target, following in pairs)


def leaked_sources(training: Sequence[Example], evaluation: Sequence[Example]) -> list[str]:
    """Leakage: the sources of the `evaluation` examples whose tokens are those of a `training` example."""
    known = {tuple(example.ids) for example in training} if evaluation else set()
    return list(dict.fromkeys(example.source for example in evaluation if tuple(example.ids) in known))


def _leakage_warning(training: Sequence[Example], evaluation: Sequence[Example]) -> str:
    leaked = leaked_sources(training, evaluation)
    if not leaked:
        return ""
    return _(
        "The training data contains {rows} of the held-out data, so the held-out loss looks better than it is: "
        "{places}.",
        rows=rows_text(len(leaked)),
        places=places(leaked, MAX_PLACES),
    )


def _summary(splits: list[DataSplit], training: Sequence[Example]) -> str:
    tokens, targets = sum(e.useful_length for e in training), sum(e.n_targets for e in training)
    return _(
        "{rows} to train on, {held_out} held out; {tokens} tokens per epoch, {targets} of them trained on "
        "({part:.0%}).",
        rows=rows_text(len(splits[0].rows)),
        held_out=f"{len(splits[1].rows):,}",
        tokens=f"{tokens:,}",
        targets=f"{targets:,}",
        part=targets / tokens,
    )


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 of the examples in order, in hexadecimal: their ids, targets, and weights if any is not 1.

    Of an answer in a preference row also whether it is a good one.
    """
    digest = sha256()
    for example in examples:
        digest.update(array("q", [len(example.ids), *example.ids, *example.targets]).tobytes())
        if set(example.weights) != {1.0}:
            digest.update(array("d", example.weights).tobytes())
        if example.desirable is not None:
            digest.update(bytes([example.desirable]))
    return digest.hexdigest()
