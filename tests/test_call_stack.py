"""To follow a piece of work through the code, a reader has to open only a few files."""

from pathlib import Path

from call_stack import Recorder, trace_all
from panollava import paths
from panollava.stages import STAGES


def test_no_trace_has_more_files_than_its_limit(project: Path) -> None:
    traces = trace_all()
    assert len(traces) == 6
    for trace in traces:
        assert not trace.too_long, f"{trace.work}: {', '.join(trace.files)}"
        assert len(trace.files) > 4, trace.work  # the work was recorded at all


def test_a_file_counts_when_one_of_its_functions_is_called() -> None:
    recorder = Recorder()
    with recorder():
        _ = STAGES["vision"].reads_features
        paths.RESUME.exists()
    paths.run_folder("vision")
    trace = recorder.trace("", limit=0)
    assert trace.files == ["stages.py"]
    assert trace.too_long
