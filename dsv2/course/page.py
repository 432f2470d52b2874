"""The exercises in a notebook: the same words as on the command line, shown as cards."""

from __future__ import annotations

from dsv2.course import board, chapters, show, stubs, watch
from dsv2.course.folders import HERE, Folders
from dsv2.course.show import NOTEBOOK, Card


def check(number: str, folders: Folders = HERE) -> None:
    """Check an exercise, "02.3", or all of a chapter, "02", and show what was found."""
    try:
        for verdict in watch.verdicts([number], folders):
            _show(show.verdict_card(verdict, board.note(verdict, folders), NOTEBOOK))
    except chapters.Unknown as error:
        _show(_problem(error))


def hint(number: str, level: int | None = None, folders: Folders = HERE) -> None:
    """Show the next of an exercise's three hints, or one: 1 a question, 2 a pointer, 3 pseudocode."""
    if level not in (None, 1, 2, 3):
        raise ValueError(f"level must be 1, 2 or 3, not {level!r}")
    try:
        exercises = chapters.resolve([number], folders.chapters)
    except chapters.Unknown as error:
        return _show(_problem(error))
    if len(exercises) != 1:
        return _show(_problem(f"a hint is for one exercise: {show.listed([e.number for e in exercises])}"))
    return _show(show.hint_card(exercises[0], board.note_hint(exercises[0].number, level, folders), NOTEBOOK))


def progress(chapter: str | None = None, folders: Folders = HERE) -> None:
    """Show the board: where each exercise stands, of a chapter, "02", or of all."""
    if chapter is not None:
        try:
            chapters.resolve([chapter], folders.chapters)
        except chapters.Unknown as error:
            return _show(_problem(error))
    only = [f"{int(chapter.partition('.')[0]):02}"] if chapter else []
    return _show(show.board_card(board.rows(folders, only)))


def solution(number: str, insist: bool = False, folders: Folders = HERE) -> None:
    """Show the worked solution of an exercise that has passed; with `insist`, of any."""
    try:
        exercises = chapters.resolve([number], folders.chapters)
    except chapters.Unknown as error:
        return _show(_problem(error))
    for exercise in exercises:
        _show(solution_or_why_not(exercise, insist, folders, NOTEBOOK))
    return None


def solution_or_why_not(exercise, insist: bool, folders: Folders, place: str) -> Card:
    """The card of a solution, or the one that says when it is shown."""
    passed = board.load(folders.progress).get(exercise.number, board.Entry()).passed
    if not (passed or insist):
        return show.withheld_card(exercise, place)
    path = folders.solution(chapters.find(folders.chapters)[exercise.chapter])
    board.note_solution(exercise.number, folders)
    return show.solution_card(exercise, stubs.solved(stubs.read(path), exercise.number))


def use(implementation: str, folders: Folders = HERE) -> None:
    """Run dsv2 on your passed functions ("mine") or on its own ("reference"), from now on in this kernel."""
    from dsv2.course import mine  # brings PyTorch along

    mine.use(implementation, folders)


def _problem(error: object) -> Card:
    return Card(str(error)[:1].upper() + str(error)[1:], "open")


def _show(card: Card) -> None:
    """Show a card in a notebook; print it elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = None
    if get_ipython is None or get_ipython() is None:
        show.out(card)
    else:
        display(card)
