"""Progress where there is no terminal."""

import io

from xscale_lightning.commands.bars import PlainProgress, left, progress


def test_a_line_now_and_then_and_one_at_the_end():
    seconds, stream = iter([0.0, 1.0, 9.0, 11.0, 12.0, 30.0]), io.StringIO()
    with PlainProgress(stream, lambda: next(seconds)) as bar:
        task = bar.add_task("windows", total=10)
        for step in (1, 3, 1, 1, 4):
            bar.advance(task, step)
    assert stream.getvalue().splitlines() == ["windows: 5 of 10 (50 %), 11 s left", "windows: 10 of 10 (100 %), 30 s"]


def test_what_an_earlier_try_has_done_does_not_make_it_look_fast():
    seconds, stream = iter([0.0, 20.0]), io.StringIO()
    with PlainProgress(stream, lambda: next(seconds)) as bar:
        bar.advance(bar.add_task("windows", total=100, completed=90), 5)
    assert stream.getvalue() == "windows: 95 of 100 (95 %), 20 s left\n"


def test_without_a_terminal_lines_are_written():
    assert isinstance(progress(), PlainProgress)


def test_time_left_of_runs():
    assert left(0, 5, 0.0) == ""
    assert left(1, 5, 60.0) == " (about 4 min left)"
    assert left(2, 5, 7200.0) == " (about 3.0 h left)"
