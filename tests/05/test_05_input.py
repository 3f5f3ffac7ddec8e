"""Script 05's input: the same orders in each dialect that files come in; what is refused, and how
it is said. The oracle is the list of orders itself."""

from __future__ import annotations

import csv
import gzip
import io
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import duckdb
import pytest
from script05 import day, ds, load

import config

HEADER, GOOD = "customer_id,date,amount\n", "a,2024-01-02,1\n"
ORDERS = [  # neither sorted nor newest first
    ("007", "2024-03-25 23:59", 1, "1234.50", "desk; oak, solid"),
    ("7", "2023-12-31 00:00", 2, "12.05", "tea"),
    ("007", "2024-03-25 00:01", 3, "0.99", 'chair "Ümit"'),
    ("1e3", "2024-02-29 12:30", 1, "5.00", "café"),
    ("7", "2024-01-14 12:00", -2, "12.05", "tea"),
    ("1e3", "2024-03-01 09:05", 1, "0.00", "sample"),
    ("NULL", "2024-02-13 17:45", -1, "1000000.00", "tea"),
    ("", "2024-01-31 08:00", 1, "7.00", "tea"),
    ("<script>alert(1)</script>", "2024-01-02 08:00", 1, "3.10", "it's"),
    ("=cmd('x')!A1", "2024-01-02 13:00", 1, "3.10", "tea"),
    ("x" * 10_240, "2023-11-30 10:00", 1, "8.00", "-"),
    ("007", "2049-01-31 10:00", 1, "8.00", "tea"),
]
CENTS = [int(Decimal(price) * quantity * 100) for _, _, quantity, price, _ in ORDERS]
KEPT = [(*one, n) for one, n in zip(ORDERS, CENTS, strict=True) if one[0] and one[1] < "2049"]
ROWS = sorted(
    (name, day(int(at[:4]), int(at[5:7]), int(at[8:10])), cents, item)
    for name, at, _, _, item, cents in KEPT
)
PRICED = "CustomerID,InvoiceDate,Quantity,UnitPrice,Description"
SHOP = {"customer_id": "customerid", "date": "InvoiceDate", "item": "description"}
SHOP |= {"amount": "Quantity*UnitPrice"}


def written(
    date: str = "%Y-%m-%d %H:%M",  # empty: datetime.isoformat
    separator: str = ",",
    points: str = ".",  # the decimal one, and that of thousands where there is one
    headings: str = "customer_id,date,amount,item",
    zone: Any = UTC,
    sort: Callable[[Any], Any] = lambda _: 0,
    **options: Any,
) -> str:
    def money(amount: Decimal) -> str:
        return f"{amount:,.2f}".translate({ord("."): points[0], ord(","): points[1:]})

    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, **{"lineterminator": "\n", **options})
    writer.writerow(names := headings.split(","))
    for n, (name, at, quantity, price, item) in enumerate(sorted(ORDERS, key=sort, reverse=True)):
        local = datetime.fromisoformat(at).replace(tzinfo=UTC).astimezone(zone)
        amounts = [quantity, money(Decimal(price))]
        if "Quantity" not in names:
            amounts = [money(Decimal(price) * quantity)]
        shown = local.strftime(date) if date else local.isoformat()
        writer.writerow([n, name, shown, *amounts, item][names[0] != "" :])
    return text.getvalue()


DIALECTS: dict[str, dict[str, Any]] = {
    "plain": {}, "newest first": {"sort": lambda one: one[1]}, "tabs": {"separator": "\t"},
    "decimal commas": {"separator": ";", "points": ","}, "all quoted": {"quoting": csv.QUOTE_ALL},
    "Windows": {"lineterminator": "\r\n"}, "day first": {"date": "%d/%m/%Y"},
    "day first, time": {"date": "%d.%m.%Y %H:%M"}, "month first": {"date": "%m/%d/%Y %H:%M:%S"},
    "month first, p.m.": {"date": "%m/%d/%Y %I:%M %p"}, "two-digit years": {"date": "%d-%m-%y"},
    "no marks": {"date": "%Y%m%d"}, "ISO, Z": {"date": "%Y-%m-%dT%H:%M:%SZ"},
    "another zone": {"date": "", "zone": timezone(timedelta(hours=-9.5))},
    "mixed zones": {"date": "", "zone": ZoneInfo("America/St_Johns")},
    "index": {"headings": ",customer_id,timestamp,Amount,ITEM "}, "priced": {"headings": PRICED},
    "priced, commas": {"headings": PRICED, "separator": ";", "points": ","},
}  # fmt: skip


def assert_read(path: Path | str, columns: Mapping[str, str] = {}) -> None:
    rows, quality = load(path, columns)
    assert rows == ROWS
    expected = {
        "lines": len(ORDERS), "faulty": 0, "of amount 0": CENTS.count(0), "without customer": 1,
        "in the future": 1, "refunds": 2, "refunded": sum(n for n in CENTS if n < 0) / 100,
        "days that refunds took": 2, "refunded beyond them": -1000024.1,
    }  # fmt: skip
    assert quality.counts == expected


@pytest.mark.parametrize("name", DIALECTS)
def test_orders_are_read_in_any_dialect(name: str, tmp_path: Path) -> None:
    path, options = tmp_path / 'it\'s "orders" [1] *.csv', DIALECTS[name]
    path.write_text(written(**options) + options.get("lineterminator", ""), newline="")
    assert_read(path, SHOP if "priced" in name else {})


@pytest.mark.parametrize("code", ["utf-8-sig", "latin-1", "cp1252"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_orders_are_read_in_any_encoding_packed_and_from_stdin(
    code: str, pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(written(quoting=csv.QUOTE_ALL).encode(code))
    (tmp_path / "orders").write_bytes(packed)
    assert_read(tmp_path / "orders")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed)))
    assert_read("-")


@pytest.mark.parametrize("kinds", ["TIMESTAMP, DECIMAL(12, 2)", "TIMESTAMPTZ, DOUBLE"])
def test_parquet_is_read(kinds: str, tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text(written())
    at, amount = kinds.split(", ", 1)
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.execute(
            f"COPY (SELECT customer_id, date::{at} AS date, amount::{amount} AS amount, item FROM "
            f"read_csv('{tmp_path}/orders.csv', all_varchar=true)) TO '{tmp_path}/orders.parquet'"
        )
    assert_read(tmp_path / "orders.parquet")


Reading = Callable[..., Any]


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    """Rows and quality of a text, or the error that it ends in."""

    def read(text: str | bytes, *args: Any) -> Any:
        path = tmp_path / "orders.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            return load(path, *args)
        except config.ConfigError as error:
            return str(error)

    return read


@pytest.mark.parametrize(
    ("example", "another", "form"),
    [
        ("03/04/2024", "11/12/2023", "%d/%m/%Y"), ("3.4.24", "5.5.24", "%d.%m.%y"),
        ("03-04-2024 10:30", "11-12-2023 00:00", "%d-%m-%Y %H:%M"),
        ("03/04/2024 10:30", "03/04/2024 10:30:59", "%d/%m/%Y %H:%M"),
    ],
)  # fmt: skip
def test_dates_that_mean_two_days_are_never_guessed(
    example: str, another: str, form: str, reading: Reading
) -> None:
    told = reading(f"{HEADER}a,{example},1\na,{another},1\n")
    month_first = form.replace("%d", "%M").replace("%m", "%d").replace("%M", "%m", 1)
    assert all(text in told for text in (repr(example), form, month_first, "--date-format"))


def test_one_line_tells_day_from_month_wherever_it_is(reading: Reading) -> None:
    lines = "a,03/04/2024,1\n" * (ds.SAMPLE + 1) + "b,31/12/2023,1\n"
    rows, _ = reading(HEADER + lines)
    assert rows[-2:] == [("a", day(2024, 4, 3), 100, ""), ("b", day(2023, 12, 31), 100, "")]
    rows, _ = reading(f"{HEADER}a,03/04/2024,1\n", {}, "%m/%d/%Y")
    assert rows == [("a", day(2024, 3, 4), 100, "")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("b,2024-02-30,1", "date is '2024-02-30'"), ("b,,1", "date is ''"),
        ("b,2024-01-03,", "amount is ''"), ("b,2024-01-03,many", "amount is 'many'"),
        ("b,2024-01-03,$1", "amount is '$1'"), ("b,01/02/2024,1", "date is '01/02/2024'"),
        ("b,2024-01-03", "Columns: 3 Found: 2"), ("b,2024-01-03,1,5", "Columns: 3 Found: 4"),
        ('"b,2024-01-03,1', "quote"), ("b,2024-01-03,1e15", "amount is '1e15'"),
    ],
)  # fmt: skip
def test_a_faulty_line_is_shown_and_counted(line: str, reason: str, reading: Reading) -> None:
    rows, quality = reading(f"{HEADER}{GOOD * 30}{line}\n".replace("\n", "\r\n"))
    assert (len(rows), quality.counts["lines"], quality.counts["faulty"]) == (30, 31, 1)
    ((number, said, shown),) = quality.faulty
    assert (number, shown) == (32, line)
    assert reason in said
    past_the_limit = reading(f"{HEADER}{GOOD}{line}\n")
    assert "1 of 2 lines" in past_the_limit
    assert f"line 3: {said}" in past_the_limit


@pytest.mark.parametrize(("good", "bad"), [("1.50", '"1,234.50"'), ('"1,50"', '"1.234,50"')])
def test_thousands_marks_are_not_guessed_at(good: str, bad: str, reading: Reading) -> None:
    lines = [f"a,2024-01-02,{amount}\n" for amount in [good] * 30 + [bad]]
    rows, quality = reading(HEADER + "".join(lines))
    assert {cents for _, _, cents, _ in rows} == {150}
    assert quality.faulty == [(32, f"amount is {bad[1:-1]!r}", f"a,2024-01-02,{bad}")]


SEVERAL, LONG = 'a,2024-01-02,1,"x\ny\nz"\n', f"{'x' * 20_000},2024-01-02,1\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        # DuckDB counts a line break within quotes as none.
        (f"customer_id,date,amount,item\n{SEVERAL * 20}b,2024-01-02,many,-\n", [22]),
        (f"{HEADER}{LONG * 2000}b,2024-01-02,many\n{LONG * 2000}b,never,1\n", [2002, 4003]),
        (HEADER + (GOOD * 20 + "b,2024-01-02,many\n") * 9, [22, 43, 64, 85, 106]),
    ],
    ids=["breaks in quotes", "80 MB", "more than are shown"],
)
def test_lines_have_their_number_in_the_file(text: str, lines: list[int], reading: Reading) -> None:
    rows, quality = reading(text)
    assert [line for line, *_ in quality.faulty] == lines
    assert quality.counts["faulty"] == text.count("many") + text.count("never")
    assert rows[0][3] in ("", "x\ny\nz")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "customer_id"), ("\n\n", "customer_id"), (HEADER, "date"), (HEADER.strip(), "date"),
        ("id,date,amount\na,b,c\n", "--columns"), (f"{HEADER}a,yesterday,1\n", "'yesterday'"),
        (gzip.compress(b"x" * 99, mtime=0)[:-9], ""), (b"\x1f\x8b\x08\x00damaged, no gzip", ""),
        (b"PAR1 but no Parquet", ""), ("customer_id,date,amount,Amount\na,b,1,2\n", "amount"),
    ],
    ids=ascii,
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_a_line(
    text: str | bytes, reason: str, reading: Reading
) -> None:
    told = reading(text)
    assert reason in told
    assert len(told.splitlines()) == 1


def test_no_such_file_a_directory_and_no_such_column_are_refused(tmp_path: Path) -> None:
    for name in ("nowhere.csv", "."):
        with pytest.raises(config.ConfigError, match="director"):
            load(tmp_path / name)
    (tmp_path / "orders.csv").write_text(HEADER + GOOD)
    for columns in ({"date": "When"}, {"day": "date"}, {"amount": "a*amount"}, {"amount": "a*"}):
        with pytest.raises(config.ConfigError, match="customer_id, date, amount"):
            load(tmp_path / "orders.csv", columns)
