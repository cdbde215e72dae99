"""The command, and what all benchmarks share: it decides what is measured again, and what the README shows."""

from importlib import import_module

import pytest

from benchmarks import base, common
from benchmarks.__main__ import NAMES, main

KEY = ("model", "seed")


def test_the_list_names_each_benchmark_with_a_line(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()[-len(NAMES) :]
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert all(len(line.split()) > 5 for line in lines)
    assert main(["acuracy"]) == 2
    assert "There is no benchmark 'acuracy': choose one of accuracy, products" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in NAMES if base.results(name).is_file()])
def test_committed_results_are_rendered_and_none_is_there_twice(name, capsys):
    module = import_module(f"benchmarks.{name}")
    lines = base.read(base.results(name))
    assert len({base.identity(line, getattr(module, "KEY", ())) for line in lines}) == len(lines)
    assert common.run(name, ["--render"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_repetition_takes_the_place_of_the_first(tmp_path):
    path = tmp_path / "results.json"
    base.put(path, [{"model": "a", "seed": 0, "x": 1}, {"model": "b", "seed": 0, "x": 2}], KEY)
    base.put(path, [{"model": "a", "seed": 0, "x": 3}], KEY)
    assert [(line["model"], line["x"]) for line in base.read(path)] == [("a", 3), ("b", 2)]


class Small:
    """A benchmark of two lines, which counts its measurements."""

    KEY = ("model",)
    OPTIONS = {"models": ("a", "b"), "rounds": 3}  # noqa: RUF012
    QUICK = {"models": ["a"], "rounds": 1}  # noqa: RUF012

    def __init__(self):
        self.measured = []

    def jobs(self, given):
        for model in given.models:
            yield {"model": model}, lambda model=model: self.measured.append(model) or {"value": given.rounds}

    def verdicts(self, lines):
        return [common.Promise(line["model"], most=2).verdict(line["value"]) for line in lines]


@pytest.fixture
def small(monkeypatch):
    module = Small()
    monkeypatch.setattr(common, "import_module", lambda _: module)
    return module


def test_what_is_there_is_not_repeated_unless_asked_for(small, tmp_path, capsys):
    path = tmp_path / "small.json"
    assert common.run("small", ["--output", str(path), "--models", "a"]) == 1  # 3 is more than 2
    assert common.run("small", ["--output", str(path)]) == 1
    assert small.measured == ["a", "b"]
    assert [line["model"] for line in base.read(path)] == ["a", "b"]
    assert {"cpu", "threads"} == set(base.read(path)[0]["machine"])
    assert common.run("small", ["--output", str(path), "--again", "--rounds", "2"]) == 0
    assert small.measured == ["a", "b", "a", "b"]
    assert "a: 2.000 (at most 2) kept" in capsys.readouterr().out


def test_quick_stores_nothing_and_what_is_given_wins(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    assert common.run("small", ["--quick"]) == 0
    assert small.measured == ["a"]
    assert common.run("small", ["--quick", "--models", "b", "--rounds", "4"]) == 1
    assert small.measured == ["a", "b"]
    assert "b: 4.000 (at most 2) MISSED" in capsys.readouterr().out
    assert not any(tmp_path.rglob("*.json"))


def test_a_promise_holds_up_to_its_limits():
    between = common.Promise("a / b", least=0.97, most=1.03)
    assert [between.verdict(r)[0] for r in (0.969, 0.97, 1.0, 1.03, 1.031)] == [False, True, True, True, False]
    kept, text = common.Promise("a / b", most=1.15).verdict(1.2)
    assert not kept
    assert text == "a / b: 1.200 (at most 1.15) MISSED"
    assert common.Promise("a / b", least=5).verdict(None) == (False, "a / b: never reached (at least 5) MISSED")


def test_a_cell_without_its_field_stays_empty():
    columns = {"": "{name}", "AUROC": "{metrics[image]:.2f}", "epoch": "{epoch:.1f} s"}
    rows = [{"name": "a", "metrics": {"image": 0.5}, "epoch": None}, {"name": "b", "metrics": {}, "epoch": 2.0}]
    lines = ["| | AUROC | epoch |", "|---|---|---|", "| a | 0.50 |  |", "| b |  | 2.0 s |", ""]
    assert common.table(columns, rows) == lines


def test_a_process_of_its_own_gives_its_json_or_its_error():
    assert base.call(base.identity, {"a": 1, "b": 2}, ["a"]) == "[1]"
    with pytest.raises(RuntimeError, match="no_such_file"):
        base.call(base.need, "no_such_file")
