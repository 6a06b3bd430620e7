"""Results of a reader study: rates of the answers, and kappa within and between readers and with the judge."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.tables import read_table
from diffva_ray.evaluate.tables import write_table
from diffva_ray.metrics.intervals import group_bootstrap
from diffva_ray.schema import TableRow
from diffva_ray.storage.opening import open_file, open_store
from diffva_ray.studio.study import ANSWERS, KEY, KINDS, QUESTIONS

VALUES = {"yes": 1.0, "no": 0.0, "": np.nan}
RESAMPLES = 2000
RATES = "Share of the answers that are yes, with the 95 % interval over patients; repeated items count once."
AGREEMENT = (
    "Cohen's kappa with its 95 % bootstrap interval. within: a reader's first and second answer; between: two readers; "
    "judge: a reader's finding and the model's judge."
)


def score_readers(study: str, answers: Sequence[str]) -> dict[str, list[TableRow]]:
    """Compute the tables ``readers`` and ``agreement`` of a study folder from CSV files of answers, and write them to
    ``tables/``.

    ``answers``: addresses; none: every ``answers-*.csv`` of the sheet. Raises UnusableData that names file and row."""
    store = open_store(study)
    try:
        key = pd.read_csv(io.BytesIO(store.read(KEY)), keep_default_na=False, na_values={"judge_healthy": [""]})
    except FileNotFoundError:
        raise UnusableData(f"{study}: no {KEY} there; name the folder that diffva study has written") from None
    listed = [f"{study}/{path}" for path, _ in store.list("sheet") if path.startswith("sheet/answers-")]
    frame = read_answers(answers or sorted(listed), key)
    if not len(frame):
        raise UnusableData(f"{study}: no answers yet; open its sheet with diffva studio --study {study}/sheet")
    tables = {"readers": rates(frame), "agreement": agreement(frame)}
    for name, caption in (("readers", RATES), ("agreement", AGREEMENT)):
        write_table(store, name, tables[name], caption)
    return tables


def read_answers(uris: Iterable[str], key: pd.DataFrame) -> pd.DataFrame:
    """A row for each answered item with its row of the key, in the order of reader and item; answers are 1 or 0, NaN
    where the reader gave none. ``show``: 0, or 1 where the item shows an image again. Raises UnusableData."""
    rows, seen = [], set[tuple[str, int]]()
    study, items = str(key["study"].iloc[0]), {int(item) for item in key["item"]}
    for uri in uris:
        store, name = open_file(uri)
        try:
            table = read_table(store.read(name), name).require(name, *ANSWERS)
        except OSError as error:
            raise UnusableData(f"{uri}: cannot be read ({error.strerror or error})") from None
        for where, row in table.rows:
            item = int(row["item"]) if row["item"].isdecimal() else 0
            if row["study"] != study or item not in items:
                raise UnusableData(f"{where}: item {row['item']} of study {row['study']}, which is not study {study}")
            if (row["reader"], item) in seen:
                raise UnusableData(f"{where}: reader {row['reader']} has answered item {item} before")
            if bad := [f"{name} {row[name]!r}" for name in QUESTIONS if row[name] not in VALUES]:
                raise UnusableData(f"{where}: {bad[0]}; an answer is yes, no or empty")
            seen.add((row["reader"], item))
            given = {name: VALUES[row[name]] for name in QUESTIONS}
            rows.append({"reader": row["reader"], "item": item, **given, "seconds": float(row["seconds"] or "nan")})
    keyed = key.assign(show=key.groupby("record_id").cumcount())
    return pd.DataFrame(rows, columns=["reader", "item", *QUESTIONS, "seconds"]).merge(keyed, on="item")


def rates(frame: pd.DataFrame) -> list[TableRow]:
    """How often each reader, and all together, said yes to each question, by what the items are; median seconds."""
    first, rows = frame[frame["show"] == 0], list[TableRow]()
    readers = sorted(first["reader"].unique())
    for reader in [*readers, *(["all"] if len(readers) > 1 else [])]:
        of_reader = first if reader == "all" else first[first["reader"] == reader]
        for kind, question in itertools.product(KINDS, QUESTIONS):
            asked = of_reader[of_reader["kind"] == kind].dropna(subset=[question])
            if len(asked):
                groups = asked["patient"].where(asked["patient"] != "", asked["image_path"]).to_numpy()
                interval = group_bootstrap(asked[question].to_numpy(float), groups, within=(0.0, 1.0))
                rows.append({"reader": reader, "kind": kind, "question": question, "n": len(asked),
                             "yes": float(asked[question].mean()), "interval": list(interval),
                             "seconds": float(asked["seconds"].median())})  # fmt: skip
    return rows


def agreement(frame: pd.DataFrame) -> list[TableRow]:
    """Kappa of each reader with the reader's own second answers, with the other readers, and with the judge."""
    rows = list[TableRow]()
    wide = {question: frame.pivot_table(question, "record_id", ["reader", "show"]) for question in QUESTIONS}
    readers = sorted(frame["reader"].unique())
    for question, table in wide.items():
        columns = {column: table[column].to_numpy(float) for column in table.columns}
        for reader in readers:
            rows += _row("within", question, reader, reader, columns.get((reader, 0)), columns.get((reader, 1)))
        for one, other in itertools.combinations(readers, 2):
            rows += _row("between", question, one, other, columns.get((one, 0)), columns.get((other, 0)))
    judged = frame[(frame["show"] == 0) & frame["judge_healthy"].notna()]
    for reader in readers:
        own = judged[judged["reader"] == reader]
        abnormal = (own["judge_healthy"] < 0.5).to_numpy(float)
        rows += _row("judge", "finding", reader, "judge", own["finding"].to_numpy(float), abnormal)
    return rows


def _row(
    what: str, question: str, one: str, other: str, a: NDArray[np.float64] | None, b: NDArray[np.float64] | None
) -> list[TableRow]:
    """The row of two columns of answers; none where no item has both."""
    if a is None or b is None:
        return []
    both = ~(np.isnan(a) | np.isnan(b))
    if not both.any():
        return []
    table = np.bincount((2 * a[both] + b[both]).astype(int), minlength=4).astype(float)
    low, high = kappa_interval(table)
    return [{"what": what, "question": question, "reader": one, "other": other, "n": int(both.sum()),
             "agreement": float((table[0] + table[3]) / table.sum()), "kappa": float(kappa(table)),
             "interval": [low, high]}]  # fmt: skip


def kappa(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cohen's kappa (1960) of counts [..., 4]: both no, only the second yes, only the first yes, both yes. NaN where
    both always give the same answer, so that chance alone explains it."""
    neither, second, first, both = np.moveaxis(tables / tables.sum(axis=-1, keepdims=True), -1, 0)
    chance = (first + both) * (second + both) + (neither + second) * (neither + first)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (neither + both - chance) / (1 - chance), np.nan)


def kappa_interval(table: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of kappa, by a bootstrap over the items of ``table`` [4]."""
    n = int(table.sum())
    values = kappa(np.random.default_rng(0).multinomial(n, table / n, RESAMPLES).astype(float))
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
