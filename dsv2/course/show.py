"""How verdicts, hints, the board and solutions are shown: as text in a terminal, as a card in a notebook.

Both are drawn from a `Card`, so that they say the same.
"""

from __future__ import annotations

import html
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from dsv2.course.board import CHANGED, DONE, TRIED, Entry, Row
from dsv2.course.spec import Exercise
from dsv2.course.verdict import Lines, Verdict

TERMINAL, NOTEBOOK = "terminal", "notebook"
WIDTH = 100
LEVELS = ("a question", "a pointer", "pseudocode")

ANSI = {"good": "32", "bad": "31", "open": "33", "plain": ""}
BORDER = {"good": "#2a9d5c", "bad": "#d1495b", "open": "#8a8f98", "plain": "#3d6fb4"}
# Where a console cannot show them.
PLAIN = {
    "→": "->", "←": "<-", "×": "x", "·": "*", "√": "sqrt", "−": "-", "–": "-", "—": "-", "…": "...",
    "≤": "<=", "≥": ">=", "≠": "!=", "⁻": "^-", "²": "^2", "ᵀ": "^T", "α": "alpha", "β": "beta", "θ": "theta",
    "λ": "lambda", "Σ": "sum",
    "∑": "sum", "∞": "inf", "’": "'", "“": '"', "”": '"',
}  # fmt: skip


@dataclass
class Card:
    """Something to show. tone: "good", "bad", "open", "plain"; code: kept as it is; closing: what to do."""

    heading: str
    tone: str = "plain"
    lines: Lines = field(default_factory=list)
    code: str = ""
    closing: str = ""

    def __repr__(self) -> str:
        return text(self, colour=False)

    def _repr_html_(self) -> str:
        return as_html(self)


def command(word: str, number: str, place: str, *options: str) -> str:
    """How to ask for something: `python3 course.py hint 02.3`, or `hint("02.3")` in a notebook."""
    if place == NOTEBOOK:
        python = {"--insist": "insist=True"}
        return f"{word}({', '.join([repr(number).replace(chr(39), chr(34)), *(python[o] for o in options)])})"
    return " ".join(["python3 course.py", word, number, *options])


def verdict_card(verdict: Verdict, entry: Entry, place: str = TERMINAL) -> Card:
    """A verdict in words."""
    title = f"{verdict.number} {verdict.title}"
    hint = command("hint", verdict.number, place)
    cases = f"{verdict.cases} cases" if verdict.cases != 1 else "1 case"
    if verdict.status == "passed":
        also = command("solution", verdict.number, place)
        lines = [("checked", f"{verdict.checked} ({cases})")]
        return Card(f"{title}: passed", "good", lines, closing=f"To compare with the worked solution: {also}")
    if verdict.status == "not started":
        file = f"exercises/{verdict.file}"
        if verdict.untouched:
            lines = [("write", f"{verdict.name} in {file}, line {verdict.line}")]
            return Card(
                f"{title}: not started yet", "open", lines, closing=f"Then check again. For a hint: {hint}"
            )
        lines = [("still open", f"line {verdict.line} of {file}: {verdict.code}")]
        return Card(f"{title}: not finished yet", "open", lines, closing=f"For a hint: {hint}")
    if verdict.status == "not here":
        closing = "It counts for nothing here; on Linux, or on Colab, it can be checked."
        return Card(f"{title}: cannot be checked here", "open", verdict.found, closing=closing)

    lines = [("case", verdict.case)] if verdict.case else []
    lines += verdict.found
    if verdict.line:
        where = f"line {verdict.line} of exercises/{verdict.file}"
        lines.append(("at", f"{where}: {verdict.code}" if verdict.code else where))
    printed = [("printed", "\n".join(verdict.printed))] if verdict.printed else []
    if verdict.given and verdict.untouched:
        # How its result differs is told once something was tried.
        lines = [("mend", f"{verdict.name} in exercises/{verdict.file}, which is as it was given")]
        lines += [("wrong for", verdict.case)] if verdict.case else []
        lines += verdict.found if verdict.status == "raised" else []
        return Card(f"{title}: a bug hunt, not started yet", "open", lines, closing=f"For a hint: {hint}")
    if verdict.given and verdict.mistake == verdict.given:
        lines.append(("likely", "the bug that was given is still there: the results are the same as before"))
    elif verdict.diagnosis:
        lines.append(("likely", verdict.diagnosis))
    words = {"failed": "not right yet", "raised": "raised an exception", "missing": "not there"}
    words |= {"hung": "stopped, it did not end", "died": "ended the process"}
    closing = f"For a hint: {hint}"
    insist = command("solution", verdict.number, place, "--insist")
    if entry.hints >= 3 and verdict.status == "failed":
        closing = f"All hints seen. The worked solution: {insist}"
    if verdict.status == "missing":
        closing = f"To put the exercise back as it was: python3 course.py reset {verdict.number}"
    return Card(f"{title}: {words[verdict.status]}", "bad", lines + printed, closing=closing)


def hint_card(exercise: Exercise, level: int, place: str = TERMINAL) -> Card:
    """One of an exercise's three hints."""
    closing = (
        f"The next one: {command('hint', exercise.number, place)}" if level < 3 else "That was the last hint."
    )
    heading = f"{exercise.number} {exercise.title}: hint {level} of 3, {LEVELS[level - 1]}"
    hint = textwrap.dedent(exercise.hints[level - 1]).strip()
    if level == 3:
        return Card(heading, code=hint, closing=closing)
    return Card(heading, lines=[("", hint)], closing=closing)


def solution_card(exercise: Exercise, code: str) -> Card:
    return Card(f"{exercise.number} {exercise.title}: the worked solution", code=code)


def withheld_card(exercise: Exercise, place: str = TERMINAL) -> Card:
    """In place of a solution that is not shown yet."""
    number = exercise.number
    insist, hint = command("solution", number, place, "--insist"), command("hint", number, place)
    when = f"Its solution is shown when it has passed. A hint helps further: {hint}"
    return Card(
        f"{number} {exercise.title}: not passed yet",
        "open",
        [("", when)],
        closing=f"To see the solution all the same: {insist}",
    )


def board_card(board: dict[str, list[Row]]) -> Card:
    """The board, as a table."""
    everything = [row for rows in board.values() for row in rows]
    if not everything:
        return Card("There are no exercises yet.", "open")
    width = max(len(row.exercise.title) for row in everything)
    table = [f"{'':6}{'':{width}}  {'':14} {'hints':>5}  about (min)"]
    for chapter, rows in board.items():
        done = sum(row.state == DONE for row in rows)
        table.append(f"{chapter}: {done} of {len(rows)} done")
        for row in rows:
            mark = {DONE: "x", CHANGED: "~", TRIED: "-"}.get(row.state, " ")
            seen = "all" if row.entry.solution_seen else str(row.entry.hints or "")
            state = f"[{mark}] {row.state}" if row.state != "not started" else "[ ]"
            line = f"  {row.exercise.number:5}{row.exercise.title:{width}}  {state:17} "
            table.append(f"{line}{seen:>2}  {row.exercise.minutes:>11}".rstrip())
    done = sum(row.state == DONE for row in everything)
    notes = []
    if any(row.state == CHANGED for row in everything):
        notes.append("[~] passed once and was changed since: check it again.")
    if any(row.entry.solution_seen for row in everything):
        notes.append('Hints "all": the solution was shown.')
    tone = "good" if done == len(everything) else "plain"
    return Card(
        f"{done} of {len(everything)} exercises done", tone, code="\n".join(table), closing=" ".join(notes)
    )


# ---------------------------------------------------------------------------------------------------- drawing


def text(card: Card, colour: bool) -> str:
    """A card as lines of text, at most 100 columns wide except for code."""
    code = ANSI[card.tone]
    heading = f"\033[1;{code}m{card.heading}\033[0m" if colour and code else card.heading
    label_width = max((len(label) for label, _ in card.lines), default=0)
    out = [heading]
    for label, said in card.lines:
        start = f"  {label:{label_width}}  " if label_width else "  "
        for paragraph in said.split("\n"):
            out += textwrap.wrap(
                paragraph,
                WIDTH,
                initial_indent=start,
                subsequent_indent=" " * len(start),
                break_long_words=False,
                break_on_hyphens=False,
            ) or [start.rstrip()]
            start = " " * len(start)
    if card.code:
        out += ["", textwrap.indent(card.code.rstrip(), "  ")]
    if card.closing:
        out += ["", *textwrap.wrap(card.closing, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(out)


def as_html(card: Card) -> str:
    """A card for a notebook, readable on light and dark pages."""
    cell = "padding:1px 14px 1px 0;text-align:left;vertical-align:top;background:none;border:none"
    rows = "".join(
        '<tr style="background:none">'
        f'<td style="{cell};opacity:.7;white-space:nowrap">{html.escape(label)}</td>'
        f'<td style="{cell};white-space:pre-wrap">{html.escape(said)}</td></tr>'
        for label, said in card.lines
        if label
    )
    parts = [f"<strong>{html.escape(card.heading)}</strong>"]
    for label, said in card.lines:
        if not label:
            parts.append(f'<div style="margin-top:6px;white-space:pre-wrap">{html.escape(said)}</div>')
    if rows:
        parts.append(f'<table style="margin:6px 0 0 0;border:none;font-size:inherit">{rows}</table>')
    if card.code:
        style = (
            "margin:8px 0 0 0;overflow-x:auto;white-space:pre;word-break:normal;"
            "font-size:.86em;background:none;color:inherit"
        )
        parts.append(f'<pre style="{style}">{html.escape(card.code.rstrip())}</pre>')
    if card.closing:
        parts.append(f'<div style="margin-top:6px;opacity:.85">{html.escape(card.closing)}</div>')
    style = f"border-left:5px solid {BORDER[card.tone]};padding:6px 0 6px 14px;margin:4px 0"
    return f'<div style="{style}">{"".join(parts)}</div>'


def out(card: Card, stream: TextIO | None = None) -> None:
    """Print a card, with colour on a terminal that takes it, in letters that the stream can show."""
    stream = stream or sys.stdout
    print(showable(text(card, colour=coloured(stream)), stream), file=stream, flush=True)


def coloured(stream: TextIO) -> bool:
    """Whether to use colour: on a terminal, unless NO_COLOR is set or the terminal knows none."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return False
    return os.name != "nt" or bool(os.environ.get("WT_SESSION") or os.environ.get("ANSICON"))


def showable(written: str, stream: TextIO) -> str:
    """The text, with letters that the stream's encoding lacks written in ASCII."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        written.encode(encoding)
        return written
    except (UnicodeEncodeError, LookupError):
        plain = "".join(PLAIN.get(letter, letter) for letter in written)
        return plain.encode(encoding, errors="replace").decode(encoding)


def listed(numbers: Sequence[str]) -> str:
    """ "01.1, 01.2 and 01.3"."""
    return " and ".join(filter(None, [", ".join(numbers[:-1]), *numbers[-1:]]))
