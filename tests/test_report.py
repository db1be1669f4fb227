"""Reports: silent by default, and warnings alone."""

from lorasmith.report import Report, Steps, WarningsOnly
from tests.support.tiny import Watch


def test_a_report_is_silent_by_default(capfd):
    report = Report()
    report.say("a")
    report.warn("b")
    report.progress("training", 1, 2, loss=1.0)
    assert capfd.readouterr() == ("", "")


def test_warnings_and_progress_are_forwarded_and_messages_are_not():
    watch = Watch()
    report = WarningsOnly(watch)
    report.say("a")
    report.warn("b")
    report.progress("evaluation", 1, 2)
    assert (watch.said, watch.warned, watch.tasks) == ([], ["b"], ["evaluation"])


def test_steps_are_counted():
    seen = []

    class Counted(Report):
        def progress(self, task, done, total, **_numbers):
            seen.append((task, done, total))

    steps = Steps(Counted(), "merging", 2)
    steps.step()
    steps.step()
    assert seen == [("merging", 1, 2), ("merging", 2, 2)]
