"""`AlarmLog`: the alarms of a run, in its `alarms.jsonl`."""

from dataclasses import asdict

from distill.files import append_line
from distill.report.alarms import DISTILLATION, Alarm, Alarms, Metrics, Rules
from distill.report.run_folder import ALARMS, RunFolder


class AlarmLog:
    """Applies rules to the lines of a run's logs, and writes the alarms that they raise."""

    def __init__(self, run: RunFolder, rules: Rules = DISTILLATION) -> None:
        """Go on after what the run logged so far; alarms that a kill left out are written."""
        self._path = run.folder / ALARMS
        self._alarms = Alarms((alarm.name for alarm in run.alarms), rules)
        for line in run.metrics:
            self.add(line)

    def add(self, line: Metrics) -> list[str]:
        """Add the next line of the log of metrics; return notes on the alarms that it raises, for the user."""
        return self._write(self._alarms.add(line))

    def add_evaluation(self, line: Metrics) -> list[str]:
        """Add an evaluation; return notes on the alarms that it raises, for the user."""
        return self._write(self._alarms.add_evaluation(line))

    def _write(self, alarms: list[Alarm]) -> list[str]:
        for alarm in alarms:
            append_line(self._path, asdict(alarm))
        return [f"alarm, {alarm.name}: {alarm.message}" for alarm in alarms]
