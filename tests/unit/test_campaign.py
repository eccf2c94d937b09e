"""The table of the faults counts what was tried; the tests run on every Python that the README names."""
import ast
import collections
import re
from types import SimpleNamespace

import conftest
import pytest
from harness import ROOT


@pytest.fixture
def counted(monkeypatch):
    """What conftest.py makes of a test marked fault(kind, n) that counted so many cases (None: no fixture):
    tried and survived in the table, its outcome and message."""
    def count(n, survived, passed=True, when="call", skipped=False):
        monkeypatch.setattr(conftest, "BOARD", collections.defaultdict(lambda: [0, 0, 0.0]))
        mark = SimpleNamespace(args=["kind"], kwargs={} if n is None else {"n": n})
        item = SimpleNamespace(get_closest_marker=lambda name: mark)
        if survived is not None:
            item.survived = survived
        report = SimpleNamespace(when=when, skipped=skipped, passed=passed, duration=1, user_properties=[],
                                 outcome="passed" if passed else "failed", longrepr="")
        hook = conftest.pytest_runtest_makereport(item, None)
        next(hook)
        with pytest.raises(StopIteration):
            hook.send(report)
        getattr(conftest, "pytest_runtest_logreport", id)(report)              # with workers, there
        return [row[:2] for row in conftest.BOARD.values()], report.outcome, report.longrepr
    return count


def test_cases_are_credited_only_where_they_are_counted(counted):
    for n in (None, 1):                                      # one case: the test itself
        assert counted(n, None) == ([[1, 1]], "passed", "")
        assert counted(n, None, passed=False) == ([[1, 0]], "failed", "")
    assert counted(20, 20) == ([[20, 20]], "passed", "")
    assert counted(20, 7, passed=False) == ([[20, 7]], "failed", "")             # the eighth failed
    for survived, credited in ((None, 0), (0, 0), (19, 19), (21, 20)):           # passed, but did not count
        row, outcome, message = counted(20, survived)
        assert (row, outcome) == ([[20, credited]], "failed") and "cases were counted, not 20" in message
    assert counted(5, 5, when="setup")[0] == counted(5, None, skipped=True)[0] == []


SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/**/*.py")]


def test_the_oldest_python_of_the_readme():
    """Its grammar; a glob pattern that ends with a slash, which meant something else before 3.11."""
    minor = int(re.search(r"Python 3\.(\d+) or later", (ROOT / "README.md").read_text())[1])
    assert f'"py3{minor}"' in (ROOT / "pyproject.toml").read_text()
    assert f'"3.{minor}"' in (ROOT / ".github/workflows/tests.yml").read_text() and len(SOURCES) > 30
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, minor))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("glob", "rglob", "iglob"):
                assert not ast.unparse(node.args[0]).strip("'\"").endswith("/"), f"{path}: {node.lineno}"
